"""Single questions out of samples: what pair making asks, each with its picture and its own answer.

A question must stand on its own. Independent questions do; of a conversation, whose turns build on each other, only
the first does. Called by `pipelines.pairs`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from sparsight.data.samples import sample_files
from sparsight.errors import DataError
from sparsight.records import SAMPLE_SCHEMA, Sample
from sparsight.storage import Storage


@dataclass(frozen=True)
class Prompt:
    """What is known of a question without its picture."""

    id: str
    content_hash: str
    answer_type: str
    answered: bool


def prompt_id(sample_id: str, turn: int) -> str:
    return f"{sample_id}#{turn}"


def apart(sample: Sample) -> list[Sample]:
    """A sample of one turn for every question that stands on its own."""
    turns = sample.turns if sample.independent else sample.turns[:1]
    return [
        replace(sample, id=prompt_id(sample.id, index), turns=(turn,), independent=False)
        for index, turn in enumerate(turns)
    ]


def prompt_table(rows: pa.Table) -> pa.Table:
    """`apart` for tables of samples (SAMPLE_SCHEMA)."""
    prompts = [prompt.to_row() for row in rows.to_pylist() for prompt in apart(Sample.from_row(row))]
    return pa.Table.from_pylist(prompts, schema=SAMPLE_SCHEMA)


def iter_prompts(storage: Storage) -> Iterator[Prompt]:
    """The questions of all samples of a store, in order; pictures are not read.

    Raises `DataError` where two samples share an id.
    """
    seen: set[str] = set()
    columns = ["id", "content_hash", "conversation", "answer_types", "independent"]
    for key in sample_files(storage):
        filesystem, path = storage.arrow(key)
        for row in pq.read_table(path, filesystem=filesystem, columns=columns).to_pylist():
            if row["id"] in seen:
                raise DataError(f"'{storage.uri}/{key}': the id '{row['id']}' comes twice: prepare the samples again")
            seen.add(row["id"])
            answers = [message["value"] for message in row["conversation"][1::2]]
            kinds = row["answer_types"] if row["independent"] else row["answer_types"][:1]
            for index, kind in enumerate(kinds):
                yield Prompt(prompt_id(row["id"], index), row["content_hash"], kind, answers[index] is not None)
