"""The pictures that requests name: data: URIs, and URLs of hosts that the operator has allowed.

A URL is fetched only if its host is listed; then from an address that was looked up once and is public (or itself
listed), without following redirects, within a size and a time. Everything is decoded by the safe decoder. Runs in
threads of the replicas; refuses with `RequestRefusedError`.
"""

import base64
import binascii
import http.client
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from PIL import Image

from serve_apps.refusals import bad_request
from sparsight.config import ServeConfig
from sparsight.errors import PictureError
from sparsight.media.images import decode

_DATA_URI = re.compile(r"data:(?P<type>[^;,]*)(?:;[^;,]+)*?;base64,", re.IGNORECASE)
_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class PictureLimits:
    """What a picture may cost, and where it may come from."""

    max_bytes: int
    max_pixels: int
    allowed_hosts: tuple[str, ...]
    timeout_s: float

    @staticmethod
    def of(config: ServeConfig) -> "PictureLimits":
        hosts = tuple(host.lower() for host in config.allowed_picture_hosts)
        return PictureLimits(config.max_picture_bytes, config.max_picture_pixels, hosts, config.picture_timeout_s)


def load_picture(url: str, limits: PictureLimits, param: str) -> Image.Image:
    """The RGB picture that a data: URI holds or an allowed URL names; `param` is where the request said so."""
    if url[:5].lower() == "data:":
        data = _data_of(url, limits, param)
    else:
        data = _fetch(url, limits, param)
    try:
        return decode(data, limits.max_bytes, limits.max_pixels)
    except PictureError as error:
        raise bad_request(str(error), "invalid_image", param) from None


def _data_of(url: str, limits: PictureLimits, param: str) -> bytes:
    head = _DATA_URI.match(url[:256])
    if head is None or not head["type"].lower().startswith("image/"):
        raise bad_request("a data: URI of a picture begins 'data:image/…;base64,'", "invalid_image_url", param)
    if len(url) - head.end() > limits.max_bytes * 4 // 3 + 4:
        raise bad_request(f"the picture is larger than the limit of {limits.max_bytes} bytes", "invalid_image", param)
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise bad_request("the picture is not valid base64", "invalid_image_url", param) from None


def _fetch(url: str, limits: PictureLimits, param: str) -> bytes:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise bad_request("this is no URL of a picture", "invalid_image_url", param) from None
    if parts.scheme not in ("http", "https") or host not in limits.allowed_hosts:
        message = "this service fetches no pictures from there: send the picture itself, as a data: URI"
        raise bad_request(message, "image_url_not_allowed", param)
    end_s = time.monotonic() + limits.timeout_s
    port = port or (443 if parts.scheme == "https" else 80)
    address = _address(host, port, limits.allowed_hosts, param)
    try:
        return _download(parts, address, port, limits.max_bytes, end_s, param)
    except (OSError, http.client.HTTPException, ValueError):
        message = "the picture could not be fetched from its host in time"
        raise bad_request(message, "image_fetch_failed", param) from None


def _address(host: str, port: int, allowed_hosts: Sequence[str], param: str) -> str:
    """One public or listed address of a host; the connection is made to it, so a second look-up cannot change it."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        raise bad_request("the picture's host could not be found", "image_fetch_failed", param) from None
    for address in found:
        if ipaddress.ip_address(address).is_global or address in allowed_hosts:
            return address
    raise bad_request("the picture's host has no public address", "image_url_not_allowed", param)


def _download(parts: SplitResult, address: str, port: int, max_bytes: int, end_s: float, param: str) -> bytes:
    host = parts.hostname or ""
    with socket.create_connection((address, port), timeout=_left_s(end_s)) as plain:
        channel = plain
        if parts.scheme == "https":
            channel = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
        with closing(http.client.HTTPConnection(host, port)) as connection:
            connection.sock = channel
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"accept": "image/*", "user-agent": "sparsight"})
            with connection.getresponse() as response:
                if response.status != 200:
                    message = f"the picture's host answered with status {response.status}; redirects are not followed"
                    raise bad_request(message, "image_fetch_failed", param)
                return _read(response, channel, max_bytes, end_s, param)


def _read(
    response: http.client.HTTPResponse, channel: socket.socket, max_bytes: int, end_s: float, param: str
) -> bytes:
    data = bytearray()
    while True:
        channel.settimeout(_left_s(end_s))
        piece = response.read1(_READ_BYTES)
        if not piece:
            return bytes(data)
        data += piece
        if len(data) > max_bytes:
            raise bad_request(f"the picture is larger than the limit of {max_bytes} bytes", "invalid_image", param)


def _left_s(end_s: float) -> float:
    left_s = end_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s
