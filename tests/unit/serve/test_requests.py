"""Requests are strict, and their first fault is named in OpenAI's error shape."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from serve_apps.refusals import Refusal, invalid
from serve_apps.schemas import ChatRequest, FramesRequest, QuestionRequest

MESSAGES = [{"role": "user", "content": "hello"}]
GOOD: dict[str, Any] = {"model": "m", "messages": MESSAGES}
PIXEL = "data:image/png;base64,AAAA"


def fault(kind: type[BaseModel], value: Any) -> Refusal:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(value)
    return invalid(caught.value).refusal


def test_what_openai_clients_send_is_taken() -> None:
    echoed = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None}
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}}]
    request = ChatRequest.model_validate(
        GOOD
        | {"messages": [{"role": "developer", "content": "be brief"}, echoed, {"role": "user", "content": parts}]}
        | {"temperature": 1, "top_p": 0.5, "n": 1, "stop": "x", "presence_penalty": 0.0, "logprobs": False}
        | {"max_tokens": 3, "max_completion_tokens": 2, "response_format": {"type": "text"}, "user": "u"}
    )
    assert request.stop == ["x"]
    assert request.answer_tokens == 2


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", "too_short"),
        ({"messages": "hello"}, "messages", "list_type"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role", "literal_error"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "messages.0.content.0.type",
            "literal_error",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0", None),
        ({"temperature": "0.5"}, "temperature", "float_type"),
        ({"temperature": -0.1}, "temperature", "greater_than_equal"),
        ({"temperature": float("nan")}, "temperature", "finite_number"),
        ({"max_tokens": -1}, "max_tokens", "greater_than_equal"),
        ({"max_tokens": 1.5}, "max_tokens", "int_type"),
        ({"max_tokens": True}, "max_tokens", "int_type"),
        ({"n": 2}, "n", "unsupported_value"),
        ({"n": True}, "n", "unsupported_value"),
        ({"tools": [{}]}, "tools", "unsupported_value"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_value"),
        ({"stop": ["a", ""]}, "stop.1", "string_too_short"),
        ({"stop": list("abcde")}, "stop", "too_long"),
        ({"seed": 2**63}, "seed", "less_than"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"stream": "yes"}, "stream", "bool_type"),
    ],
)
def test_wrong_chat_fields_are_named(fields: dict[str, Any], param: str, code: str | None) -> None:
    refusal = fault(ChatRequest, GOOD | fields)
    assert (refusal.status, refusal.param) == (400, param)
    assert refusal.body["error"]["type"] == "invalid_request_error"
    assert code is None or refusal.code == code


def test_pictures_belong_to_users() -> None:
    parts = [{"type": "image_url", "image_url": {"url": PIXEL}}]
    assert fault(ChatRequest, GOOD | {"messages": [{"role": "assistant", "content": parts}]}).param == "messages.0"


@pytest.mark.parametrize("times_s", [[1.0, 1.0], [2.0, 1.0], [-1.0], [float("inf")], []])
def test_frames_must_come_in_time_order(times_s: list[float]) -> None:
    frames = [{"time_s": time_s, "image": PIXEL} for time_s in times_s]
    assert fault(FramesRequest, {"frames": frames}).param in ("frames", "frames.0.time_s")


def test_a_question_has_words() -> None:
    assert fault(QuestionRequest, {"question": " \n"}).param == "question"
