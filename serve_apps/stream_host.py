"""Streams on one model: frames become blocks, questions are answered from blocks.

`FrameEncoder` and `QuestionAnswerer` know nothing of each other and share only what the banks hold: they may live in
different processes. The encoder's own state can be lost at any time, it is made again from the newest blocks. Plain
classes: no Ray, no HTTP. Wrapped by `stream_app`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from serve_apps.refusals import bad_request
from sparsight.config import StreamConfig
from sparsight.errors import ConfigError
from sparsight.kv.answerer import Answer, StreamAnswerer
from sparsight.kv.attention import KvTextModel
from sparsight.kv.bank import BlockBank
from sparsight.kv.block import KvBlock
from sparsight.kv.encoder import StreamEncoder, encode_sink
from sparsight.kv.retrieve import BestAndRecent
from sparsight.media.pixels import to_pixels
from sparsight.model.vision_language import VisionLanguageModel


@dataclass(frozen=True)
class StreamAnswer:
    """An answer's text, what it rests on, and how many tokens its prompt had in every layer, frames included."""

    text: str
    answer: Answer
    prompt_tokens: int


class FrameEncoder:
    """Encodes the frames of any number of streams; every stream begins with the same system prompt, its `sink`."""

    def __init__(self, model: VisionLanguageModel, kv_model: KvTextModel, config: StreamConfig) -> None:
        self._model = model
        self._kv_model = kv_model
        self._window_tokens = config.window_tokens
        self._encoders: dict[str, tuple[StreamEncoder, int]] = {}
        self.sink = encode_sink(kv_model, torch.tensor(model.chat.frames_prompt("?").before_ids))
        StreamEncoder(kv_model, self.sink, self._window_tokens)  # says now whether the window is possible

    @property
    def window_tokens(self) -> int:
        return self._window_tokens

    def knows(self, stream_id: str, frames: int) -> bool:
        """Whether it can go on after so many frames as it is; else `restore` it first."""
        return stream_id in self._encoders and self._encoders[stream_id][1] == frames

    def restore(self, stream_id: str, newest: Sequence[KvBlock]) -> None:
        """Take up a stream after its newest blocks: a window's worth or all of them."""
        frames = newest[-1].number + 1 if newest else 0
        encoder = StreamEncoder(self._kv_model, self.sink, self._window_tokens, newest)
        self._encoders[stream_id] = (encoder, frames)

    def forget(self, stream_id: str) -> None:
        self._encoders.pop(stream_id, None)

    def encode(self, stream_id: str, pictures: Sequence[Image.Image], times_s: Sequence[float]) -> list[KvBlock]:
        """The blocks of the next frames. A frame is an instant: its span begins and ends at its time."""
        encoder, frames = self._encoders[stream_id]
        with torch.inference_mode():
            features_FPD = self._model.features(to_pixels(pictures, self._model.pixels))
            embeds_FSD = self._model.frame_embeds(features_FPD)
        blocks = encoder.encode(embeds_FSD, [(time_s, time_s) for time_s in times_s])
        self._encoders[stream_id] = (encoder, frames + len(blocks))
        return blocks


class QuestionAnswerer:
    """Answers questions from a bank alone; it never sees a frame. Each question stands by itself."""

    def __init__(self, model: VisionLanguageModel, kv_model: KvTextModel, config: StreamConfig) -> None:
        if config.recent_blocks > config.retrieve_blocks:
            raise ConfigError(
                f"serve.stream: {config.recent_blocks} recent_blocks are more than {config.retrieve_blocks} "
                "retrieve_blocks, of which they are a part"
            )
        self._chat = model.chat
        self._visual_tokens = model.visual_tokens
        self._max_tokens = kv_model.max_tokens
        self._retriever = BestAndRecent(
            config.retrieve_blocks - config.recent_blocks, config.recent_blocks, config.score
        )
        head = model.model.get_output_embeddings()
        self._answerer = StreamAnswerer(
            kv_model,
            head,
            after_frames_SD=model.newline_D.detach()[None],
            never_ids=(model.chat.visual_id,),  # nobody can write a picture
        )

    def ask(self, bank: BlockBank, question: str, max_tokens: int, until_s: float | None = None) -> "StreamAnswer":
        """Greedy answer in at most `max_tokens` tokens. Raises `RequestRefusedError` or `StreamError`."""
        prompt = self._chat.frames_prompt(question)
        if len(prompt.after_ids) + max_tokens >= self._max_tokens:
            message = f"the question takes {len(prompt.after_ids)} tokens: too many for the model's {self._max_tokens}"
            raise bad_request(message, "context_length_exceeded", "question")
        answer = self._answerer.ask(
            bank,
            torch.tensor(prompt.after_ids),
            self._retriever,
            max_new_tokens=max_tokens,
            stop_ids=(self._chat.end_id,),
            question=prompt.question,
            until_s=until_s,
        )
        visual_tokens = self._visual_tokens(len(answer.evidence[0].numbers))
        text_tokens = len(prompt.before_ids) + len(prompt.after_ids)
        return StreamAnswer(self._chat.decode(answer.ids), answer, text_tokens + visual_tokens)
