"""Streams with timed questions: their record types, and the store that keeps them as one Parquet file.

A row holds no frames but the recipe that they are drawn from anew (`stream_scenes`), and the questions with their
answers and evidence. Written by data preparation, read by the evaluation of streams.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa

from sparsight.data.samples import parquet_bytes, read_table
from sparsight.data.scenes import COLOUR_NAMES
from sparsight.storage import Storage

STREAMS_VERSION = 2
STREAMS = "streams.parquet"


@dataclass(frozen=True)
class StreamRecipe:
    """All that a drawn stream is made of: equal recipes give equal scenes and frames on any machine.

    Frame f of `frames` is shown from f / `frames_per_second` seconds on. A scene lasts from `shortest_scene_s` to
    `longest_scene_s`, in whole frames. Its shapes are of `colours` colours. `split` and `number` tell the streams of a
    seed apart.
    """

    split: str
    seed: int
    number: int
    frames: int
    frames_per_second: float
    shortest_scene_s: float
    longest_scene_s: float
    size_pixels: int
    colours: int = len(COLOUR_NAMES)

    @property
    def seconds(self) -> float:
        return self.time_s(self.frames)

    def time_s(self, frame: int) -> float:
        return frame / self.frames_per_second


@dataclass(frozen=True)
class StreamQuestion:
    """A question asked at `time_s`, when the newest frame is the one of that time, with its one right answer.

    `kind` is `now` or `past`, `answer_type` finer (`past_ever`). `alphabet` are all answers that questions of this
    type have. `evidence_s` are the [start, end) spans in seconds that the answer follows from, in order of time; none
    where the answer is that something never was. None ends later than the newest frame.
    """

    id: str
    time_s: float
    question: str
    answer: str
    kind: Literal["now", "past"]
    answer_type: str
    alphabet: tuple[str, ...]
    evidence_s: tuple[tuple[float, float], ...]

    def recall(self, retrieved_s: Iterable[tuple[float, float]]) -> float | None:
        """The share of the evidence's seconds that retrieved spans cover, each second once; None without evidence."""
        if not self.evidence_s:
            return None
        covered_s, reached_s = 0.0, -math.inf
        for start_s, end_s in sorted(retrieved_s):
            for evidence_start_s, evidence_end_s in self.evidence_s:
                both_s = min(end_s, evidence_end_s) - max(start_s, evidence_start_s, reached_s)
                covered_s += max(0.0, both_s)
            reached_s = max(reached_s, end_s)
        return covered_s / sum(end_s - start_s for start_s, end_s in self.evidence_s)


@dataclass(frozen=True)
class QuestionedStream:
    """A stream, as its recipe, and the questions about it in the order of their times."""

    id: str
    source: str
    recipe: StreamRecipe
    questions: tuple[StreamQuestion, ...]

    def to_row(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> "QuestionedStream":
        questions: list[StreamQuestion] = []
        for question in row["questions"]:
            values: dict[str, Any] = dict(question)
            values["alphabet"] = tuple(question["alphabet"])
            values["evidence_s"] = tuple((start_s, end_s) for start_s, end_s in question["evidence_s"])
            questions.append(StreamQuestion(**values))
        return QuestionedStream(str(row["id"]), str(row["source"]), StreamRecipe(**row["recipe"]), tuple(questions))


_RECIPE = pa.struct(
    [
        ("split", pa.string()),
        ("seed", pa.int64()),
        ("number", pa.int64()),
        ("frames", pa.int64()),
        ("frames_per_second", pa.float64()),
        ("shortest_scene_s", pa.float64()),
        ("longest_scene_s", pa.float64()),
        ("size_pixels", pa.int64()),
        ("colours", pa.int64()),
    ]
)

_QUESTION = pa.struct(
    [
        ("id", pa.string()),
        ("time_s", pa.float64()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("kind", pa.string()),
        ("answer_type", pa.string()),
        ("alphabet", pa.list_(pa.string())),
        ("evidence_s", pa.list_(pa.list_(pa.float64()))),
    ]
)

STREAM_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("recipe", _RECIPE, nullable=False),
        pa.field("questions", pa.list_(_QUESTION), nullable=False),
    ],
    metadata={"sparsight.streams": str(STREAMS_VERSION)},
)


def write_streams(storage: Storage, streams: Iterable[QuestionedStream]) -> None:
    """Write the streams in order, as one file that appears whole or not at all."""
    rows = [stream.to_row() for stream in streams]
    storage.write_bytes(STREAMS, parquet_bytes(pa.Table.from_pylist(rows, schema=STREAM_SCHEMA)))


def iter_streams(storage: Storage) -> Iterator[QuestionedStream]:
    """The streams in the order of writing. Raises `DataError` for a file that is damaged or of another version."""
    for row in read_table(storage, STREAMS, STREAM_SCHEMA).to_pylist():
        yield QuestionedStream.from_row(row)
