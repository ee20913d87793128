"""`/v1/models` and `/v1/chat/completions`: OpenAI's JSON around the chat replicas.

Whole answers or server-sent events. Nothing is sent before the first event of an answer, so a refusal always has its
own status. Mounted by `ingress`.
"""

import json
from collections.abc import AsyncIterator
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from serve_apps.faults import Faults
from serve_apps.refusals import Refusal, RequestRefusedError
from serve_apps.requests import check_model, read
from serve_apps.schemas import ChatRequest, ChatResponse
from serve_apps.student import Piece
from serve_apps.student_app import ChatEvent, Started

BATCH_HEADER = "x-sparsight-batch"
"""Response header: how many requests were decoded together with this one, itself included."""


def chat_routes(student: Any, model: str, created: int, faults: Faults) -> APIRouter:
    """`student` is the handle of the chat replicas."""
    router = APIRouter()
    card = {"id": model, "object": "model", "created": created, "owned_by": "sparsight"}

    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    async def one_model(name: str) -> dict[str, Any]:
        check_model(name, model)
        return card

    async def complete(request: Request) -> Response:
        chat = await read(request, ChatRequest)
        check_model(chat.model, model)
        events = cast(AsyncIterator[ChatEvent], student.answer.remote(chat))
        started = await anext(events)
        if isinstance(started, Refusal):
            raise RequestRefusedError(started)
        assert isinstance(started, Started)
        headers = {BATCH_HEADER: str(started.batch_requests)}
        response = ChatResponse(model)
        if chat.stream:
            include_usage = chat.stream_options is not None and chat.stream_options.include_usage
            lines = faults.end_stream_in_shape(_lines(events, started, response, include_usage))
            return StreamingResponse(lines, media_type="text/event-stream", headers=headers)
        piece = await anext(events)
        assert isinstance(piece, Piece)
        assert piece.finish is not None
        whole = response.whole(piece.text, piece.finish, started.prompt_tokens, piece.completion_tokens)
        return JSONResponse(whole, headers=headers)

    router.add_api_route("/v1/models", models, methods=["GET"])
    router.add_api_route("/v1/models/{name:path}", one_model, methods=["GET"])
    router.add_api_route("/v1/chat/completions", complete, methods=["POST"])
    return router


async def _lines(
    events: AsyncIterator[ChatEvent], started: Started, response: ChatResponse, include_usage: bool
) -> AsyncIterator[str]:
    yield line(response.chunk({"role": "assistant", "content": ""}))
    tokens = 0
    async for piece in events:
        assert isinstance(piece, Piece)
        if piece.text:
            yield line(response.chunk({"content": piece.text}))
        if piece.finish:
            yield line(response.chunk({}, piece.finish))
        tokens = piece.completion_tokens
    if include_usage:
        yield line(response.usage_chunk(started.prompt_tokens, tokens))
    yield "data: [DONE]\n\n"


def line(value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
