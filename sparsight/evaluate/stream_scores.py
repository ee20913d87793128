"""Answers about long streams become figures: accuracy on what is on now and on what was before, and recall.

A figure about now or the past is the mean over its question types, so that types with more questions do not count more
(docs/protocol.md). Intervals are over streams, or over seeds where a reproduction has several. Knows no model and no
memory; written by `pipelines.stream_trials`, read by it and by `pipelines.reproduce`.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sparsight.data.turns import normalise
from sparsight.evaluate.scores import Ratio, ratio


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


class Part(NamedTuple):
    """Some of the answers: mean accuracy over their question types, mean recall over questions with evidence."""

    accuracy: float
    recall: float


class MethodScore(NamedTuple):
    """How one model fares by one method. `low` and `high` bound `accuracy`, the share of right answers, at 95 %.

    `parts` are kinds (`past`), types (`past_ever`), either at one length of stream (`past_3600s`, `past_ever_3600s`),
    and lengths alone (`3600s`).
    """

    accuracy: float
    low: float
    high: float
    recall: float
    parts: dict[str, Part]
    questions: int


def score_method(rows: Sequence[StreamAnswerRow]) -> MethodScore:
    """The score of one model and method from all of its answers."""
    overall: Ratio = ratio([float(row.correct) for row in rows], [1.0] * len(rows), [row.stream for row in rows])
    return MethodScore(
        accuracy=overall.value,
        low=overall.low,
        high=overall.high,
        recall=_recall(rows),
        parts={name: Part(_mean_over_types(part), _recall(part)) for name, part in _parts(rows).items()},
        questions=len(rows),
    )


def scores(rows: Iterable[StreamAnswerRow]) -> dict[tuple[str, str], MethodScore]:
    """By model and method, in the order in which they first appear."""
    grouped: dict[tuple[str, str], list[StreamAnswerRow]] = {}
    for row in rows:
        grouped.setdefault((row.model, row.method), []).append(row)
    return {key: score_method(chosen) for key, chosen in grouped.items()}


def most_frequent_answers(rows: Iterable[StreamAnswerRow]) -> list[StreamAnswerRow]:
    """Every question once, answered by the reference that is most frequent in its type: what needs no stream."""
    questions = list({(row.stream, row.question_id): row for row in rows}.values())
    references: dict[str, Counter[str]] = {}
    for row in questions:
        references.setdefault(row.answer_type, Counter())[normalise(row.reference)] += 1
    return [row._replace(answer=references[row.answer_type].most_common(1)[0][0], recall=math.nan) for row in questions]


def metrics(score: MethodScore) -> dict[str, float]:
    """A score by flat names: `accuracy` and `recall` of all, `past_3600s` and `recall_past_3600s` of a part.

    Only of what was asked; recall only of what has evidence."""
    values = {"accuracy": score.accuracy, "recall": score.recall}
    for name, part in score.parts.items():
        values |= {name: part.accuracy, f"recall_{name}": part.recall}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def table(found: dict[tuple[str, str], MethodScore]) -> str:
    """The scores as lines of text for a terminal."""
    lines = [f"{'model':<12} {'method':<18} {'past':>6} {'now':>6} {'recall':>6}   all [95 %]"]
    for (model, method), score in found.items():
        kinds = [score.parts[kind].accuracy if kind in score.parts else math.nan for kind in ("past", "now")]
        shares = " ".join(f"{value:6.3f}" for value in (*kinds, score.recall))
        lines.append(f"{model:<12} {method:<18} {shares}   {score.accuracy:.3f} [{score.low:.3f}, {score.high:.3f}]")
    return "\n".join(lines)


def to_parquet(rows: Sequence[StreamAnswerRow]) -> bytes:
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist([row._asdict() for row in rows]), buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(data: bytes) -> list[StreamAnswerRow]:
    return [StreamAnswerRow(**row) for row in pq.read_table(BytesIO(data)).to_pylist()]


def _parts(rows: Iterable[StreamAnswerRow]) -> dict[str, list[StreamAnswerRow]]:
    parts: dict[str, list[StreamAnswerRow]] = {}
    for row in rows:
        length = f"{row.seconds:g}s"
        names = (row.kind, row.answer_type, length, f"{row.kind}_{length}", f"{row.answer_type}_{length}")
        for name in names:
            parts.setdefault(name, []).append(row)
    return parts


def _mean_over_types(rows: Iterable[StreamAnswerRow]) -> float:
    by_type: dict[str, list[float]] = {}
    for row in rows:
        by_type.setdefault(row.answer_type, []).append(float(row.correct))
    return statistics.fmean(statistics.fmean(right) for right in by_type.values())


def _recall(rows: Iterable[StreamAnswerRow]) -> float:
    known = [row.recall for row in rows if not math.isnan(row.recall)]
    return statistics.fmean(known) if known else math.nan
