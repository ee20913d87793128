"""`/v1/streams`: open a stream, send it frames, ask about it, close it.

JSON around the stream replica, nothing more. Mounted by `ingress`.
"""

import uuid
from typing import Any, TypeVar

from fastapi import APIRouter, Request

from actors.stream_banks import StreamInfo
from serve_apps.refusals import Refusal, RequestRefusedError
from serve_apps.requests import check_model, read
from serve_apps.schemas import FramesRequest, OpenStreamRequest, QuestionRequest, usage
from serve_apps.stream_host import StreamAnswer

Result = TypeVar("Result")


def stream_routes(streams: Any, model: str) -> APIRouter:
    """`streams` is the handle of the stream replica."""
    router = APIRouter(prefix="/v1/streams")

    async def create(request: Request) -> dict[str, Any]:
        wanted = await read(request, OpenStreamRequest)
        check_model(wanted.model, model)
        return _stream(_accepted(await streams.open.remote()))

    async def every() -> dict[str, Any]:
        return {"object": "list", "data": [_stream(info) for info in _accepted(await streams.list.remote())]}

    async def describe(stream_id: str) -> dict[str, Any]:
        return _stream(_accepted(await streams.describe.remote(stream_id)))

    async def close(stream_id: str) -> dict[str, Any]:
        info = _accepted(await streams.close.remote(stream_id))
        return {"id": info.id, "object": "stream.deleted", "deleted": True}

    async def add_frames(request: Request, stream_id: str) -> dict[str, Any]:
        frames = await read(request, FramesRequest)
        return _stream(_accepted(await streams.add_frames.remote(stream_id, frames)))

    async def ask(request: Request, stream_id: str) -> dict[str, Any]:
        question = await read(request, QuestionRequest)
        return _answer(stream_id, _accepted(await streams.ask.remote(stream_id, question)))

    router.add_api_route("", create, methods=["POST"])
    router.add_api_route("", every, methods=["GET"])
    router.add_api_route("/{stream_id}", describe, methods=["GET"])
    router.add_api_route("/{stream_id}", close, methods=["DELETE"])
    router.add_api_route("/{stream_id}/frames", add_frames, methods=["POST"])
    router.add_api_route("/{stream_id}/questions", ask, methods=["POST"])
    return router


def _accepted(result: Result | Refusal) -> Result:
    if isinstance(result, Refusal):
        raise RequestRefusedError(result)
    return result


def _stream(info: StreamInfo) -> dict[str, Any]:
    span = None if info.span_s is None else {"start_s": info.span_s[0], "end_s": info.span_s[1]}
    return {
        "id": info.id,
        "object": "stream",
        "model": info.model,
        "created": info.created,
        "frames": info.frames,
        "blocks": info.frames,
        "bytes": info.bytes,
        "span": span,
    }


def _answer(stream_id: str, result: StreamAnswer) -> dict[str, Any]:
    """Evidence: the most important moment first; `score` is the blocks' own, `weight` counts its rank in all layers."""
    evidence = [
        {
            "start_s": moment.start_s,
            "end_s": moment.end_s,
            "score": moment.score,
            "weight": moment.weight,
            "block": moment.number,
        }
        for moment in result.answer.moments()
    ]
    return {
        "id": f"answer_{uuid.uuid4().hex}",
        "object": "stream.answer",
        "stream": stream_id,
        "answer": result.text,
        "finish_reason": result.answer.finish,
        "evidence": evidence,
        "usage": usage(result.prompt_tokens, len(result.answer.ids)),
    }
