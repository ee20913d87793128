"""The requests that clients send and the JSON that they receive, in OpenAI's words.

Requests are strict: wrong types, unknown fields, and fields whose effect this service does not have are refused, rather
than ignored. Called by the routes; decides nothing about models.
"""

import time
import uuid
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class ImageUrl(Strict):
    url: str
    """A data: URI, or an http(s) URL of an allowed host."""
    detail: Literal["auto", "low", "high"] | None = None
    """Accepted and without effect: every picture costs the same."""


class ContentPart(Strict):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _check(self) -> "ContentPart":
        other = "image_url" if self.type == "text" else "text"
        if getattr(self, self.type) is None or getattr(self, other) is not None:
            message = "a part of type {type} needs a field of that name, and no other"
            raise PydanticCustomError("missing", message, {"type": self.type})
        return self


class ChatMessage(BaseModel):
    """Fields that clients echo from answers (refusal, tool_calls, …) are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: list[ContentPart]

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, value: Any) -> Any:
        return [{"type": "text", "text": value}] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> "ChatMessage":
        if self.role != "user" and any(part.type == "image_url" for part in self.content):
            raise PydanticCustomError("invalid_value", "only user messages can hold pictures")
        return self


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None
    """Accepted and without effect."""


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields of OpenAI's API that are taken only with a value that changes nothing."""


class ChatRequest(Strict):
    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    """0, which is also the default, is greedy."""
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)] | None = None
    """One string or up to four; the answer ends before the first of them."""
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    n: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    tools: Any = None
    tool_choice: Any = None
    response_format: Any = None
    modalities: Any = None

    @field_validator(*NEUTRAL)
    @classmethod
    def _neutral(cls, value: Any, info: Any) -> Any:
        allowed = NEUTRAL[info.field_name]
        if value is not None and not any(type(value) is type(item) and value == item for item in allowed):
            values = " or ".join(map(str, allowed))
            raise PydanticCustomError("unsupported_value", "only {values} is supported here", {"values": values})
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def answer_tokens(self) -> int | None:
        """The most tokens that the client wants, if it says so."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class OpenStreamRequest(Strict):
    model: str


class Frame(Strict):
    time_s: Annotated[float, Field(ge=0.0)]
    """Seconds since the stream began."""
    image: str
    """A data: URI, or an http(s) URL of an allowed host."""


class FramesRequest(Strict):
    frames: list[Frame] = Field(min_length=1)

    @field_validator("frames")
    @classmethod
    def _in_order(cls, frames: list[Frame]) -> list[Frame]:
        if any(later.time_s <= earlier.time_s for earlier, later in pairwise(frames)):
            raise PydanticCustomError("frames_out_of_order", "times must increase from frame to frame")
        return frames


class QuestionRequest(Strict):
    question: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    until_s: Annotated[float, Field(ge=0.0)] | None = None
    """Answer as if asked at this time: later frames are not looked at."""

    @field_validator("question")
    @classmethod
    def _not_blank(cls, question: str) -> str:
        if not question.strip():
            raise PydanticCustomError("invalid_value", "the question is empty")
        return question


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class ChatResponse:
    """The JSON of one answer, whole or in chunks; all share an id."""

    def __init__(self, model: str) -> None:
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model

    def whole(self, text: str, finish: str, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        counts = usage(prompt_tokens, completion_tokens)
        return self._head("chat.completion") | {"choices": [choice], "usage": counts}

    def chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def usage_chunk(self, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        counts = usage(prompt_tokens, completion_tokens)
        return self._head("chat.completion.chunk") | {"choices": [], "usage": counts}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}
