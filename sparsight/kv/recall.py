"""What one question attends to: the sink, the blocks that each layer picks, and everything read since.

Every layer has a context of its own, since it picks blocks of its own, at contiguous positions; fetched keys are
rotated once. A question's context knows of no other question: several are read side by side (`KvTextModel.run_all`),
and one that cannot go on does not stop the rest. It runs no model and chooses no token. Used by `answerer`.
"""

import torch
from torch import Tensor

from sparsight.errors import StreamError
from sparsight.kv.attention import KvTextModel, attend
from sparsight.kv.bank import BlockBank, BlockIndex
from sparsight.kv.evidence import LayerEvidence
from sparsight.kv.retrieve import Retriever


class Recall:
    """A `KvContext`: in the first pass every layer retrieves its blocks; all passes append to what it then holds.

    `question_rows_T` are the rows of the first pass whose mean query retrieves; at most `room_tokens` tokens may be
    read. A `StreamError` on the way is kept as `error`, because others may share the pass: what comes out for this
    question then means nothing.
    """

    def __init__(
        self,
        model: KvTextModel,
        bank: BlockBank,
        index: BlockIndex,
        retriever: Retriever,
        question_rows_T: Tensor,
        room_tokens: int,
    ) -> None:
        self.evidence: list[LayerEvidence] = []
        self.error: StreamError | None = None
        self._model = model
        self._bank = bank
        self._index = index
        self._retriever = retriever
        self._question_rows_T = question_rows_T
        self._room_tokens = room_tokens
        self._sink_L2GSC = bank.sink.page_L2GSC
        self._contexts: list[_LayerContext] = []

    def attend(self, layer: int, queries_HTC: Tensor, keys_GTC: Tensor, values_GTC: Tensor, scale: float) -> Tensor:
        if self.error is None and layer == len(self._contexts):
            try:
                self._contexts.append(self._retrieve(layer, queries_HTC[:, self._question_rows_T]))
            except StreamError as error:
                self.error = error
        if self.error is not None:
            return torch.zeros_like(queries_HTC)
        context = self._contexts[layer]
        rotary, start, T = self._model.rotary, context.tokens, queries_HTC.shape[1]
        context.append(rotary.rotate(keys_GTC, start), values_GTC)
        causal_TK = None
        if T > 1:
            causal_TK = torch.ones(T, start + T, dtype=torch.bool, device=queries_HTC.device).tril(start)
        return attend(rotary.rotate(queries_HTC, start), context.keys_GKC, context.values_GKC, causal_TK, scale)

    def forget_the_question(self) -> None:
        """Leave every layer what it retrieved, and nothing that was read since."""
        for context in self._contexts:
            context.tokens = context.memory_tokens

    def _retrieve(self, layer: int, question_HTC: Tensor) -> "_LayerContext":
        rows_R, scores_R, ranks_R = self._retriever.select(layer, question_HTC, self._index)
        numbers: list[int] = self._index.numbers_N[rows_R].tolist()
        starts_and_ends: list[list[float]] = self._index.spans_s_N2[rows_R].tolist()
        spans_s = tuple((start_s, end_s) for start_s, end_s in starts_and_ends)
        self.evidence.append(LayerEvidence(tuple(numbers), spans_s, tuple(scores_R.tolist()), tuple(ranks_R.tolist())))
        pages_R2GSC = self._bank.gather(layer, numbers).to(self._model.device)
        R, _, G, S, C = pages_R2GSC.shape
        sink_2GIC = self._sink_L2GSC[layer].to(self._model.device)
        held = sink_2GIC.shape[2] + R * S
        if held + self._room_tokens > self._model.max_tokens:
            raise StreamError(
                f"{R} blocks, the prompt and the answer need {held + self._room_tokens} tokens, the model takes "
                f"{self._model.max_tokens}: retrieve fewer blocks, leave out the oldest earlier turns, or ask for a "
                "shorter answer."
            )
        blocks_2GTC = pages_R2GSC.permute(1, 2, 0, 3, 4).reshape(2, G, R * S, C)
        memory_2GTC = torch.cat((sink_2GIC, blocks_2GTC), dim=2)
        context = _LayerContext(memory_2GTC.new_empty(2, G, held + self._room_tokens, C))
        context.append(self._model.rotary.rotate(memory_2GTC[0], 0), memory_2GTC[1])
        context.memory_tokens = held
        return context


class _LayerContext:
    """Rotated keys, and values, of everything one layer attends to, in a buffer that has room for the answer."""

    def __init__(self, buffer_2GKC: Tensor) -> None:
        self._buffer_2GKC = buffer_2GKC
        self.tokens = 0
        self.memory_tokens = 0  # of them, those that were retrieved

    @property
    def keys_GKC(self) -> Tensor:
        return self._buffer_2GKC[0, :, : self.tokens]

    @property
    def values_GKC(self) -> Tensor:
        return self._buffer_2GKC[1, :, : self.tokens]

    def append(self, keys_GTC: Tensor, values_GTC: Tensor) -> None:
        end = self.tokens + keys_GTC.shape[1]
        assert end <= self._buffer_2GKC.shape[2], "more tokens than the turn has room for"
        self._buffer_2GKC[0, :, self.tokens : end] = keys_GTC
        self._buffer_2GKC[1, :, self.tokens : end] = values_GTC
        self.tokens = end
