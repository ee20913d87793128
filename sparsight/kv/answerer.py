"""A question in, an answer and its evidence out: the model attends to the blocks that each layer asks for.

One pass over the prompt does it all: when a layer's queries of the question are known, that layer scores every block,
fetches the best, and attends to [sink, blocks in time order, prompt] at contiguous positions; the next layer's queries
already contain what this one found. Then greedy decoding goes on over the same context. Fetched keys are rotated once.
ReKV as published has two passes instead, one over the bare question to retrieve; `two_pass` does that.
A question changes nothing in the bank, and two questions know nothing of each other. The answerer has never seen the
frames: all it needs is in the bank.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparsight.errors import LostBlockError, StreamError
from sparsight.kv.attention import KvTextModel, attend
from sparsight.kv.bank import BlockBank, BlockIndex
from sparsight.kv.retrieve import Retriever


@dataclass(frozen=True)
class LayerEvidence:
    """The blocks that one layer attended to, in time order: number, times, score, rank among all blocks (0 = best)."""

    numbers: tuple[int, ...]
    spans_s: tuple[tuple[float, float], ...]
    scores: tuple[float, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Moment:
    """One block's part in an answer: `weight` is the mean over the layers of 1 / (1 + rank), 0 where it was not taken;
    `score` is its mean score in the layers that took it."""

    number: int
    start_s: float
    end_s: float
    weight: float
    score: float


@dataclass(frozen=True)
class Answer:
    """Generated ids (a stop id is not among them), why generation ended, and what every layer looked at."""

    ids: tuple[int, ...]
    finish: Literal["stop", "length"]
    evidence: tuple[LayerEvidence, ...]

    def moments(self) -> tuple[Moment, ...]:
        """The moments of the stream that the answer rests on, over all layers, most important first.

        Layers differ in the scale of their scores, so they are combined by rank (reciprocal rank fusion).
        """
        return moments_of(self.evidence)


class StreamAnswerer:
    """Answers questions about any stream whose blocks the same model has made.

    `head` is the model's language-model head. `after_frames_SD` are embeddings that the model was trained to see
    between the last frame and the prompt (LLaVA-OneVision's `image_newline`). `never_ids` are never predicted: the
    placeholder that stands for a picture.
    """

    def __init__(
        self,
        model: KvTextModel,
        head: nn.Module,
        after_frames_SD: Tensor | None = None,
        never_ids: Collection[int] = (),
    ) -> None:
        self._model = model
        self._head = head
        self._never_ids = list(never_ids)
        self._after_frames_SD = model.embed(torch.empty(0, dtype=torch.long))
        if after_frames_SD is not None:
            self._after_frames_SD = after_frames_SD.detach().to(model.device, model.dtype)

    def ask(
        self,
        bank: BlockBank,
        prompt_ids_T: Tensor,
        retriever: Retriever,
        *,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        question: slice = slice(None),
        until_s: float | None = None,
        two_pass: bool = False,
        on_token: Callable[[int], None] | None = None,
    ) -> Answer:
        """Answer greedily; `on_token` hears every generated id at once. The other arguments are those of `begin`."""
        turn = self.begin(
            bank,
            prompt_ids_T,
            retriever,
            room_tokens=max_new_tokens,
            question=question,
            until_s=until_s,
            two_pass=two_pass,
        )
        ids: list[int] = []
        while len(ids) < max_new_tokens:
            token = int(turn.logits_V.argmax())
            if token in stop_ids:
                return Answer(tuple(ids), "stop", turn.evidence)
            ids.append(token)
            if on_token is not None:
                on_token(token)
            if len(ids) < max_new_tokens:
                turn.step(token)
        return Answer(tuple(ids), "length", turn.evidence)

    def begin(
        self,
        bank: BlockBank,
        prompt_ids_T: Tensor,
        retriever: Retriever,
        *,
        room_tokens: int,
        question: slice = slice(None),
        until_s: float | None = None,
        two_pass: bool = False,
    ) -> "Turn":
        """Retrieve and read the prompt: everything that follows the frames in the chat template.

        `question` says which of its tokens are the question, whose mean query retrieves (the template's own words would
        dilute it). With `two_pass`, the question is read alone first and retrieves; then the prompt is read over what
        was found. `until_s` hides the blocks that end later. At most `room_tokens` tokens can be stepped afterwards.
        A block that turns out lost is left out: the question is read again without it. Raises `StreamError` without a
        block or a question token, or for a context longer than the model's.
        """
        while True:
            try:
                return self._begin(bank, prompt_ids_T, retriever, room_tokens, question, until_s, two_pass)
            except LostBlockError:
                continue  # the bank's index is shorter now

    def _begin(
        self,
        bank: BlockBank,
        prompt_ids_T: Tensor,
        retriever: Retriever,
        room_tokens: int,
        question: slice,
        until_s: float | None,
        two_pass: bool,
    ) -> "Turn":
        index = bank.index() if until_s is None else bank.index().until(until_s)
        if len(index) == 0:
            raise StreamError("the stream has no frame to answer from: send frames first, or ask about a later time.")
        question_tokens = range(prompt_ids_T.shape[0])[question]
        if len(question_tokens) == 0:
            raise StreamError(f"{question} of a prompt of {prompt_ids_T.shape[0]} tokens holds no question.")
        prompt_TD = torch.cat((self._after_frames_SD, self._model.embed(prompt_ids_T)))
        rows_T = torch.tensor(question_tokens, device=self._model.device)
        room_tokens += prompt_TD.shape[0]
        if two_pass:
            recall = _Recall(self._model, bank, index, retriever, rows_T - question_tokens[0], room_tokens)
            self._model.run(self._model.embed(prompt_ids_T[question]), recall)
            recall.forget_the_question()
        else:
            rows_T += self._after_frames_SD.shape[0]
            recall = _Recall(self._model, bank, index, retriever, rows_T, room_tokens)
        return Turn(self._model, self._head, recall, prompt_TD, self._never_ids)


class Turn:
    """One question being answered: `logits_V` predict the next token, `step` appends one."""

    def __init__(
        self, model: KvTextModel, head: nn.Module, recall: "_Recall", prompt_TD: Tensor, never_ids: list[int]
    ) -> None:
        self._model = model
        self._head = head
        self._recall = recall
        self._never_ids = never_ids
        self.logits_V = self._next_logits(prompt_TD)

    @property
    def evidence(self) -> tuple[LayerEvidence, ...]:
        return tuple(self._recall.evidence)

    def step(self, token: int) -> None:
        """Append a token of the answer."""
        self.logits_V = self._next_logits(self._model.embed(torch.tensor([token])))

    def _next_logits(self, embeds_TD: Tensor) -> Tensor:
        hidden_TD = self._model.run(embeds_TD, self._recall)
        with torch.no_grad():
            logits_V = self._head(hidden_TD[-1])
            logits_V[self._never_ids] = -torch.inf
        return logits_V


class _Recall:
    """A `KvContext`: in the first pass every layer retrieves its blocks; all passes append to what it then holds."""

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
        self._model = model
        self._bank = bank
        self._index = index
        self._retriever = retriever
        self._question_rows_T = question_rows_T
        self._room_tokens = room_tokens
        self._sink_L2GSC = bank.sink.page_L2GSC
        self._contexts: list[_LayerContext] = []

    def attend(self, layer: int, queries_HTC: Tensor, keys_GTC: Tensor, values_GTC: Tensor, scale: float) -> Tensor:
        if layer == len(self._contexts):
            self._contexts.append(self._retrieve(layer, queries_HTC[:, self._question_rows_T]))
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
                f"{self._model.max_tokens}: retrieve fewer blocks or ask for a shorter answer."
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


def moments_of(evidence: Sequence[LayerEvidence]) -> tuple[Moment, ...]:
    """Every block that some layer attended to, most important first; of equals the earlier comes first."""
    spans_s: dict[int, tuple[float, float]] = {}
    scores: dict[int, list[float]] = {}
    weights: dict[int, float] = {}
    for layer in evidence:
        for number, span_s, score, rank in zip(layer.numbers, layer.spans_s, layer.scores, layer.ranks, strict=True):
            spans_s[number] = span_s
            scores.setdefault(number, []).append(score)
            weights[number] = weights.get(number, 0.0) + 1 / (1 + rank) / len(evidence)
    moments = (
        Moment(number, *spans_s[number], weights[number], sum(scores[number]) / len(scores[number]))
        for number in spans_s
    )
    return tuple(sorted(moments, key=lambda moment: (-moment.weight, moment.number)))
