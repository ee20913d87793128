"""The teacher's side of a step: rows with its targets, and what it says of their pictures.

`StoredSide` reads what labelling kept; `LiveSide` asks the teacher itself, which is how the store can be held against
it. Both refuse what does not fit the row, with its id. Used by the response objective; who opens a store or loads a
teacher is the pipelines' business.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np

from sparsight.distill.rows import TrainingRow, check_ids, misfit
from sparsight.media.chat import ChatEncoder
from sparsight.records import Quarantined, Sample, TeacherSignal, VisualSignal


class TaughtRow(NamedTuple):
    """A row with the teacher's targets in it, and the visual signal of its picture, None where no term needs one."""

    row: TrainingRow
    visual: VisualSignal | None


class TeacherSide(Protocol):
    """Gives the teacher's side of rows, in their order."""

    def of(self, rows: Sequence[TrainingRow]) -> list[TaughtRow]: ...


class VisualSource(Protocol):
    """Visual signals by sample id, such as `data.visual_signals.VisualStore`."""

    def load(self, row: str) -> VisualSignal: ...


class StoredSide:
    """Rows carry their targets already; visual signals come from a store, if a stage has one."""

    def __init__(self, visual: VisualSource | None = None) -> None:
        self._visual = visual

    def of(self, rows: Sequence[TrainingRow]) -> list[TaughtRow]:
        return [TaughtRow(row, None if self._visual is None else self._visual.load(row.id)) for row in rows]


class LiveSide:
    """Asks a teacher that is in memory. `label` is its own labelling, `samples` are the rows' by id, `vocabulary` is
    the number of rows of the student's head.

    The teacher reads the answers that the rows hold: it writes none, and every draw is the one that labelling would
    take, so its targets differ from stored ones by the store's rounding alone.
    """

    def __init__(
        self,
        label: Callable[[Sequence[Sample]], Sequence[TeacherSignal | Quarantined]],
        samples: Mapping[str, Sample],
        chat: ChatEncoder,
        vocabulary: int,
    ) -> None:
        self._label, self._samples, self._chat, self._vocabulary = label, samples, chat, vocabulary

    def of(self, rows: Sequence[TrainingRow]) -> list[TaughtRow]:
        """Raises `AlignmentError` for a row that the teacher cannot read, or cuts into other tokens."""
        signals = self._label([answered(self._samples[row.id], row, self._chat) for row in rows])
        return [_taught(row, signal, self._vocabulary) for row, signal in zip(rows, signals, strict=True)]


def answered(sample: Sample, row: TrainingRow, chat: ChatEncoder) -> Sample:
    """The sample with the answers of its row, where it has none of its own."""
    if sample.has_ground_truth:
        return sample
    breaks = np.flatnonzero(np.diff(row.positions_n) > 1) + 1
    answers = np.split(row.label_ids_n, breaks)
    assert len(answers) == len(sample.turns)
    turns = [
        turn if turn.answer is not None else replace(turn, answer=chat.decode(ids_n.tolist()))
        for turn, ids_n in zip(sample.turns, answers, strict=True)
    ]
    return replace(sample, turns=tuple(turns))


def _taught(row: TrainingRow, signal: TeacherSignal | Quarantined, vocabulary: int) -> TaughtRow:
    if isinstance(signal, Quarantined):
        raise misfit(row.id, f"the teacher cannot read it: {signal.reason}", "prepare the samples again")
    if not np.array_equal(signal.response_ids_n, row.label_ids_n):
        raise misfit(row.id, "the teacher cuts its answers into other tokens", "set the stage's teacher: stored")
    check_ids(row.id, signal.targets, vocabulary)
    return TaughtRow(replace(row, targets=signal.targets), signal.visual)
