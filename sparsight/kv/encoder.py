"""Frames in, blocks out: each frame runs through the text model once, inside a sliding window.

A token sees the tokens less than `window_tokens` before it, and always the system prompt (the sink). A sink token that
has left the window is seen as if it stood at the window's far edge (ReKV's rule), and never twice; so while the stream
is shorter than the window this is plain full attention. What a token sees depends on its place in the stream only, not
on how frames are grouped into calls.
The encoder keeps the window, which is the tail of its own blocks, and nothing else: it neither stores blocks nor
answers, and never evaluates the language-model head. One encoder serves one stream; frames of several streams may
go through the model side by side (`StreamEncoder.encode_all`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsight.errors import LostBlockError, StreamError
from sparsight.kv.attention import KvTextModel, attend
from sparsight.kv.bank import BlockBank
from sparsight.kv.block import SINK_NUMBER, KvBlock
from sparsight.kv.page import Encoding


def encode_sink(model: KvTextModel, ids_T: Tensor) -> KvBlock:
    """The block of the system prompt: everything that stands before the first frame in the model's chat template.

    It depends on the model and the ids only, so the streams of a process may share it.
    """
    tokens = ids_T.shape[0]
    if tokens == 0:
        raise StreamError("a stream needs at least one token before its first frame: give the system prompt's ids.")
    nothing = model.empty_page(0)
    step = _WindowPass(model, nothing, tokens, list(nothing), 0, [model.empty_page(tokens)])
    model.run(model.embed(ids_T), step)
    return KvBlock.from_page(SINK_NUMBER, 0.0, 0.0, step.pages_L2GSC[0])


class StreamEncoder:
    """One stream's encoder.

    `window_tokens` bounds what a token sees and what is kept: that many tokens' keys and values, beside the sink's.
    `blocks` are what an earlier encoder of the same stream made, all of them or its newest `window_tokens` tokens'
    worth: this encoder goes on after them, from plain pages to the same numbers.
    `encoding` is how the blocks' pages are kept; the window itself is never quantised.
    Raises `StreamError` if the window has no room beside the sink or is longer than the model's longest context, or if
    `blocks` leave a gap in it.
    """

    def __init__(
        self,
        model: KvTextModel,
        sink: KvBlock,
        window_tokens: int,
        blocks: Sequence[KvBlock] = (),
        encoding: Encoding = "plain",
    ) -> None:
        if not sink.tokens < window_tokens <= model.max_tokens:
            raise StreamError(
                f"a window of {window_tokens} tokens is impossible beside a system prompt of {sink.tokens} in a model "
                f"that takes {model.max_tokens}: choose one between them."
            )
        self._model = model
        self._window_tokens = window_tokens
        self._encoding: Encoding = encoding
        self._sink_L2GSC = sink.page_L2GSC.to(model.device)
        self._kept_L2GWC = list(self._sink_L2GSC)
        self._seen_tokens = sink.tokens
        self._next_number = 0
        self._frame_tokens: int | None = None
        self._last_start_s = -math.inf
        if blocks:
            self._continue_after(blocks)

    @classmethod
    def after(
        cls, model: KvTextModel, bank: BlockBank, window_tokens: int, encoding: Encoding = "plain"
    ) -> "StreamEncoder":
        """The encoder that goes on where a bank's stream ends, also behind a block that is lost.

        Where one of the window's blocks is lost, the window begins after it: the next frames see less than they would
        have seen, and the system prompt as if it had left the window.
        """
        encoder = cls(model, bank.sink, window_tokens, encoding=encoding)
        known: set[int] = set(bank.index().numbers_N.tolist())
        blocks: list[KvBlock] = []
        number = bank.next_number - 1
        while number in known and sum(block.tokens for block in blocks) < window_tokens:
            try:
                blocks.insert(0, bank.get(number))
            except LostBlockError:
                break
            number -= 1
        if bank.next_number > 0:
            encoder._take_up(blocks, bank.next_number)
        return encoder

    @property
    def kept_tokens(self) -> int:
        """Tokens in the window now, at most `window_tokens`."""
        return self._kept_L2GWC[0].shape[2]

    def encode(self, visual_embeds_FSD: Tensor, spans_s: Sequence[tuple[float, float]]) -> list[KvBlock]:
        """The blocks of F frames of S projected tokens each; `spans_s` are their (start, end) times in seconds.

        Raises `StreamError` for times that run backwards, tokens of another width, or frames of another size than the
        stream's; then nothing has changed.
        """
        [blocks] = self.encode_all([StreamFrames(self, visual_embeds_FSD, spans_s)])
        if isinstance(blocks, StreamError):
            raise blocks
        return blocks

    @staticmethod
    def encode_all(batch: Sequence["StreamFrames"]) -> list[list[KvBlock] | StreamError]:
        """The blocks of several streams' next frames, in one pass: one entry a stream, all streams of one model.

        What `encode` would raise is a stream's own result; the others are as if it had not been there.
        """
        encoders = [frames.encoder for frames in batch]
        assert len(set(encoders)) == len(batch), "a stream's frames come one entry after the other"
        steps: list[_WindowPass | StreamError] = []
        for frames in batch:
            try:
                steps.append(frames.encoder._begin(frames))
            except StreamError as error:
                steps.append(error)
        going = [(frames, step) for frames, step in zip(batch, steps, strict=True) if isinstance(step, _WindowPass)]
        if going:
            model = encoders[0]._model
            assert all(encoder._model is model for encoder in encoders), "a batch goes through one model"
            embeds = [frames.visual_embeds_FSD.flatten(0, 1) for frames, _ in going]
            model.run_all(embeds, [step for _, step in going])
        return [
            step if isinstance(step, StreamError) else frames.encoder._finish(frames, step)
            for frames, step in zip(batch, steps, strict=True)
        ]

    def _begin(self, frames: "StreamFrames") -> "_WindowPass":
        shape = tuple(frames.visual_embeds_FSD.shape)
        if len(shape) != 3 or 0 in shape or len(frames.spans_s) != shape[0] or shape[2] != self._model.width:
            raise StreamError(
                f"frames of shape {shape} came with {len(frames.spans_s)} time spans, for a text model of width "
                f"{self._model.width}: give [frames, tokens, width] of this model's tokens, and a span a frame."
            )
        if not frames.visual_embeds_FSD.isfinite().all():
            raise StreamError("a frame holds numbers that are not finite, and later frames would see it: leave it out.")
        F, S, _ = shape
        if self._frame_tokens not in (None, S):
            raise StreamError(
                f"a frame of {S} tokens cannot follow frames of {self._frame_tokens}: "
                "encode a stream with one frame size."
            )
        _check_times(self._last_start_s, frames.spans_s)
        pages_L2GSC = [self._model.empty_page(S) for _ in range(F)]
        return _WindowPass(
            self._model, self._sink_L2GSC, self._window_tokens, self._kept_L2GWC, self._seen_tokens, pages_L2GSC
        )

    def _finish(self, frames: "StreamFrames", step: "_WindowPass") -> list[KvBlock]:
        """Take over what the pass has computed: from now on the stream has these frames."""
        F, S, _ = frames.visual_embeds_FSD.shape
        numbers = range(self._next_number, self._next_number + F)
        self._kept_L2GWC = step.kept_L2GWC
        self._frame_tokens = S
        self._seen_tokens += F * S
        self._next_number += F
        self._last_start_s = frames.spans_s[-1][0]
        return [
            KvBlock.from_page(number, start_s, end_s, page, self._encoding)
            for number, (start_s, end_s), page in zip(numbers, frames.spans_s, step.pages_L2GSC, strict=True)
        ]

    def _continue_after(self, blocks: Sequence[KvBlock]) -> None:
        first, last = blocks[0], blocks[-1]
        numbers = [block.number for block in blocks]
        unbroken = numbers == list(range(first.number, last.number + 1))
        if not unbroken or (first.number > 0 and len(blocks) * first.tokens < self._window_tokens):
            raise StreamError(
                f"blocks {numbers} do not fill the stream's window of {self._window_tokens} tokens: give its newest "
                "blocks without a gap, or all of them. Where one is lost, go on with StreamEncoder.after."
            )
        self._take_up(blocks, last.number + 1)

    def _take_up(self, blocks: Sequence[KvBlock], next_number: int) -> None:
        """Go on to `next_number` with unbroken blocks; where they end before it or do not fill the window, some are
        lost."""
        pages = [block.page_L2GSC.to(self._model.device) for block in blocks]
        sink_tokens = self._sink_L2GSC.shape[3]
        if blocks:
            self._frame_tokens = blocks[-1].tokens
            self._last_start_s = blocks[-1].start_s
        if len(blocks) == next_number:
            pages.insert(0, self._sink_L2GSC)
            self._seen_tokens = sink_tokens + next_number * blocks[-1].tokens
        else:
            pages.insert(0, self._sink_L2GSC[..., :0, :])
            self._seen_tokens = sink_tokens + self._window_tokens
        self._kept_L2GWC = list(torch.cat(pages, dim=3)[..., -self._window_tokens :, :])
        self._next_number = next_number


@dataclass(frozen=True, eq=False)
class StreamFrames:
    """The next frames of one stream, for `StreamEncoder.encode_all`; the fields are the arguments of `encode`."""

    encoder: StreamEncoder
    visual_embeds_FSD: Tensor
    spans_s: Sequence[tuple[float, float]]


class _WindowPass:
    """A `KvContext`: one call's frames, attended one after the other inside the window.

    `kept_L2GWC` are each layer's un-rotated keys and values in the window, the newest of `seen_tokens` tokens that came
    before. A pass works on its own copy of that list, so one that fails leaves the encoder as it was.
    """

    def __init__(
        self,
        model: KvTextModel,
        sink_L2GSC: Tensor,
        window_tokens: int,
        kept_L2GWC: list[Tensor],
        seen_tokens: int,
        pages_L2GSC: list[Tensor],
    ) -> None:
        self.pages_L2GSC = pages_L2GSC
        self.kept_L2GWC = list(kept_L2GWC)
        self._rotary = model.rotary
        self._sink_L2GSC = sink_L2GSC
        self._window_tokens = window_tokens
        self._seen_tokens = seen_tokens
        self._masks: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, queries_HTC: Tensor, keys_GTC: Tensor, values_GTC: Tensor, scale: float) -> Tensor:
        S = self.pages_L2GSC[0].shape[3]
        outputs_HSC: list[Tensor] = []
        for f, page_L2GSC in enumerate(self.pages_L2GSC):
            frame = slice(f * S, (f + 1) * S)
            page_L2GSC[layer, 0], page_L2GSC[layer, 1] = keys_GTC[:, frame], values_GTC[:, frame]
            context_2GKC = torch.cat((self.kept_L2GWC[layer], page_L2GSC[layer]), dim=2)
            before = self._seen_tokens + f * S
            outputs_HSC.append(self._attend_frame(layer, queries_HTC[:, frame], context_2GKC, before, scale))
            self.kept_L2GWC[layer] = context_2GKC[:, :, -self._window_tokens :]
        return torch.cat(outputs_HSC, dim=1)

    def _attend_frame(self, layer: int, queries_HSC: Tensor, context_2GKC: Tensor, before: int, scale: float) -> Tensor:
        _, S, C = queries_HSC.shape
        K = context_2GKC.shape[2]
        near_SK, far_SI = self._masks_of(S, K, before)
        near_HSC = self._rotary.rotate(queries_HSC, K - S)
        keys_GKC, values_GKC = self._rotary.rotate(context_2GKC[0], 0), context_2GKC[1]
        if before + S <= self._window_tokens:
            return attend(near_HSC, keys_GKC, values_GKC, near_SK, scale)
        # A sink token beyond the window wants the query at another angle than the window's keys do. The query holds
        # both angles side by side and every key is zero on the half that is not its own: one softmax over all of them.
        # Values are padded to the same width because fused kernels ask for it.
        far_HSC = self._rotary.rotate_all_to(queries_HSC, self._window_tokens - 1)
        sink_keys_GIC, sink_values_GIC = self._sink_L2GSC[layer]
        output = attend(
            torch.cat((near_HSC, far_HSC), dim=2),
            torch.cat((pad(keys_GKC, (0, C)), pad(sink_keys_GIC, (C, 0))), dim=1),
            pad(torch.cat((values_GKC, sink_values_GIC), dim=1), (0, C)),
            torch.cat((near_SK, far_SI), dim=1),
            scale,
        )
        return output[..., :C]

    def _masks_of(self, S: int, K: int, before: int) -> tuple[Tensor, Tensor]:
        """Which of the K newest tokens each of the last S sees, and which sink tokens it sees beyond the window."""
        sink_tokens = self._sink_L2GSC.shape[3]
        before = min(before, self._window_tokens + sink_tokens)  # from there on the whole sink is beyond
        if (K, before) not in self._masks:
            query_S1 = torch.arange(S, device=self._sink_L2GSC.device)[:, None]
            distance_SK = query_S1 + (K - S) - torch.arange(K, device=query_S1.device)
            near_SK = (distance_SK >= 0) & (distance_SK < self._window_tokens)
            distance_SI = query_S1 + before - torch.arange(sink_tokens, device=query_S1.device)
            self._masks[K, before] = near_SK, distance_SI >= self._window_tokens
        return self._masks[K, before]


def _check_times(last_start_s: float, spans_s: Sequence[tuple[float, float]]) -> None:
    for start_s, end_s in spans_s:
        if not last_start_s <= start_s <= end_s < math.inf:
            raise StreamError(
                f"a frame from {start_s:g} to {end_s:g} s cannot follow one that starts at {last_start_s:g} s: "
                "send frames in time order."
            )
        last_start_s = start_s
