"""The chat replica: a Serve shell around `StudentAnswerer` that batches concurrent requests.

A request is prepared alone, then waits a moment for others; a batch is decoded together and every request hears its own
pieces as they come. What cannot be answered comes back as a `Refusal`, first and alone. Deployed by `app`,
called by `chat_routes`.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from ray import serve

from serve_apps.refusals import Refusal, RequestRefusedError
from serve_apps.schemas import ChatRequest
from serve_apps.settings import ServiceSettings, load_student
from serve_apps.student import Piece, PreparedChat, StudentAnswerer


@dataclass(frozen=True)
class Started:
    """First of an answer's events: the prompt's length, and how many requests are decoded together."""

    prompt_tokens: int
    batch_requests: int


ChatEvent = Refusal | Started | Piece


class StudentReplica:
    def __init__(self, settings: ServiceSettings) -> None:
        self._answerer = StudentAnswerer(load_student(settings), settings.serve)
        batched: Any = self._decode
        batched.set_max_batch_size(settings.serve.batch_requests)
        batched.set_batch_wait_timeout_s(settings.serve.batch_wait_s)

    async def answer(self, request: ChatRequest) -> AsyncIterator[ChatEvent]:
        """`Started`, then pieces: each with new text if the request streams, else one with all of it."""
        try:
            chat = await asyncio.to_thread(self._answerer.prepare, request)
        except RequestRefusedError as refused:
            yield refused.refusal
            return
        text = ""
        batched: Any = self._decode
        events: AsyncIterator[Started | Piece] = batched(chat)
        async for event in events:
            if isinstance(event, Started) or (request.stream and (event.text or event.finish)):
                yield event
            elif not request.stream:
                text += event.text
                if event.finish:
                    yield replace(event, text=text)

    @serve.batch()  # pyright: ignore  (its types know methods that return, not generators)
    async def _decode(self, chats: list[PreparedChat]) -> AsyncIterator[list[Started | Piece | type[StopIteration]]]:
        """Serve calls this with the chats of one batch; StopIteration ends the answer of its place."""
        yield [Started(len(chat.prompt_ids), len(chats)) for chat in chats]
        steps = self._answerer.answer(chats)
        while (pieces := await asyncio.to_thread(next, steps, None)) is not None:
            yield [piece or StopIteration for piece in pieces]
