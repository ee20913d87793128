"""Streams on one model: frames become blocks, questions are answered from blocks.

`FrameEncoder` and `QuestionAnswerer` know nothing of each other and share only what the banks hold: they may live in
different processes. The encoder's own state can be lost at any time, it is made again from the newest blocks. Plain
classes: no Ray, no HTTP. Wrapped by `stream_app`.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
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
        self._most = config.max_streams
        self._encoders: OrderedDict[str, tuple[StreamEncoder, int]] = OrderedDict()  # and how many frames each has had
        self.sink = encode_sink(kv_model, torch.tensor(model.chat.frames_prompt("?").before_ids))
        StreamEncoder(kv_model, self.sink, self._window_tokens)  # says now whether the window is possible

    def forget(self, stream_id: str) -> None:
        self._encoders.pop(stream_id, None)

    def encode(
        self,
        stream_id: str,
        frames: int,
        newest: Callable[[int], Sequence[KvBlock]],
        pictures: Sequence[Image.Image],
        times_s: Sequence[float],
    ) -> list[KvBlock]:
        """The blocks of the next pictures, after `frames` frames. A frame is an instant: its span is its time, twice.

        Where this encoder has not had just these frames itself, `newest` is asked for the newest blocks that hold a
        window's tokens together. Raises `StreamError`. Not for one stream in two threads at once.
        """
        encoder, had = self._encoders.pop(stream_id, (None, 0))
        if encoder is None or had != frames:
            encoder = StreamEncoder(self._kv_model, self.sink, self._window_tokens, newest(self._window_tokens))
        with torch.inference_mode():
            features_FPD = self._model.features(to_pixels(pictures, self._model.pixels))
            embeds_FSD = self._model.frame_embeds(features_FPD)
        blocks = encoder.encode(embeds_FSD, [(time_s, time_s) for time_s in times_s])
        self._encoders[stream_id] = (encoder, frames + len(blocks))
        if len(self._encoders) > self._most:  # streams that ended while nobody told this one
            self._encoders.popitem(last=False)
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
        self._room_tokens = kv_model.max_tokens - model.visual_tokens(config.retrieve_blocks)
        shortest = model.chat.frames_prompt("?")
        if self._room_tokens < len(shortest.before_ids) + len(shortest.after_ids) + 1:
            raise ConfigError(
                f"serve.stream: {config.retrieve_blocks} retrieve_blocks take "
                f"{model.visual_tokens(config.retrieve_blocks)} tokens, and the model takes {kv_model.max_tokens}: a "
                "question and its answer need room, too, so ask for fewer"
            )
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
        """Greedy answer in at most `max_tokens` tokens, fewer where frames and prompt leave no more. Raises
        `RequestRefusedError` or `StreamError`."""
        prompt = self._chat.frames_prompt(question)
        text_tokens = len(prompt.before_ids) + len(prompt.after_ids)
        room_tokens = self._room_tokens - text_tokens
        if room_tokens < 1:
            message = f"the prompt takes {text_tokens} tokens; beside the frames the model takes {self._room_tokens}"
            raise bad_request(message, "context_length_exceeded", "question")
        answer = self._answerer.ask(
            bank,
            torch.tensor(prompt.after_ids),
            self._retriever,
            max_new_tokens=min(max_tokens, room_tokens),
            stop_ids=(self._chat.end_id,),
            question=prompt.question,
            until_s=until_s,
        )
        visual_tokens = self._visual_tokens(len(answer.evidence[0].numbers))
        return StreamAnswer(self._chat.decode(answer.ids), answer, text_tokens + visual_tokens)
