"""A video, stored or live, becomes pictures with their presentation times, one after another, at a sampling rate.

Of every interval of 1 / rate seconds the first frame that begins in it is taken: no frame twice, none invented, and
none later than it was shown, so a live source is sampled like a stored one. Videos are untrusted: container formats are
listed, nothing that a file refers to is opened, and bytes, pixels and seconds are limited. Damage that container or
decoder notice is an error, never a frame; most containers have no checksums, so packets that are wiped out whole can
vanish unnoticed. Frames keep the video's size; resizing and normalising belong to the model's processor. Memory holds a
few frames. Called by whoever feeds a stream.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import quote

import av
from av.error import EOFError as EndOfFileError
from av.error import FFmpegError
from PIL import Image

from sparsight.errors import SparsightError, VideoError
from sparsight.media.web import WebFile, allowed_url, public_address, shown_url

FORMATS = ("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "ogg", "rtsp")
"""Containers that are opened, by FFmpeg's names: MP4 and MOV, Matroska and WebM, and so on."""

LIVE_PROTOCOLS = {"rtsp": "rtsp,rtp,udp,tcp", "rtmp": "rtmp,tcp", "tcp": "tcp"}
"""URLs that FFmpeg reads itself, and the protocols that it may use for them."""

SHORT_S = 0.5
"""A file that ends earlier than this before the end that it states is cut short."""

CLOCK_S = Fraction(1, 1000)
"""Matroska's tick, the coarsest to which containers round times: a frame may be half a tick later than it says."""

_QUARTER_TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}


class Frame(NamedTuple):
    """An upright RGB picture, and the seconds from the first frame's presentation to its own."""

    time_s: float
    picture: Image.Image


class VideoLimits(NamedTuple):
    """The largest video that is read: encoded size, width × height, and length; None has no limit (live sources)."""

    max_bytes: int | None = 2_000_000_000
    max_pixels: int = 4096 * 2304
    max_duration_s: float | None = 4 * 3600.0


DEFAULT_LIMITS = VideoLimits()


def read_video(
    source: str | Path | BinaryIO,
    frames_per_second: float,
    limits: VideoLimits = DEFAULT_LIMITS,
    allowed_hosts: Collection[str] = (),
    timeout_s: float = 10.0,
) -> Iterator[Frame]:
    """The frames of a video at up to `frames_per_second`, in order of time; the source is opened at the first one.

    `source` is a file, an open binary file or pipe, or a URL of a host in `allowed_hosts`: http(s), or live by rtsp,
    rtmp or tcp. `timeout_s` bounds the wait for a server's next bytes. Files that are given open are left open.
    Raises `VideoError` for what cannot be had or is no video, is damaged or cut short, too large or too long, changes
    its size, or tells no or falling times; frames before the fault have been given by then.
    """
    if not 0.0 < frames_per_second < math.inf:
        raise VideoError(f"{frames_per_second:g} frames a second cannot be read: give a rate above 0")
    rate = Fraction(frames_per_second).limit_denominator(10**6)
    with ExitStack() as stack:
        opened = _open(source, limits, allowed_hosts, timeout_s, stack)
        yield from _sampled(opened, rate, limits)


class _Bytes:
    """What FFmpeg reads a file through: counts, and keeps the first fault, which FFmpeg sees as the end of the file."""

    def __init__(self, file: Any, where: str, max_bytes: int | None) -> None:
        self._file = file
        self._where = where
        self._max_bytes = max_bytes
        self.count = 0
        self.fault: SparsightError | None = None
        self.seek = file.seek
        self.tell = file.tell
        self.seekable = file.seekable

    def read(self, size: int) -> bytes:
        if self.fault is not None:
            return b""
        try:
            data = self._file.read(size)
        except SparsightError as error:
            self.fault, data = error, b""
        except (OSError, ValueError) as error:
            self.fault, data = VideoError(f"{self._where} cannot be read ({error}): check the source"), b""
        self.count += len(data)
        if self._max_bytes is not None and self.count > self._max_bytes:
            self.fault = _too_many_bytes(self._where, self._max_bytes)
        return data if self.fault is None else b""


