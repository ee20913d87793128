"""The safe decoder: what it takes, what it refuses, and that nothing hostile gets through as another error."""

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from random import Random

import numpy as np
import pytest
from PIL import Image

from sparsight.errors import PictureError
from sparsight.media.images import decode, encode_png


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {}, 40),
        ("JPEG", {}, 40),
        ("GIF", {}, 40),
    ],
)
def test_the_five_formats_give_their_pixels(kind: str, options: dict[str, object], tolerance: int) -> None:
    picture = decode(encoded(gradient(), kind, **options))
    assert picture.mode == "RGB"
    assert picture.size == (40, 24)
    difference = np.abs(np.asarray(picture).astype(int) - np.asarray(gradient()).astype(int))
    assert difference.max() <= tolerance


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "PPM", "TGA", "PDF", "EPS"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(PictureError, match="not a readable PNG, JPEG, WebP, GIF or BMP"):
        decode(encoded(gradient(), kind))


@pytest.mark.parametrize(
    "data", [b"plain words", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x89PNG\r\n\x1a\n", b"BM"]
)
def test_things_that_are_no_pictures_are_refused(data: bytes) -> None:
    with pytest.raises(PictureError):
        decode(data)


def test_nothing_is_refused() -> None:
    with pytest.raises(PictureError, match="empty"):
        decode(b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_file_cut_short_is_refused(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(PictureError):
            decode(data[: int(len(data) * share)])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_flipped_bytes_never_raise_anything_else(kind: str) -> None:
    data = encoded(gradient(), kind)
    random = Random(0)
    refused = 0
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(random.randint(1, 8)):
            broken[random.randrange(len(broken))] = random.randrange(256)
        try:
            picture = decode(bytes(broken), max_pixels=100_000)
            assert picture.mode == "RGB"
        except PictureError:
            refused += 1
    assert refused > 10


def test_the_byte_limit_comes_first(picture_bytes: Callable[..., bytes]) -> None:
    data = picture_bytes()
    decode(data, max_bytes=len(data))
    with pytest.raises(PictureError, match=rf"{len(data)} bytes, the limit is {len(data) - 1}"):
        decode(data, max_bytes=len(data) - 1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_the_pixel_limit_holds_for_every_format(picture_bytes: Callable[..., bytes], kind: str) -> None:
    data = picture_bytes(size=(20, 10), kind=kind)
    assert decode(data, max_pixels=200).size == (20, 10)
    with pytest.raises(PictureError, match="20 x 10 = 200 pixels, the limit is 199"):
        decode(data, max_pixels=199)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with next to no pixels behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_from_the_header(width: int, height: int) -> None:
    with pytest.raises(PictureError, match="limit is 50000000"):
        decode(png_claiming(width, height))


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("extended", [True, False])
def test_webp_headers_are_read_before_the_decoder_allocates(lossless: bool, extended: bool) -> None:
    """The three kinds of WebP header, each with its claim raised to 16384 x 16384."""
    exif = Image.Exif()
    exif[0x0112] = 1
    options = {"exif": exif} if extended else {}
    data = bytearray(encoded(Image.new("RGB", (70, 50), "red"), "WEBP", lossless=lossless, **options))
    assert (data[12:16] == b"VP8X") == extended
    assert decode(bytes(data), max_pixels=3500).size == (70, 50)
    with pytest.raises(PictureError, match="70 x 50 = 3500 pixels"):
        decode(bytes(data), max_pixels=3499)
    if data[12:16] == b"VP8X":
        data[24:30] = b"\xff\x3f\x00\xff\x3f\x00"
    elif data[12:16] == b"VP8L":
        data[21:25] = (0x0FFFFFFF).to_bytes(4, "little")
    else:
        data[26:30] = b"\xff\x3f\xff\x3f"
    with pytest.raises(PictureError, match=r"1638[34] x 1638[34] = \d+ pixels"):
        decode(bytes(data))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int) -> None:
    stored = Image.new("RGB", (32, 16), "white")
    stored.paste("red", (0, 0, 16, 8))  # the stored picture's top left corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = decode(encoded(stored, "PNG", exif=exif))
    assert picture.size == ((32, 16) if orientation < 5 else (16, 32))
    corner = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[orientation]
    width, height = picture.size
    for across in (0, 1):
        for down in (0, 1):
            pixel = picture.getpixel((across * (width - 1), down * (height - 1)))
            assert pixel == ((255, 0, 0) if (across, down) == corner else (255, 255, 255))


def test_a_damaged_exif_block_does_not_cost_the_picture() -> None:
    data = encoded(gradient(), "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(gradient()))


def test_transparency_lies_on_white() -> None:
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (255, 0, 0, 128)])
    pixels = np.asarray(decode(encode_png(rgba)))[0].astype(int)
    np.testing.assert_array_equal(pixels[:2], [[255, 0, 0], [255, 255, 255]])
    np.testing.assert_allclose(pixels[2], [255, 127, 127], atol=1)
    grey = Image.new("LA", (1, 1), (0, 0))
    assert decode(encode_png(grey)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 255, 0, 255, 0])
    palette.putdata([0, 1])
    picture = decode(encoded(palette, "PNG", transparency=1))
    assert [picture.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 255), (255, 255, 255)]


def test_other_colour_modes_become_rgb() -> None:
    deep = Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16))
    pixels = np.asarray(decode(encoded(deep, "PNG")))[0, :, 0]
    np.testing.assert_array_equal(pixels, [0, 128, 255])
    assert decode(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(Image.new("1", (8, 8), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(Image.new("L", (8, 8), 7), "BMP")).getpixel((0, 0)) == (7, 7, 7)


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert decode(data).getpixel((4, 4)) == (255, 0, 0)


def test_png_round_trip_is_exact_and_repeatable() -> None:
    data = encode_png(gradient())
    assert data == encode_png(gradient())
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(gradient()))
