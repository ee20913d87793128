"""The sample store: samples and quarantined rows as Parquet files in a storage folder.

Files are `part-00000.parquet` … (SAMPLE_SCHEMA) and `quarantine.parquet` (QUARANTINE_SCHEMA); each appears whole or
not at all. What the folder means, and whether it is finished, is the artefact's business. Written by data
preparation, read by labelling, training and evaluation.
"""

from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from itertools import islice
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sparsight.errors import DataError
from sparsight.records import QUARANTINE_SCHEMA, SAMPLE_SCHEMA, Quarantined, Sample
from sparsight.storage import Storage

QUARANTINE = "quarantine.parquet"


class Rows(NamedTuple):
    """What an importer gives: about how many rows there will be, and the rows, good and bad, in a fixed order."""

    total: int
    items: Iterator[Sample | Quarantined]


def write_samples(storage: Storage, samples: Iterable[Sample], rows_per_file: int = 512) -> int:
    """Write the samples in order, `rows_per_file` a file, holding one file in memory; files of an earlier writing go.

    Returns the number of samples. No samples still write one empty file, so that readers find the schema.
    """
    for key in sample_files(storage):
        storage.delete(key)
    rows = iter(samples)
    written = 0
    for part in range(10**5):
        chunk = list(islice(rows, rows_per_file))
        if not chunk and part:
            break
        table = pa.Table.from_pylist([sample.to_row() for sample in chunk], schema=SAMPLE_SCHEMA)
        storage.write_bytes(f"part-{part:05d}.parquet", parquet_bytes(table))
        written += len(chunk)
        if len(chunk) < rows_per_file:
            break
    return written


def sample_files(storage: Storage) -> list[str]:
    """Keys of the sample files, in order."""
    return [key for key in storage.keys("") if key.startswith("part-") and key.endswith(".parquet")]


def iter_samples(storage: Storage) -> Iterator[Sample]:
    """All samples in the order of writing, one file in memory at a time.

    Raises `DataError` where a file is damaged or holds something else than samples of this version.
    """
    for key in sample_files(storage):
        for row in read_table(storage, key, SAMPLE_SCHEMA).to_pylist():
            yield Sample.from_row(row)


def read_samples(storage: Storage) -> list[Sample]:
    """All samples at once; see `iter_samples`."""
    return list(iter_samples(storage))


def write_quarantine(storage: Storage, rows: Sequence[Quarantined]) -> None:
    """Write the rows that could not be used, with their reasons."""
    columns = [{"id": row.id, "source": row.source, "reason": row.reason} for row in rows]
    storage.write_bytes(QUARANTINE, parquet_bytes(pa.Table.from_pylist(columns, schema=QUARANTINE_SCHEMA)))


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as a compressed Parquet file."""
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_table(storage: Storage, key: str, schema: pa.Schema) -> pa.Table:
    """A Parquet file of a schema. Raises `DataError` where it is damaged, or of another schema or version."""
    data = storage.read_bytes(key)
    try:
        table = pq.read_table(BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"'{storage.uri}/{key}' is damaged ({error}): delete its folder and prepare it again"
        ) from error
    for name, value in (schema.metadata or {}).items():
        found = (table.schema.metadata or {}).get(name)
        if found != value:
            raise DataError(
                f"'{storage.uri}/{key}' says {name.decode()} = {found.decode() if found else 'nothing'}, this version "
                f"reads {value.decode()}: prepare the folder again"
            )
    if table.schema.names != schema.names:
        raise DataError(f"'{storage.uri}/{key}' has columns {table.schema.names}, needed are {schema.names}")
    return table