class _Opened(NamedTuple):
    """An opened video: its container, its pictures' stream, how to name it, and what has gone wrong in reading it."""

    container: Any
    stream: Any
    where: str
    bytes: _Bytes | None

    def check(self) -> None:
        if self.bytes is not None and self.bytes.fault is not None:
            raise self.bytes.fault


def _open(
    source: str | Path | BinaryIO,
    limits: VideoLimits,
    allowed_hosts: Collection[str],
    timeout_s: float,
    stack: ExitStack,
) -> _Opened:
    """Opens a source and checks what its header says; everything is closed with `stack`."""
    scheme = source.partition("://")[0].lower() if isinstance(source, str) and "://" in source else ""
    reader: _Bytes | None = None
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
    if scheme in LIVE_PROTOCOLS:
        file, where = _live_url(str(source), allowed_hosts), f"the video '{shown_url(str(source))}'"
        options["protocol_whitelist"] = LIVE_PROTOCOLS[scheme]
    else:
        plain, where = _file(source, scheme, limits, allowed_hosts, timeout_s, stack)
        file = reader = _Bytes(plain, where, limits.max_bytes)
    pixels = {"max_pixels": str(limits.max_pixels)}
    try:
        container = stack.enter_context(
            av.open(file, "r", options=pixels, container_options=options, timeout=timeout_s)
        )
    except (FFmpegError, ValueError) as error:
        if reader is not None and reader.fault is not None:
            raise reader.fault from error
        if reader is not None and reader.count == 0:
            raise VideoError(f"{where} is empty (0 bytes): give the whole file") from error
        if isinstance(error, EndOfFileError):
            raise _no_frame(where) from error
        if isinstance(error, OSError):
            raise VideoError(f"{where} cannot be opened ({_said(error)}): check the source") from error
        raise VideoError(
            f"{where} is no video that can be read, or is broken ({_said(error)}): give a whole file in MP4, Matroska, "
            "WebM, AVI or MPEG-TS"
        ) from error
    stream: Any = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        raise VideoError(f"{where} holds no pictures that can be decoded: give a file with a video stream")
    opened = _Opened(container, stream, where, reader)
    opened.check()
    _check_header(opened, limits)
    opened.stream.codec_context.options = pixels
    opened.stream.codec_context.thread_count = 1  # streams are decoded beside each other, not each on all cores
    return opened


def _file(
    source: str | Path | BinaryIO,
    scheme: str,
    limits: VideoLimits,
    allowed_hosts: Collection[str],
    timeout_s: float,
    stack: ExitStack,
) -> tuple[Any, str]:
    """The bytes of a source, and how to name it."""
    if scheme in ("http", "https"):
        return stack.enter_context(WebFile(str(source), allowed_hosts, timeout_s)), f"'{shown_url(str(source))}'"
    if scheme:
        raise VideoError(f"'{scheme}' URLs are not read: give a file, or a URL of http, https, rtsp, rtmp or tcp")
    if not isinstance(source, str | Path):
        return source, "the video"
    path, where = Path(source), f"'{source}'"
    try:
        size, file = path.stat().st_size, stack.enter_context(path.open("rb"))
    except OSError as error:
        raise VideoError(f"{where} cannot be opened ({error.strerror or error}): correct the path") from error
    if limits.max_bytes is not None and size > limits.max_bytes:
        raise _too_many_bytes(where, limits.max_bytes)
    return file, where


def _live_url(url: str, allowed_hosts: Collection[str]) -> str:
    """The URL of a listed host, put together anew from its parts, so that FFmpeg reads the host that was checked."""
    parts = allowed_url(url, allowed_hosts)
    host = parts.hostname or ""
    public_address(host, parts.port or 554, allowed_hosts)
    name = ":".join(quote(part, safe="%") for part in (parts.username, parts.password) if part)
    place = f"[{host}]" if ":" in host else host
    port = f":{parts.port}" if parts.port else ""
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{name}{'@' if name else ''}{place}{port}{quote(parts.path, safe='/%')}{query}"


def _check_header(opened: _Opened, limits: VideoLimits) -> None:
    context = opened.stream.codec_context
    _check_pixels(context.width, context.height, opened.where, limits)
    if opened.container.duration is not None:
        _check_duration(opened.container.duration / av.time_base, opened.where, limits)


