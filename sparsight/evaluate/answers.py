"""A model sits the test: every question asked alone about its picture, if any, and read once more with its answer.

The first pass generates greedily, as a user would meet the model. The second is teacher-forced: it keeps the hidden
states that predict answer tokens (for agreement with a teacher) and counts what the routers chose. A picture goes
through the tower once, for all its questions. Called by `pipelines.evaluate`; scoring is elsewhere.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from sparsight.data.turns import normalise
from sparsight.media.chat import EncodedChat
from sparsight.media.images import DEFAULT_LIMITS, DecodeLimits, decode
from sparsight.media.pixels import to_pixels
from sparsight.model.decode import BatchDecoder
from sparsight.model.routing import RouterTrace, routers, trace_routers
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import Sample

ExpertCounts = dict[int, dict[str, list[int]]]
"""Routing decisions by sparse layer, then by group of tokens, then by expert."""

Value = TypeVar("Value")

PICTURE_TOKENS, TEXT_TOKENS, ANSWER_TOKENS = "picture tokens", "text tokens", "answers: "


@dataclass(frozen=True)
class Answer:
    """What a model said to one question; `picture` is the content hash of its sample."""

    id: str
    picture: str
    question: str
    reference: str
    answer: str
    answer_type: str

    @property
    def correct(self) -> bool:
        return normalise(self.answer) == normalise(self.reference)


@dataclass
class Examination:
    """What one model did on some questions, in the order of the questions.

    `states_nD` are the hidden states that predict `response_ids_n`, the tokens of all reference answers.
    """

    answers: list[Answer] = field(default_factory=list[Answer])
    states_nD: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    response_ids_n: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    expert_counts: ExpertCounts = field(default_factory=ExpertCounts)


def by_pictures(samples: Iterable[Sample], pictures: int, limit: int | None = None) -> Iterator[list[Sample]]:
    """Samples in pieces of at most so many pictures, so that memory holds one piece; at most `limit` questions."""
    piece: list[Sample] = []
    seen: set[str] = set()
    left = limit
    for sample in samples:
        if left is not None:
            sample = _cut(sample, left)
            left -= len(sample.turns)
        if not sample.turns:
            break
        if len(seen | {sample.content_hash}) > pictures:
            yield piece
            piece, seen = [], set()
        piece.append(sample)
        seen.add(sample.content_hash)
    if piece:
        yield piece


def _cut(sample: Sample, turns: int) -> Sample:
    return replace(sample, turns=sample.turns[:turns])


def join(parts: Sequence[Examination]) -> Examination:
    """Examinations of one model on several pieces as one."""
    whole = Examination(
        answers=[answer for part in parts for answer in part.answers],
        states_nD=np.concatenate([part.states_nD for part in parts]),
        response_ids_n=np.concatenate([part.response_ids_n for part in parts]),
    )
    for part in parts:
        for layer, groups in part.expert_counts.items():
            for group, counts in groups.items():
                _add(whole.expert_counts, layer, group, counts)
    return whole


def _add(into: ExpertCounts, layer: int, group: str, counts: Sequence[int]) -> None:
    groups = into.setdefault(layer, {})
    before = groups.get(group, [0] * len(counts))
    groups[group] = [one + other for one, other in zip(before, counts, strict=True)]


@dataclass(frozen=True)
class _Item:
    """One question, encoded with its reference answer; `visual_TD` are its picture's tokens, none for text alone."""

    answer_type: str
    chat: EncodedChat
    visual_TD: torch.Tensor

    @property
    def prompt(self) -> list[int]:
        return self.chat.input_ids[: self.chat.answer_spans[0][0]]


