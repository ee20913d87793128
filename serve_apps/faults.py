"""What is not an answer becomes an error in OpenAI's shape, whatever went wrong and wherever.

Refusals keep their status; full queues are 429, missing replicas 503; anything else is a fault of ours: it is logged
with an id, and the client gets the id and nothing more. The outermost layer of the HTTP application.
"""

import json
import logging
import uuid
from collections.abc import AsyncIterator

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_apps.refusals import Refusal, RequestRefusedError, overloaded

_HTTP_CODES = {404: "unknown_url", 405: "method_not_allowed"}


class Faults:
    """Turns errors into refusals; unknown ones go to the log."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def refusal_of(self, error: Exception) -> Refusal:
        if isinstance(error, RequestRefusedError):
            return error.refusal
        if isinstance(error, BackPressureError):
            return overloaded("the service")
        if isinstance(error, RayActorError | DeploymentUnavailableError | ReplicaUnavailableError):
            return Refusal(503, "the service is restarting: try again shortly.", "unavailable", None, 5)
        if isinstance(error, HTTPException):
            code = _HTTP_CODES.get(error.status_code, "http_error")
            return Refusal(error.status_code, f"{error.detail}: see docs/serving.md for what there is.", code)
        fault = uuid.uuid4().hex
        self._logger.error("request failed, id %s", fault, exc_info=error)
        return Refusal(500, f"the service failed to answer; its log has more under id {fault}.", "internal_error")

    async def end_stream_in_shape(self, lines: AsyncIterator[str]) -> AsyncIterator[str]:
        """Server-sent events that end with an error event if their source fails."""
        try:
            async for item in lines:
                yield item
        except Exception as error:  # the status has gone out already: the error can only be an event
            yield f"data: {json.dumps(self.refusal_of(error).body)}\n\n"


class ErrorShape:
    """The ASGI layer that answers whatever `app` raises."""

    def __init__(self, app: ASGIApp, faults: Faults) -> None:
        self._app = app
        self._faults = faults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception as error:
            if scope["type"] != "http" or started:
                raise
            await respond(self._faults.refusal_of(error), send)


async def respond(refusal: Refusal, send: Send, more_body: bool = False) -> None:
    """Send a refusal as a whole response; with `more_body` its end is left to the caller."""
    content = json.dumps(refusal.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content))} | refusal.headers
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": content, "more_body": more_body})
