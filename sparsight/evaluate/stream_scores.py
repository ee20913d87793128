"""Answers about long streams become figures: accuracy on what is on now and on what was before, and recall.

A figure about now or the past is the mean over its question types, so that types with more questions do not count more
(docs/protocol.md). Intervals are over streams, or over seeds where a reproduction has several. Knows no model and no
memory; written by `pipelines.stream_trials`, read by it and by `pipelines.reproduce`.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sparsight.data.turns import normalise
from sparsight.evaluate.scores import Ratio, ratio

KINDS = ("now", "past")


class StreamAnswerRow(NamedTuple):
    """One answer: who (`model`), how (`method`), to what, and the share of its evidence that was retrieved.

    `recall` is NaN where a question has no evidence. `seconds` is the stream's length.
    """

    model: str
    method: str
    stream: str
    seconds: float
    question_id: str
    kind: str
    answer_type: str
    question: str
    reference: str
    answer: str
    recall: float

    @property
    def correct(self) -> bool:
        return normalise(self.answer) == normalise(self.reference)


class MethodScore(NamedTuple):
    """How one model fares by one method. `low` and `high` bound `accuracy`, the share of right answers, at 95 %."""

    accuracy: float
    low: float
    high: float
    by_kind: dict[str, float]
    by_type: dict[str, float]
    by_length: dict[tuple[str, float], float]
    """By kind and length in seconds."""
    recall: float
    questions: int


def score_method(rows: Sequence[StreamAnswerRow]) -> MethodScore:
    """The score of one model and method from all of its answers."""
    overall: Ratio = ratio([float(row.correct) for row in rows], [1.0] * len(rows), [row.stream for row in rows])
    lengths = sorted({row.seconds for row in rows})
    return MethodScore(
        accuracy=overall.value,
        low=overall.low,
        high=overall.high,
        by_kind={kind: _mean_over_types(row for row in rows if row.kind == kind) for kind in KINDS},
        by_type=_by_type(rows),
        by_length={
            (kind, seconds): _mean_over_types(row for row in rows if row.kind == kind and row.seconds == seconds)
            for kind in KINDS
            for seconds in lengths
        },
        recall=_mean([row.recall for row in rows if not math.isnan(row.recall)]),
        questions=len(rows),
    )


def scores(rows: Iterable[StreamAnswerRow]) -> dict[tuple[str, str], MethodScore]:
    """By model and method, in the order in which they first appear."""
    grouped: dict[tuple[str, str], list[StreamAnswerRow]] = {}
    for row in rows:
        grouped.setdefault((row.model, row.method), []).append(row)
    return {key: score_method(chosen) for key, chosen in grouped.items()}


def metrics(score: MethodScore) -> dict[str, float]:
    """A score by flat names: `accuracy`, `now`, `past`, `recall`, `past_3600s`, `past_ever`, …; of what was asked."""
    lengths = {f"{kind}_{seconds:g}s": value for (kind, seconds), value in score.by_length.items()}
    values = {"accuracy": score.accuracy, "recall": score.recall, **score.by_kind, **lengths, **score.by_type}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def table(found: dict[tuple[str, str], MethodScore]) -> str:
    """The scores as lines of text for a terminal."""
    lines = [f"{'model':<12} {'method':<18} {'past':>6} {'now':>6} {'recall':>6}   all [95 %]"]
    for (model, method), score in found.items():
        shares = " ".join(f"{value:6.3f}" for value in (score.by_kind["past"], score.by_kind["now"], score.recall))
        lines.append(f"{model:<12} {method:<18} {shares}   {score.accuracy:.3f} [{score.low:.3f}, {score.high:.3f}]")
    return "\n".join(lines)


def to_parquet(rows: Sequence[StreamAnswerRow]) -> bytes:
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist([row._asdict() for row in rows]), buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(data: bytes) -> list[StreamAnswerRow]:
    return [StreamAnswerRow(**row) for row in pq.read_table(BytesIO(data)).to_pylist()]


def _by_type(rows: Iterable[StreamAnswerRow]) -> dict[str, float]:
    grouped: dict[str, list[float]] = {}
    for row in rows:
        grouped.setdefault(row.answer_type, []).append(float(row.correct))
    return {name: statistics.fmean(grouped[name]) for name in sorted(grouped)}


def _mean_over_types(rows: Iterable[StreamAnswerRow]) -> float:
    return _mean(list(_by_type(rows).values()))


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