class Examiner:
    """Examines one model; questions of like length share a batch of `batch` rows."""

    def __init__(
        self, model: VisionLanguageModel, batch: int, max_answer_tokens: int, limits: DecodeLimits = DEFAULT_LIMITS
    ) -> None:
        self.model = model
        self.limits = limits
        self.batch = batch
        self.max_answer_tokens = max_answer_tokens

    @torch.inference_mode()
    def examine(self, samples: Sequence[Sample]) -> Examination:
        """Ask every question of the samples alone, and read each with its answer (all answers must be present)."""
        items = self._items(samples)
        answers = self._answers(samples, items)
        counts: ExpertCounts = {}
        states = self._ordered(items, lambda batch: self._read(batch, counts))
        ids = [item.chat.response_ids_n for item in items]
        return Examination(answers, np.concatenate(states), np.concatenate(ids), counts)

    @torch.inference_mode()
    def ask(self, samples: Sequence[Sample]) -> Examination:
        """Ask every question of the samples alone, and read nothing: an examination without states and routing."""
        return Examination(self._answers(samples, self._items(samples)))

    def _items(self, samples: Sequence[Sample]) -> list[_Item]:
        visual = self._visual_tokens(samples)
        pairs = [(turn, visual[sample.content_hash]) for sample in samples for turn in sample.turns]
        return [
            _Item(turn.answer_type, self.model.chat.encode([turn], len(visual_TD)), visual_TD)
            for turn, visual_TD in pairs
        ]

    def _answers(self, samples: Sequence[Sample], items: Sequence[_Item]) -> list[Answer]:
        heads = [
            (f"{sample.id}/{index}", sample.content_hash, turn)
            for sample in samples
            for index, turn in enumerate(sample.turns)
        ]
        return [
            Answer(name, picture, turn.question, str(turn.answer), text, turn.answer_type)
            for (name, picture, turn), text in zip(heads, self._ordered(items, self._generate), strict=True)
        ]

    def _visual_tokens(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Visual tokens [F * S + 1, D] of each different picture, none [0, D] for text alone, by content hash."""
        nothing_0D = self.model.newline_D[None][:0]
        tokens = {sample.content_hash: nothing_0D for sample in samples if not sample.frames}
        pictured = {sample.content_hash: sample.frames for sample in samples if sample.frames}
        clips = sorted(pictured.items(), key=lambda clip: len(clip[1]))
        for frames, group in groupby(clips, key=lambda clip: len(clip[1])):
            for batch in _batches(list(group), max(1, self.batch // frames)):
                pictures = [decode(frame, *self.limits) for _, clip in batch for frame in clip]
                features_NPD = self.model.features(to_pixels(pictures, self.model.pixels))
                embeds_BTD = self.model.clip_embeds(features_NPD.unflatten(0, (len(batch), frames)))
                tokens |= {name: embeds_TD for (name, _), embeds_TD in zip(batch, embeds_BTD, strict=True)}
        return tokens

    def _ordered(self, items: Sequence[_Item], work: Callable[[Sequence[_Item]], list[Value]]) -> list[Value]:
        """`work` on batches of like length, results in the order of the items."""
        order = sorted(range(len(items)), key=lambda index: len(items[index].chat.input_ids))
        results: dict[int, Value] = {}
        for indices in _batches(order, self.batch):
            results |= dict(zip(indices, work([items[index] for index in indices]), strict=True))
        return [results[index] for index in range(len(items))]

    def _generate(self, batch: Sequence[_Item]) -> list[str]:
        decoder = BatchDecoder(self.model, len(batch))
        decoder.feed([item.prompt for item in batch], torch.cat([item.visual_TD for item in batch]))
        return [self.model.chat.decode(ids) for ids in decoder.decode([self.max_answer_tokens] * len(batch))]

    def _read(self, batch: Sequence[_Item], counts: ExpertCounts) -> list[npt.NDArray[np.float32]]:
        input_ids_BT, mask_BT = self.model.pad([item.chat.input_ids for item in batch])
        with trace_routers(self.model) as trace:
            hidden_BTD = self.model.hidden(input_ids_BT, mask_BT, torch.cat([item.visual_TD for item in batch]))
        self._count(batch, input_ids_BT == self.model.chat.visual_id, mask_BT.bool(), trace, counts)
        positions = [torch.from_numpy(item.chat.response_positions_n - 1) for item in batch]
        rows = zip(hidden_BTD, positions, strict=True)
        return [hidden_TD[where_n].float().cpu().numpy() for hidden_TD, where_n in rows]

    def _count(
        self,
        batch: Sequence[_Item],
        visual_BT: torch.Tensor,
        mask_BT: torch.Tensor,
        trace: RouterTrace,
        counts: ExpertCounts,
    ) -> None:
        groups = {PICTURE_TOKENS: visual_BT, TEXT_TOKENS: mask_BT & ~visual_BT}
        for row, item in enumerate(batch):
            name = f"{ANSWER_TOKENS}{item.answer_type}"
            answers_BT = groups.setdefault(name, torch.zeros_like(mask_BT))
            answers_BT[row, torch.from_numpy(item.chat.response_positions_n - 1)] = True
        for layer, router in routers(self.model).items():
            experts = int(router.num_experts)  # pyright: ignore[reportArgumentType]
            for group, where_BT in groups.items():
                chosen_TA = trace.chosen[layer][where_BT.flatten()]
                _add(counts, layer, group, torch.bincount(chosen_TA.flatten(), minlength=experts).tolist())


def _batches(values: Sequence[Value], size: int) -> Iterator[Sequence[Value]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
