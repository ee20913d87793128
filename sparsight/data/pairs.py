"""The pair store: preference pairs as Parquet files in a storage folder.

Files are `part-<hash>.parquet` (PAIR_SCHEMA) and `quarantine.parquet`; each appears whole or not at all, and its name
follows from the ids in it (`signals.rows_name`), so writing the same rows again replaces the same file. Written by pair
making, read by preference distillation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sparsight.data.signals import quarantine_rows
from sparsight.errors import DataError
from sparsight.records import PAIR_SCHEMA, PreferencePair, Quarantined
from sparsight.storage import Storage

DropReason = Literal["alike", "unrated", "margin"]
DROP_REASONS: tuple[DropReason, ...] = ("alike", "unrated", "margin")
"""Why a question has no pair: fewer than two different answers, fewer than two that the judge could score, or scores
too close to each other."""


@dataclass(frozen=True)
class Dropped:
    """A question that was asked and has no pair; `unrated` candidates could not be scored."""

    id: str
    source: str
    reason: DropReason
    unrated: int = 0


DROPPED_SCHEMA = pa.schema(
    [("id", pa.string()), ("source", pa.string()), ("reason", pa.string()), ("unrated", pa.int32())]
)

JUDGED_SCHEMA = pa.schema(
    [*(field.with_nullable(True) for field in PAIR_SCHEMA), ("reason", pa.string()), ("unrated", pa.int32())]
)
"""Pairs and rows without one in one table, as they leave a pair worker: `reason` is null for a pair, `unrated` for
anything but a dropped row."""


def judged_table(results: Sequence[PreferencePair | Dropped | Quarantined]) -> pa.Table:
    """Results of pair making as one table (JUDGED_SCHEMA), in order."""
    rows = [result.to_row() if isinstance(result, PreferencePair) else asdict(result) for result in results]
    return pa.Table.from_pylist(rows, schema=JUDGED_SCHEMA)


def pair_rows(judged: pa.Table) -> pa.Table:
    """The pairs of a JUDGED_SCHEMA table, ordered by id, as PAIR_SCHEMA."""
    kept = judged.filter(pc.field("reason").is_null()).sort_by("id").select(PAIR_SCHEMA.names)
    return pa.Table.from_arrays([column.combine_chunks() for column in kept.columns], schema=PAIR_SCHEMA)


def dropped_rows(judged: pa.Table) -> pa.Table:
    """The dropped rows of a JUDGED_SCHEMA table, ordered by id, as DROPPED_SCHEMA."""
    kept = judged.filter(pc.field("unrated").is_valid()).sort_by("id").select(DROPPED_SCHEMA.names)
    return kept.cast(DROPPED_SCHEMA)


def refused_rows(judged: pa.Table) -> pa.Table:
    """The quarantined rows of a JUDGED_SCHEMA table, ordered by id, as QUARANTINE_SCHEMA."""
    return quarantine_rows(judged.filter(pc.field("unrated").is_null()))


def encode_pairs(table: pa.Table) -> bytes:
    """A Parquet file of pairs."""
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def pair_files(storage: Storage) -> list[str]:
    """Keys of the pair files, in order."""
    return [key for key in storage.keys("") if key.startswith("part-") and key.endswith(".parquet")]


def iter_pairs(storage: Storage) -> Iterator[PreferencePair]:
    """All pairs, one file in memory at a time. Raises `DataError` where a file is damaged or of another version."""
    for key in pair_files(storage):
        for row in _read(storage, key).to_pylist():
            yield PreferencePair.from_row(row)


def read_pairs(storage: Storage) -> list[PreferencePair]:
    """All pairs ordered by id, however they were spread over files; see `iter_pairs`."""
    return sorted(iter_pairs(storage), key=lambda pair: pair.id)


def _read(storage: Storage, key: str) -> pa.Table:
    where = f"'{storage.uri}/{key}'"
    data = storage.read_bytes(key)
    try:
        table = pq.read_table(BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where} is damaged ({error}): delete it and make the pairs again") from error
    wanted = PAIR_SCHEMA.metadata[b"sparsight.pairs"]
    found = (table.schema.metadata or {}).get(b"sparsight.pairs")
    if found != wanted:
        raise DataError(f"{where} has pairs version {found!r}, this code reads {wanted!r}: make the pairs again")
    return table
