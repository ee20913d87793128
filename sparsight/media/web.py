"""A file on an allowed web server, read and sought as if it lay here.

A URL is opened only if its host is listed; then at an address that was looked up once and is public (or itself listed),
and redirects are not followed. Where the server takes ranges, a seek asks for the rest of the file from there on. It
knows nothing of what the bytes mean. Called by the video frame source.
"""

import http.client
import io
import ipaddress
import socket
import ssl
from collections.abc import Collection
from urllib.parse import SplitResult, urlsplit

from sparsight.errors import VideoError


def shown_url(url: str) -> str:
    """The URL without user, password and query, for messages."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def allowed_url(url: str, allowed_hosts: Collection[str]) -> SplitResult:
    """The parts of a URL whose host is listed. Raises `VideoError` for any other."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise VideoError(f"this is no URL of a video ({error}): correct it") from error
    if host not in {allowed.lower() for allowed in allowed_hosts}:
        raise VideoError(f"'{shown_url(url)}': the host '{host}' is not allowed: list it, or give the file itself")
    return parts


def public_address(host: str, port: int, allowed_hosts: Collection[str]) -> str:
    """One address of a host that is public, or listed itself. Raises `VideoError` where there is none."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise VideoError(f"the host '{host}' cannot be found ({error}): correct the URL") from error
    for address in found:
        if ipaddress.ip_address(address).is_global or address in allowed_hosts:
            return address
    raise VideoError(f"the host '{host}' has no public address: list its address, too, if it is meant")


class WebFile(io.RawIOBase):
    """The bytes behind an http(s) URL. Raises `VideoError` where they cannot be had; `close` ends the connection."""

    def __init__(self, url: str, allowed_hosts: Collection[str], timeout_s: float) -> None:
        self._parts = allowed_url(url, allowed_hosts)
        self._where = shown_url(url)
        self._timeout_s = timeout_s
        self._host = self._parts.hostname or ""
        self._port = self._parts.port or (443 if self._parts.scheme == "https" else 80)
        self._address = public_address(self._host, self._port, allowed_hosts)
        self._connection: http.client.HTTPConnection | None = None
        self._place = 0
        response = self._request(0)
        self._response: http.client.HTTPResponse | None = response
        self._length = response.length
        self._ranges = response.getheader("accept-ranges", "").lower() == "bytes"

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._ranges and self._length is not None

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1, /) -> bytes:
        """What has arrived, up to `size` bytes; nothing at the end."""
        if self._length is not None and self._place >= self._length:
            return b""
        try:
            if self._response is None:
                self._response = self._request(self._place)
            data = self._response.read1(size)
        except (OSError, http.client.HTTPException) as error:
            raise VideoError(f"'{self._where}' stopped after {self._place} bytes ({error}): try again") from error
        self._place += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        assert self._length is not None
        target = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        if target != self._place:
            self._hang_up()  # the rest is asked for when something is read
            self._place = target
        return target

    def close(self) -> None:
        self._hang_up()
        super().close()

    def _hang_up(self) -> None:
        if self._response is not None:
            self._response.close()
        if self._connection is not None:
            self._connection.close()
        self._response = None

    def _request(self, start: int) -> http.client.HTTPResponse:
        target = (self._parts.path or "/") + (f"?{self._parts.query}" if self._parts.query else "")
        headers = {"user-agent": "sparsight"} | ({"range": f"bytes={start}-"} if start else {})
        try:
            self._connection = self._connect()
            self._connection.request("GET", target, headers=headers)
            response = self._connection.getresponse()
        except (OSError, http.client.HTTPException, ValueError) as error:
            if self._connection is not None:
                self._connection.close()
            raise VideoError(f"'{self._where}' cannot be fetched ({error}): check the URL and the server") from error
        if response.status != (206 if start else 200):
            response.close()
            self._connection.close()
            raise VideoError(
                f"'{self._where}': the server answered with status {response.status}, and redirects are not followed: "
                "give the URL of the file itself"
            )
        return response

    def _connect(self) -> http.client.HTTPConnection:
        """A connection to the address that was checked, in the name of the host."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        connection.sock = socket.create_connection((self._address, self._port), timeout=self._timeout_s)
        if self._parts.scheme == "https":
            try:
                connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=self._host)
            except OSError:
                connection.close()
                raise
        return connection
