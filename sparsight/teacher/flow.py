"""From samples to signals: what every teacher does in the same way.

Pictures are opened safely, withheld answers written, conversations encoded, sequences of similar length forwarded
together, and the head evaluated at the positions that predict response tokens, and at pictures' positions where that is
asked for (`visual`). A row that cannot be labelled becomes a `Quarantined` with its reason. The model itself is behind
`TeacherModel`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from sparsight.errors import DataError
from sparsight.media.chat import ChatEncoder
from sparsight.media.images import decode
from sparsight.records import Quarantined, Sample, SparseTargets, TeacherSignal, hash_response
from sparsight.teacher.protocol import SignalSettings
from sparsight.teacher.targets import cut, tail_uniforms, targets_of_hidden
from sparsight.teacher.visual import TeacherForward, VisualTeacher

Item = TypeVar("Item")


@dataclass(frozen=True)
class OpenSample:
    """A sample with its pictures decoded. `place` is its index among the samples given."""

    place: int
    sample: Sample
    pictures: tuple[Image.Image, ...]


@dataclass(frozen=True)
class EncodedSample:
    """The token ids of a whole conversation, visual tokens included, and where its answers stand.

    `response_positions_n` are the positions of all answer tokens with their end-of-turn tokens; the hidden state one
    position earlier predicts each. `inputs` is whatever else the model needs for this row. `starts` is where each of
    several independent questions begins, empty for a conversation.
    """

    place: int
    input_ids: list[int]
    response_positions_n: npt.NDArray[np.int64]
    answer_lengths: tuple[int, ...]
    visual_tokens: int
    inputs: Any
    starts: tuple[int, ...] = ()


class TeacherModel(Protocol):
    """What the flow needs of a model."""

    @property
    def max_positions(self) -> int: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def chat(self) -> ChatEncoder: ...

    @property
    def head_VD(self) -> torch.Tensor: ...

    def look(self, rows: Sequence[OpenSample]) -> list[Any]:
        """What the model keeps of each row's pictures, to answer and encode with."""
        ...

    def answer(self, rows: Sequence[OpenSample], seen: Sequence[Any], max_tokens: int) -> list[tuple[str, ...]]:
        """The answers of each row, written greedily where they are None, else as given."""
        ...

    def encode(self, row: OpenSample, seen: Any) -> EncodedSample:
        """Ids of a row whose answers are all present. Raises `DataError` if they cannot be made."""
        ...

    def forward(self, rows: Sequence[EncodedSample], attention: bool = False) -> TeacherForward:
        """One forward pass over the rows, right-padded."""
        ...

    def head(self, hidden_nD: torch.Tensor) -> torch.Tensor:
        """Logits [n, V]."""
        ...


@torch.inference_mode()
def label_samples(
    model: TeacherModel, settings: SignalSettings, samples: Sequence[Sample]
) -> list[TeacherSignal | Quarantined]:
    """One signal or quarantined row a sample, in order."""
    results: list[TeacherSignal | Quarantined | None] = [None] * len(samples)
    rows: list[OpenSample] = []
    for place, sample in enumerate(samples):
        opened = open_sample(place, sample, settings.max_picture_bytes, settings.max_picture_pixels)
        if isinstance(opened, Quarantined):
            results[place] = opened
        else:
            rows.append(opened)
    size = settings.label.batch_samples
    visual = VisualTeacher(model.head_VD, model.chat.visual_id, settings)
    encoded: list[EncodedSample] = []
    for batch in batches(rows, size, text_size):
        seen = model.look(batch)
        for row, view in zip(_answered(model, batch, seen, settings), seen, strict=True):
            sequence = _encode(model, row, view)
            if isinstance(sequence, Quarantined):
                results[row.place] = sequence
            else:
                encoded.append(sequence)
    for batch in batches(encoded, size, lambda row: len(row.input_ids)):
        for row, signal in zip(batch, _signals(model, settings, visual, batch, samples), strict=True):
            results[row.place] = signal
    assert all(result is not None for result in results)
    return [result for result in results if result is not None]


def label_questions_apart(
    model: TeacherModel, settings: SignalSettings, samples: Sequence[Sample]
) -> list[TeacherSignal | Quarantined]:
    """`label_samples` for a model that cannot pack: every independent question is a row of its own until the end."""
    parts = [_single_questions(sample) for sample in samples]
    results = iter(label_samples(model, settings, [part for group in parts for part in group]))
    return [_join(sample, [next(results) for _ in group]) for sample, group in zip(samples, parts, strict=True)]


def _single_questions(sample: Sample) -> list[Sample]:
    if not sample.independent or len(sample.turns) < 2:
        return [sample]
    return [replace(sample, id=f"{sample.id}#{index}", turns=(turn,)) for index, turn in enumerate(sample.turns)]


