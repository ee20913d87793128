"""Requests that are refused: the one error shape of the service, OpenAI's.

A `Refusal` is a value that crosses processes; `RequestRefusedError` carries it up to whoever answers the client.
Nothing here knows HTTP servers; `faults` turns refusals into responses.
"""

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

_CODES = {
    "extra_forbidden": "unknown_parameter",
    "missing": "missing_required_parameter",
    "json_invalid": "invalid_json",
}


@dataclass(frozen=True)
class Refusal:
    """A 4xx or 5xx status and what OpenAI's error object says: message, type, param, code."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after_s: int | None = None

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


class RequestRefusedError(Exception):
    """Ends the handling of a request with a `Refusal`."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


def bad_request(message: str, code: str, param: str | None = None) -> RequestRefusedError:
    """Status 400."""
    return RequestRefusedError(Refusal(400, message, code, param))


def overloaded(what: str) -> Refusal:
    """Status 429: the queue in front of `what` is full."""
    return Refusal(429, f"{what} has more requests than it can take: try again shortly.", "queue_full", None, 1)


def invalid(error: ValidationError) -> RequestRefusedError:
    """Status 400 for the first fault that pydantic found in a request."""
    fault = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in fault["loc"]) or None
    message = fault["msg"] if param is None else f"{param}: {fault['msg']}"
    return bad_request(message, _CODES.get(fault["type"], fault["type"]), param)
