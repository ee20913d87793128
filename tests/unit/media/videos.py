"""Video files made with PyAV: every frame has a grey that says its number, and a red corner that says what is up."""

import io
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

LEVELS = 12
"""Frames whose numbers differ by this many look alike."""


def level(number: int) -> int:
    """The grey of a frame, of 0 to 255."""
    return 20 + 20 * (number % LEVELS)


def pixels_HWC(number: int, width: int, height: int) -> np.ndarray:
    """A grey picture whose top left quarter is red."""
    picture_HWC = np.full((height, width, 3), level(number), dtype=np.uint8)
    picture_HWC[: height // 2, : width // 2] = (255, 0, 0)
    return picture_HWC


def number_in(picture: Any) -> int:
    """Which of `LEVELS` frames an upright picture is, read off its bottom right corner."""
    width, height = picture.size
    grey = np.asarray(picture)[height * 3 // 4 :, width * 3 // 4 :].mean()
    return round((float(grey) - 20) / 20)


def make_video(
    container: str = "mp4",
    codec: str = "libx264",
    frames: int = 30,
    rate: int = 10,
    size: tuple[int, int] = (64, 48),
    ticks: Sequence[int] | None = None,
    rotation: int = 0,
    options: dict[str, str] | None = None,
    path: Path | None = None,
) -> bytes:
    """A video of `frames` frames at `rate`, or at the `ticks` (of 1 / rate seconds) that are given.

    Made in memory, or at `path`, for containers that have to be read again while they are written.
    """
    buffer = io.BytesIO()
    with av.open(path or buffer, "w", format=container, options=options or {}) as output:
        stream: Any = output.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj444p" if codec == "mjpeg" else "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        output.start_encoding()
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(pixels_HWC(number, *size), "rgb24")
            frame.pts = number if ticks is None else ticks[number]
            frame.time_base = Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path.read_bytes() if path else buffer.getvalue()


def assembled(sizes: Sequence[tuple[int, int]], ticks: Sequence[int]) -> bytes:
    """A stream of single JPEG pictures of these sizes, at these tenths of a second (10 or more)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream: Any = output.add_stream("mjpeg", rate=10)
        stream.width, stream.height = sizes[0]
        stream.pix_fmt = "yuvj444p"
        for number, (size, tick) in enumerate(zip(sizes, ticks, strict=True)):
            for packet in _jpeg_packets(number, size):
                packet.stream = stream
                packet.pts, packet.dts, packet.time_base = tick, number, Fraction(1, 10)
                output.mux(packet)
    return buffer.getvalue()


def _jpeg_packets(number: int, size: tuple[int, int]) -> list[Any]:
    encoder: Any = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt = *size, "yuvj444p"
    encoder.time_base = Fraction(1, 10)
    frame = av.VideoFrame.from_ndarray(pixels_HWC(number, *size), "rgb24").reformat(format="yuvj444p")
    frame.pts = 0
    return [*encoder.encode(frame), *encoder.encode()]


def only_sound() -> bytes:
    """A file without pictures."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream: Any = output.add_stream("pcm_s16le", rate=8000)
        for number in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1000), dtype=np.int16), format="s16", layout="mono")
            frame.sample_rate = 8000
            frame.pts = number * 1000
            output.mux(stream.encode(frame))
    return buffer.getvalue()


def all_frames(data: bytes) -> list[tuple[float, Any]]:
    """Every frame with its presentation time in seconds from the first one's: the slow twin's first step."""
    with av.open(io.BytesIO(data), "r") as container:
        frames = [(frame.time, frame.to_image()) for frame in container.decode(video=0)]
    return [(time_s - frames[0][0], picture) for time_s, picture in frames]


def picked_by_time(data: bytes, rate: float) -> list[tuple[float, Any]]:
    """The slow twin of sampling: all frames are decoded, and of each interval the first is kept."""
    kept: dict[int, tuple[float, Any]] = {}
    for time_s, picture in all_frames(data):
        kept.setdefault(math.floor((time_s + 5e-4) * rate), (time_s, picture))
    return [kept[interval] for interval in sorted(kept)]
