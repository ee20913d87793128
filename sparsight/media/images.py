"""Untrusted picture bytes become an upright RGB picture, or a `PictureError` that says what is wrong.

Byte and pixel limits are checked from the header, before any pixel is decoded; only five formats are opened, and
broken or truncated files are refused. Resizing and normalising belong to the model's processor, not here. Called by
the data importers, by labelling and training when they read a sample, and by the service for what clients send.
"""

from io import BytesIO
from typing import NamedTuple, Protocol

from PIL import Image, ImageOps, UnidentifiedImageError

from sparsight.errors import PictureError
from sparsight.sources import MAX_PICTURE_BYTES, MAX_PICTURE_PIXELS

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


class _Configured(Protocol):
    @property
    def max_picture_bytes(self) -> int: ...

    @property
    def max_picture_pixels(self) -> int: ...


class DecodeLimits(NamedTuple):
    """The largest picture that is opened: its encoded size, and width × height. The arguments of `decode`, in order."""

    max_bytes: int = MAX_PICTURE_BYTES
    max_pixels: int = MAX_PICTURE_PIXELS

    @staticmethod
    def of(config: _Configured) -> "DecodeLimits":
        """Those of a slice of the configuration."""
        return DecodeLimits(config.max_picture_bytes, config.max_picture_pixels)


DEFAULT_LIMITS = DecodeLimits()


def decode(data: bytes, max_bytes: int = MAX_PICTURE_BYTES, max_pixels: int = MAX_PICTURE_PIXELS) -> Image.Image:
    """The picture in `data` (PNG, JPEG, WebP, BMP, or the first frame of a GIF) as RGB, upright, alpha laid on white.

    `max_bytes` limits the encoded size, `max_pixels` width × height. Raises `PictureError` for anything that is too
    large, of another format, broken or cut short.
    """
    if not data:
        raise PictureError("the picture is empty (0 bytes): send the whole file")
    if len(data) > max_bytes:
        raise PictureError(
            f"the picture has {len(data)} bytes, the limit is {max_bytes}: compress it or raise the byte limit"
        )
    _check_pixels(_webp_size(data), max_pixels)
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _check_pixels(image.size, max_pixels)
            image.load()
            return _to_rgb(_upright(image))
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError(
            "the bytes are not a readable PNG, JPEG, WebP, GIF or BMP picture: convert it to one of these"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(f"the picture has too many pixels, the limit is {max_pixels}: make it smaller") from error
    except Exception as error:  # decoders raise anything at all on hostile bytes; each means the same to the caller
        raise PictureError(f"the picture is broken or cut short ({error}): replace the file") from error


def encode_png(image: Image.Image) -> bytes:
    """The picture as PNG bytes; equal pixels give equal bytes."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _check_pixels(size: tuple[int, int] | None, max_pixels: int) -> None:
    if size is not None and size[0] * size[1] > max_pixels:
        raise PictureError(
            f"the picture is {size[0]} x {size[1]} = {size[0] * size[1]} pixels, the limit is {max_pixels}: "
            "make it smaller or raise the pixel limit"
        )


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height that a WebP header claims; None for other formats and headers cut short.

    The WebP decoder allocates its whole canvas when it is opened, so its size has to be known before that.
    """
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + ((bits >> 14) & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block tells no orientation, but the pixels are whole
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: a plain conversion would clip it to white
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        white.alpha_composite(rgba)
        return white.convert("RGB")
    return image.convert("RGB")
