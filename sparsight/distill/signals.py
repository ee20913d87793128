"""Reading the teacher's signal store: Parquet parts of SIGNAL_SCHEMA in a storage folder.

Whether the folder is finished, and who wrote it, is the artefact's business; whether a row fits a sample and a
student is `rows`'. Called by the distillation pipeline.
"""

from collections.abc import Iterator
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq

from sparsight.errors import DataError
from sparsight.records import SIGNAL_SCHEMA, TeacherSignal
from sparsight.storage import Storage


def signal_files(storage: Storage) -> list[str]:
    """Keys of the signal files, in order; quarantined rows are kept elsewhere."""
    keys = [key for key in storage.keys() if key.endswith(".parquet")]
    return [key for key in keys if not key.rpartition("/")[2].startswith(("quarantine", ".", "_"))]


def iter_signals(storage: Storage) -> Iterator[TeacherSignal]:
    """All signals, one file in memory at a time. Raises `DataError` where a file is damaged or lacks a column."""
    for key in signal_files(storage):
        try:
            rows = pq.read_table(BytesIO(storage.read_bytes(key)), columns=SIGNAL_SCHEMA.names).to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"'{storage.uri}/{key}' cannot be read as teacher signals ({error}): delete the folder and label again"
            ) from error
        yield from map(TeacherSignal.from_row, rows)
