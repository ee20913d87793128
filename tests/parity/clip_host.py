"""A tiny model that watches clips: bytes to blocks frame by frame, and the same blocks from pictures taken directly."""

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsight.config import ArchitectureConfig
from sparsight.kv.answerer import Answer, StreamAnswerer, Turn
from sparsight.kv.attention import KvTextModel
from sparsight.kv.bank import BlockBank
from sparsight.kv.block import KvBlock
from sparsight.kv.encoder import StreamEncoder, encode_sink
from sparsight.kv.reference import full_attention_answer, full_attention_logits
from sparsight.kv.retrieve import BestAndRecent
from sparsight.media.pixels import to_pixels
from sparsight.media.video import read_video
from sparsight.model.tiny import make_dense, make_tokenizer

ARCHITECTURE = ArchitectureConfig(
    picture_pixels=32,
    tower_layers=1,
    tower_width=32,
    tower_heads=1,
    text_layers=2,
    text_width=64,
    text_heads=4,
    text_key_value_heads=2,
    text_intermediate=96,
    initializer_range=0.2,
    max_positions=1024,
)
QUESTION = "what shape is in the image?"
WINDOW_TOKENS = 400
NEW_TOKENS = 6
TimedPictures = Sequence[tuple[float, Any]]


class ClipHost:
    """A frame is an instant: its block begins and ends when it is shown."""

    def __init__(self) -> None:
        self.model = make_dense(ARCHITECTURE, make_tokenizer([QUESTION] * 20, 400), seed=0)
        self._kv_model = KvTextModel(self.model.model.model.language_model)
        self._prompt = self.model.chat.frames_prompt(QUESTION)
        self._head = self.model.model.get_output_embeddings()
        self._answerer = StreamAnswerer(self._kv_model, self._head, self.model.newline_D[None])
        self.sink = encode_sink(self._kv_model, torch.tensor(self._prompt.before_ids))

    def encoder(self) -> StreamEncoder:
        return StreamEncoder(self._kv_model, self.sink, WINDOW_TOKENS)

    def watch(self, encoder: StreamEncoder, bank: BlockBank, data: bytes, rate: float, start_s: float = 0.0) -> None:
        """A clip that begins at `start_s` of the stream, each frame kept before the next is read."""
        for frame in read_video(io.BytesIO(data), rate):
            time_s = start_s + frame.time_s
            for block in encoder.encode(self._embeds([frame.picture]), [(time_s, time_s)]):
                bank.put(block)

    def blocks_of(self, pictures: TimedPictures) -> list[KvBlock]:
        """The slow twin: the blocks of pictures that are all there, one after the other."""
        encoder = self.encoder()
        return [
            block
            for time_s, picture in pictures
            for block in encoder.encode(self._embeds([picture]), [(time_s, time_s)])
        ]

    def ask(self, bank: BlockBank, retriever: BestAndRecent, until_s: float | None = None) -> Answer:
        ids_T, question = torch.tensor(self._prompt.after_ids), self._prompt.question
        return self._answerer.ask(bank, ids_T, retriever, max_new_tokens=NEW_TOKENS, question=question, until_s=until_s)

    def begin(self, bank: BlockBank, retriever: BestAndRecent) -> Turn:
        ids_T, question = torch.tensor(self._prompt.after_ids), self._prompt.question
        return self._answerer.begin(bank, ids_T, retriever, question=question, room_tokens=0)

    def full_attention(self, pictures: TimedPictures) -> tuple[Tensor, tuple[int, ...]]:
        """Next-token logits [V] and answer of the stock model, which sees every frame, the newline and the prompt."""
        frames_FSD = self._embeds([picture for _, picture in pictures])
        clip_1SD = torch.cat((frames_FSD.flatten(0, 1), self.model.newline_D.detach()[None]))[None]
        before_T, after_T = torch.tensor(self._prompt.before_ids), torch.tensor(self._prompt.after_ids)
        text_model = self.model.model.model.language_model
        logits_TV = full_attention_logits(text_model, self._head, before_T, clip_1SD, after_T)
        ids = full_attention_answer(text_model, self._head, before_T, clip_1SD, after_T, NEW_TOKENS)
        return logits_TV[-1], ids

    def _embeds(self, pictures: Sequence[Any]) -> Tensor:
        with torch.no_grad():
            return self.model.frame_embeds(self.model.features(to_pixels(pictures, self.model.pixels)))
