"""Chats in, answers out: several at once in one batch, token by token.

`prepare` does everything that can be refused, for one request alone, so that a bad request never reaches a batch;
`answer` decodes a batch of prepared ones. Plain class: no Ray, no HTTP. Wrapped by `student_app`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jinja2 import TemplateError
from torch import Tensor

from serve_apps.answer_text import AnswerText
from serve_apps.pictures import PictureLimits, load_picture
from serve_apps.refusals import bad_request
from serve_apps.schemas import ChatMessage, ChatRequest
from sparsight.config import ServeConfig
from sparsight.errors import DataError
from sparsight.media.chat import Message
from sparsight.media.pixels import to_pixels
from sparsight.model.decode import BatchDecoder
from sparsight.model.sampling import SamplingSettings, TokenChooser
from sparsight.model.vision_language import VisionLanguageModel

COLDEST = 1e-3
"""Below this temperature sampling is greedy in all but name, and its logits would overflow."""


@dataclass(frozen=True)
class PreparedChat:
    """A chat as the model reads it; `pixels_NCHW` holds its pictures in reading order."""

    prompt_ids: list[int]
    pixels_NCHW: Tensor | None
    answer_tokens: int
    sampling: SamplingSettings
    stops: tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """What one decoding step added to an answer; `finish` is set on its last piece."""

    text: str
    completion_tokens: int
    finish: Literal["stop", "length"] | None = None


class StudentAnswerer:
    """Answers chats with one model. Every picture is a clip of one frame, as in training."""

    def __init__(self, model: VisionLanguageModel, config: ServeConfig) -> None:
        self._model = model
        self._config = config
        self._limits = PictureLimits.of(config)
        self._positions = int(model.model.config.text_config.max_position_embeddings)

    def prepare(self, request: ChatRequest) -> PreparedChat:
        """Check and tokenize a request, and decode its pictures. Raises `RequestRefusedError`."""
        urls = _picture_urls(request)
        if len(urls) > self._config.max_pictures:
            message = f"the request holds {len(urls)} pictures, the limit is {self._config.max_pictures}"
            raise bad_request(message, "too_many_images", "messages")
        messages = [self._message(message) for message in request.messages]
        try:
            ids = self._model.chat.prompt(messages, [self._model.visual_tokens()] * len(urls))
        except (TemplateError, DataError) as error:
            message = f"the model's chat template does not take this conversation: {error}"
            raise bad_request(message, "invalid_messages", "messages") from None
        room = self._positions - len(ids)
        if room < 1:
            message = f"the messages take {len(ids)} tokens, the model takes {self._positions} with its answer"
            raise bad_request(message, "context_length_exceeded", "messages")
        pictures = [load_picture(url, self._limits, param) for param, url in urls]
        pixels_NCHW = to_pixels(pictures, self._model.pixels) if pictures else None
        wanted = request.answer_tokens or self._config.max_answer_tokens
        limit = min(wanted, self._config.max_answer_tokens, room)
        return PreparedChat(ids, pixels_NCHW, limit, _sampling(request), tuple(request.stop or ()))

    def answer(self, chats: Sequence[PreparedChat]) -> Iterator[list[Piece | None]]:
        """Decode a batch: each step yields one entry a chat, its next piece or None once it has ended."""
        decoder = BatchDecoder(self._model, len(chats))
        decoder.feed([chat.prompt_ids for chat in chats], self._visual_ND(chats))
        choose = TokenChooser([chat.sampling for chat in chats])
        texts = [AnswerText(self._model.chat, chat.stops) for chat in chats]
        active = [True] * len(chats)
        while any(active):
            chosen = choose(decoder.logits_BV)
            pieces: list[Piece | None] = [None] * len(chats)
            fed: list[list[int]] = [[] for _ in chats]
            for row, chat in enumerate(chats):
                if active[row]:
                    pieces[row] = piece = self._step(texts[row], chosen[row], chat.answer_tokens)
                    active[row] = piece.finish is None
                    fed[row] = [chosen[row]] if active[row] else []
            yield pieces
            decoder.feed(fed)

    def _step(self, text: AnswerText, token: int, limit: int) -> Piece:
        if token == self._model.chat.end_id:
            return Piece(text.finish(), text.tokens, "stop")
        added = text.add(token)
        if text.stopped:
            return Piece(added, text.tokens, "stop")
        if text.tokens >= limit:
            return Piece(added + text.finish(), text.tokens, "length")
        return Piece(added, text.tokens)

    @torch.inference_mode()
    def _visual_ND(self, chats: Sequence[PreparedChat]) -> Tensor | None:
        pixels = [chat.pixels_NCHW for chat in chats if chat.pixels_NCHW is not None]
        if not pixels:
            return None
        features_NPD = self._model.features(torch.cat(pixels))
        return self._model.clip_embeds(features_NPD[:, None]).flatten(0, 1)

    def _message(self, message: ChatMessage) -> Message:
        """In the checkpoint's form: pictures first, as in training, then the text, unable to forge turns."""
        role = "system" if message.role == "developer" else message.role
        pictures: list[Message] = [{"type": "video"} for part in message.content if part.type == "image_url"]
        text = "\n".join(part.text for part in message.content if part.text is not None)
        return {"role": role, "content": [*pictures, {"type": "text", "text": self._model.chat.plain(text)}]}


def _picture_urls(request: ChatRequest) -> list[tuple[str, str]]:
    """Where each picture stands in the request, and its URL, in reading order."""
    return [
        (f"messages.{index}.content.{place}.image_url", part.image_url.url)
        for index, message in enumerate(request.messages)
        for place, part in enumerate(message.content)
        if part.image_url is not None
    ]


def _sampling(request: ChatRequest) -> SamplingSettings:
    temperature = request.temperature or 0.0
    top_p = 1.0 if request.top_p is None else request.top_p
    return SamplingSettings(temperature if temperature >= COLDEST else 0.0, top_p, request.seed)