def _join(sample: Sample, parts: Sequence[TeacherSignal | Quarantined]) -> TeacherSignal | Quarantined:
    """One sample's signal from its questions' signals; one unusable question makes the sample unusable."""
    signals: list[TeacherSignal] = []
    for part in parts:
        if isinstance(part, Quarantined):
            return replace(part, id=sample.id)
        signals.append(part)
    targets = [signal.targets for signal in signals]
    response_ids_n = np.concatenate([signal.response_ids_n for signal in signals])
    return replace(
        signals[0],
        id=sample.id,
        response_ids_n=response_ids_n,
        answer_lengths=tuple(length for signal in signals for length in signal.answer_lengths),
        answered_by_teacher=tuple(flag for signal in signals for flag in signal.answered_by_teacher),
        label_logprobs_n=np.concatenate([signal.label_logprobs_n for signal in signals]),
        targets=SparseTargets(
            head_ids_nK=np.concatenate([target.head_ids_nK for target in targets]),
            head_logprobs_nK=np.concatenate([target.head_logprobs_nK for target in targets]),
            tail_mass_n=np.concatenate([target.tail_mass_n for target in targets]),
            tail_ids_nS=np.concatenate([target.tail_ids_nS for target in targets]),
            tail_logprobs_nS=np.concatenate([target.tail_logprobs_nS for target in targets]),
        ),
        response_hash=hash_response(response_ids_n),
    )


def questions_apart(row: OpenSample) -> list[OpenSample]:
    """A conversation as it is; a row of independent questions as one row a question."""
    if not row.sample.independent:
        return [row]
    return [replace(row, sample=replace(row.sample, turns=(turn,))) for turn in row.sample.turns]


def open_sample(place: int, sample: Sample, max_bytes: int, max_pixels: int) -> OpenSample | Quarantined:
    """The sample with its pictures decoded within limits, or why that cannot be."""
    if not sample.turns:
        return Quarantined(sample.id, sample.source, "the sample has no question")
    try:
        pictures = tuple(decode(frame, max_bytes, max_pixels) for frame in sample.frames)
    except DataError as error:
        return Quarantined(sample.id, sample.source, str(error))
    return OpenSample(place, sample, pictures)


def _answered(
    model: TeacherModel, batch: Sequence[OpenSample], seen: Sequence[Any], settings: SignalSettings
) -> list[OpenSample]:
    """The rows with the answers that were withheld filled in."""
    rows = list(batch)
    open_places = [index for index, row in enumerate(rows) if not row.sample.has_ground_truth]
    if not open_places:
        return rows
    withheld = [rows[index] for index in open_places]
    answers = model.answer(withheld, [seen[index] for index in open_places], settings.label.max_answer_tokens)
    for index, row, texts in zip(open_places, withheld, answers, strict=True):
        turns = tuple(replace(turn, answer=text) for turn, text in zip(row.sample.turns, texts, strict=True))
        rows[index] = replace(row, sample=replace(row.sample, turns=turns))
    return rows


def _encode(model: TeacherModel, row: OpenSample, seen: Any) -> EncodedSample | Quarantined:
    try:
        encoded = model.encode(row, seen)
    except DataError as error:
        return Quarantined(row.sample.id, row.sample.source, str(error))
    length = len(encoded.input_ids)
    if length > model.max_positions:
        reason = f"the conversation takes {length} tokens, the teacher reads at most {model.max_positions}: cut it"
        return Quarantined(row.sample.id, row.sample.source, reason)
    return encoded


def response_hidden(forward: TeacherForward, rows: Sequence[EncodedSample]) -> torch.Tensor:
    """The hidden states [n, D] that predict the response tokens of all rows, in order."""
    width = forward.hidden_BTD.shape[1]
    before_n = np.concatenate([index * width + row.response_positions_n - 1 for index, row in enumerate(rows)])
    return forward.hidden_BTD.flatten(0, 1)[torch.from_numpy(before_n).to(forward.hidden_BTD.device)]


def _signals(
    model: TeacherModel,
    settings: SignalSettings,
    visual: VisualTeacher,
    batch: Sequence[EncodedSample],
    samples: Sequence[Sample],
) -> Iterator[TeacherSignal]:
    """One forward pass; then each row's share of the targets, and what is said of its picture."""
    forward = model.forward(batch, settings.visual.attention)
    hidden_nD = response_hidden(forward, batch)
    ids = [np.asarray(row.input_ids, dtype=np.int32)[row.response_positions_n] for row in batch]
    tail = settings.label.tail_samples
    uniforms = [
        tail_uniforms(settings.seed, samples[row.place].id, len(response), tail)
        for row, response in zip(batch, ids, strict=True)
    ]
    targets, label_logprobs_n = targets_of_hidden(
        hidden_nD, model.head, model.vocabulary, np.concatenate(ids), settings.label.head, np.concatenate(uniforms)
    )
    seen = visual.signals([row.input_ids for row in batch], [samples[row.place] for row in batch], forward)
    start = 0
    for row, response, picture in zip(batch, ids, seen, strict=True):
        end = start + len(response)
        sample = samples[row.place]
        yield TeacherSignal(
            id=sample.id,
            content_hash=sample.content_hash,
            response_ids_n=response,
            answer_lengths=row.answer_lengths,
            answered_by_teacher=tuple(turn.answer is None for turn in sample.turns),
            label_logprobs_n=label_logprobs_n[start:end],
            targets=cut(targets, start, end),
            visual_tokens=row.visual_tokens,
            response_hash=hash_response(response),
            visual=picture,
        )
        start = end


def text_size(row: OpenSample) -> tuple[int, int, int]:
    """Orders rows so that neighbours take about as many steps: turns, then frames, then characters."""
    turns = row.sample.turns
    return len(turns), len(row.pictures), sum(len(turn.question) + len(turn.answer or "") for turn in turns)


def batches(items: Sequence[Item], size: int, key: Callable[[Item], Any]) -> Iterator[list[Item]]:
    """Items of similar size together, so that little of a batch is padding."""
    ordered = sorted(items, key=key)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
