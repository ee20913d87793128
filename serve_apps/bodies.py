"""Request bodies that are too large are refused while they arrive, before they are held in memory.

An ASGI layer in front of the routes: it believes a Content-Length only to refuse, and counts what really arrives. A
client that is still sending gets its answer at once; what it goes on to send is read and thrown away for a while,
because many clients look for an answer only after their last byte.
"""

import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_apps.faults import respond
from serve_apps.refusals import Refusal

DISCARD_BODIES = 10
"""Times the limit that is thrown away before the connection is closed on a client that does not stop."""
DISCARD_S = 30.0


class BodyLimit:
    """Reads every request's body, at most `max_body_bytes`, and hands it on in one piece."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > self._max_body_bytes:
            await self._refuse(receive, send)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body_bytes:
                body.clear()
                await self._refuse(receive, send, more)
                return
        await self._app(scope, _replay(bytes(body), receive), send)

    async def _refuse(self, receive: Receive, send: Send, more: bool = True) -> None:
        limit = self._max_body_bytes
        refusal = Refusal(413, f"the request body is larger than the limit of {limit} bytes.", "body_too_large")
        await respond(refusal, send, more_body=True)
        discarded, end_s = 0, time.monotonic() + DISCARD_S
        while more and discarded < DISCARD_BODIES * limit and time.monotonic() < end_s:
            message = await receive()
            discarded += len(message.get("body", b""))
            more = message["type"] == "http.request" and message.get("more_body", False)
        await send({"type": "http.response.body", "body": b""})


def _replay(body: bytes, receive: Receive) -> Receive:
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