def _sampled(opened: _Opened, rate: Fraction, limits: VideoLimits) -> Iterator[Frame]:
    first: Fraction | None = None
    last_s = Fraction(-1)
    taken = -1
    size: tuple[int, int] | None = None
    for frame in _decoded(opened, limits):
        size = size or (frame.width, frame.height)
        _check_frame(frame, size, last_s, opened.where, limits)
        tick = frame.time_base
        first = frame.pts * tick if first is None else first
        time_s = frame.pts * tick - first
        if time_s < last_s:
            raise VideoError(
                f"{opened.where}: a frame of {float(time_s):.3f} s follows one of {float(last_s):.3f} s: its times are "
                "broken, write it anew with rising ones"
            )
        _check_duration(float(time_s), opened.where, limits)
        last_s = time_s
        interval = math.floor((time_s + min(tick, CLOCK_S) / 2) * rate)
        if interval > taken:
            taken = interval
            yield Frame(float(time_s), _upright(frame))
    if size is None:
        raise _no_frame(opened.where)


def _decoded(opened: _Opened, limits: VideoLimits) -> Iterator[Any]:
    """All frames of the pictures' stream. Raises `VideoError` where packets or frames are damaged or are missing."""
    end_s, count = 0.0, 0
    try:
        for packet in opened.container.demux():
            opened.check()
            count += packet.size
            if limits.max_bytes is not None and count > limits.max_bytes:
                raise _too_many_bytes(opened.where, limits.max_bytes)
            if packet.pts is not None:
                end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream is not opened.stream:
                continue
            for frame in packet.decode():
                if packet.is_corrupt or frame.is_corrupt:
                    raise _damaged(opened.where, frame.time, "its frame is incomplete")
                yield frame
    except FFmpegError as error:
        opened.check()
        raise _damaged(opened.where, end_s, _said(error)) from error
    opened.check()
    stated_s = (opened.container.duration or 0) / av.time_base
    if end_s < stated_s - SHORT_S:
        raise VideoError(
            f"{opened.where} ends after {end_s:.1f} s of the {stated_s:.1f} s that it states: it is cut short, "
            "fetch it again"
        )


def _check_frame(frame: Any, size: tuple[int, int], last_s: Fraction, where: str, limits: VideoLimits) -> None:
    after = f"after {max(0.0, float(last_s)):.1f} s"
    if (frame.width, frame.height) != size:
        raise VideoError(
            f"{where}: {after} its frames change from {size[0]} x {size[1]} to {frame.width} x {frame.height} pixels: "
            "cut it there, or scale it to one size"
        )
    _check_pixels(frame.width, frame.height, where, limits)
    if frame.pts is None or frame.time_base is None:
        raise VideoError(f"{where}: a frame {after} has no presentation time: put the video into MP4 or Matroska")


def _check_pixels(width: int, height: int, where: str, limits: VideoLimits) -> None:
    if width * height > limits.max_pixels:
        raise VideoError(
            f"{where}: its frames are {width} x {height} = {width * height} pixels, the limit is {limits.max_pixels}: "
            "make them smaller or raise the pixel limit"
        )


def _check_duration(seconds: float, where: str, limits: VideoLimits) -> None:
    if limits.max_duration_s is not None and seconds > limits.max_duration_s:
        raise VideoError(
            f"{where} is {seconds:.1f} s long or longer, the limit is {limits.max_duration_s:g} s: cut it or raise the "
            "limit"
        )


def _too_many_bytes(where: str, max_bytes: int) -> VideoError:
    return VideoError(f"{where} has more than {max_bytes} bytes, the limit: compress it or raise the byte limit")


def _no_frame(where: str) -> VideoError:
    return VideoError(f"{where} ends before its first frame: it has none, or is cut short; give a whole file")


def _damaged(where: str, time_s: float | None, why: str) -> VideoError:
    return VideoError(f"{where} is damaged {time_s or 0.0:.1f} s from its start ({why}): replace it")


def _said(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)


def _upright(frame: Any) -> Image.Image:
    """The frame as RGB, turned by quarters as its container says (counter-clockwise)."""
    picture = cast(Image.Image, frame.to_image())
    turn = _QUARTER_TURNS.get(round(frame.rotation / 90) % 4)
    return picture if turn is None else picture.transpose(turn)
