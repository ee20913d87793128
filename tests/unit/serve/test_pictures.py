"""URLs are fetched from listed hosts only, within their limits, and never somewhere else."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from serve_apps.pictures import PictureLimits, load_picture
from serve_apps.refusals import RequestRefusedError

LISTED = ("127.0.0.1",)


class Pictures(BaseHTTPRequestHandler):
    """/picture is one, /moved leads to it, /endless never ends, /slow never answers."""

    picture = b""

    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("location", "/picture")
            self.end_headers()
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * 65536)
            except OSError:
                return
        elif self.path == "/slow":
            self.rfile.read(1)
        else:
            self.send_response(200 if self.path == "/picture" else 404)
            self.end_headers()
            self.wfile.write(self.picture)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def load(server: ThreadingHTTPServer, path: str, hosts: tuple[str, ...] = LISTED, timeout_s: float = 5.0) -> object:
    limits = PictureLimits(1_000_000, 1_000_000, hosts, timeout_s)
    return load_picture(f"http://127.0.0.1:{server.server_port}{path}", limits, "here")


def test_a_listed_host_is_fetched(server: ThreadingHTTPServer, picture_bytes: Callable[..., bytes]) -> None:
    Pictures.picture = picture_bytes("red", (5, 4))
    assert getattr(load(server, "/picture"), "size", None) == (5, 4)


@pytest.mark.parametrize(
    ("path", "hosts", "code"),
    [
        ("/picture", (), "image_url_not_allowed"),
        ("/picture", ("example.com",), "image_url_not_allowed"),
        ("/moved", LISTED, "image_fetch_failed"),
        ("/absent", LISTED, "image_fetch_failed"),
        ("/endless", LISTED, "invalid_image"),
        ("/slow", LISTED, "image_fetch_failed"),
    ],
)
def test_other_fetches_are_refused(server: ThreadingHTTPServer, path: str, hosts: tuple[str, ...], code: str) -> None:
    with pytest.raises(RequestRefusedError) as caught:
        load(server, path, hosts, timeout_s=0.5)
    assert (caught.value.refusal.code, caught.value.refusal.param) == (code, "here")


def test_a_listed_name_does_not_open_private_addresses(server: ThreadingHTTPServer) -> None:
    limits = PictureLimits(1_000_000, 1_000_000, ("localhost",), 5.0)
    with pytest.raises(RequestRefusedError) as caught:
        load_picture(f"http://localhost:{server.server_port}/picture", limits, "here")
    assert caught.value.refusal.code == "image_url_not_allowed"


def test_an_oversize_data_uri_is_refused_before_it_is_decoded() -> None:
    limits = PictureLimits(1000, 1_000_000, (), 5.0)
    with pytest.raises(RequestRefusedError) as caught:
        load_picture("data:image/png;base64," + "A" * 2000, limits, "here")
    assert "1000 bytes" in caught.value.refusal.message
