"""The signal store: what a teacher said about each sample, as Parquet files in a storage folder.

Files are `part-<hash>.parquet` (SIGNAL_SCHEMA) and `quarantine.parquet`; each appears whole or not at all, and its
name follows from the ids in it, so writing the same rows again replaces the same file. Columns are built from whole
arrays, never value by value. What is said about pictures goes beside them (`visual_signals`). Written by labelling,
read by distillation and evaluation.
"""

import hashlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sparsight.data.visual_signals import VISUAL_FIELDS, visual_columns
from sparsight.errors import DataError
from sparsight.records import QUARANTINE_SCHEMA, SIGNAL_SCHEMA, Quarantined, TeacherSignal, hash_response
from sparsight.storage import Storage

LABELLED_SCHEMA = pa.schema(
    [
        *(field.with_nullable(True) for field in SIGNAL_SCHEMA),
        *VISUAL_FIELDS,
        ("source", pa.string()),
        ("reason", pa.string()),
    ]
)
"""Signals and quarantined rows in one table, as they leave a labelling worker; `reason` is null for a signal, visual
columns are null where no stage asked for them."""

_NUMBER_COLUMNS = (
    "response_ids", "head_ids", "tail_ids", "label_logprobs", "head_logprobs", "tail_mass", "tail_logprobs"
)  # fmt: skip


def labelled_table(results: Sequence[TeacherSignal | Quarantined]) -> pa.Table:
    """Results of a teacher as one table (LABELLED_SCHEMA): the signals first, then the quarantined rows."""
    signals = [result for result in results if isinstance(result, TeacherSignal)]
    refused = [result for result in results if isinstance(result, Quarantined)]
    missing = pa.Table.from_pylist(
        [{"id": row.id, "source": row.source, "reason": row.reason} for row in refused], schema=LABELLED_SCHEMA
    )
    return pa.concat_tables([_signal_columns(signals).cast(LABELLED_SCHEMA), missing]) if signals else missing


def _signal_columns(signals: Sequence[TeacherSignal]) -> pa.Table:
    def lists(arrays: Sequence[Any], dtype: Any) -> pa.ListArray:
        flat = [np.asarray(array).reshape(-1) for array in arrays]
        offsets = np.cumsum([0, *(len(array) for array in flat)], dtype=np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(flat).astype(dtype, copy=False)))

    targets = [signal.targets for signal in signals]
    hashes = [signal.response_hash or hash_response(signal.response_ids_n) for signal in signals]
    nothing = pa.nulls(len(signals), pa.string())
    return pa.table(
        {
            "id": [signal.id for signal in signals],
            "content_hash": [signal.content_hash for signal in signals],
            "response_ids": lists([signal.response_ids_n for signal in signals], np.int32),
            "answer_lengths": lists([signal.answer_lengths for signal in signals], np.int32),
            "answered_by_teacher": lists([signal.answered_by_teacher for signal in signals], np.bool_),
            "label_logprobs": lists([signal.label_logprobs_n for signal in signals], np.float32),
            "head_ids": lists([target.head_ids_nK for target in targets], np.int32),
            "head_logprobs": lists([target.head_logprobs_nK for target in targets], np.float16),
            "tail_mass": lists([target.tail_mass_n for target in targets], np.float16),
            "tail_ids": lists([target.tail_ids_nS for target in targets], np.int32),
            "tail_logprobs": lists([target.tail_logprobs_nS for target in targets], np.float16),
            "visual_tokens": pa.array([signal.visual_tokens for signal in signals], pa.int32()),
            "response_hash": pa.array(hashes, pa.binary(16)),
            **visual_columns(signals),
            "source": nothing,
            "reason": nothing,
        }
    )


def signal_rows(labelled: pa.Table) -> pa.Table:
    """The signals of a LABELLED_SCHEMA table, ordered by id, as SIGNAL_SCHEMA."""
    kept = labelled.filter(pc.field("reason").is_null()).sort_by("id").select(SIGNAL_SCHEMA.names)
    return pa.Table.from_arrays([column.combine_chunks() for column in kept.columns], schema=SIGNAL_SCHEMA)


def quarantine_rows(labelled: pa.Table) -> pa.Table:
    """The quarantined rows of a LABELLED_SCHEMA table, ordered by id, as QUARANTINE_SCHEMA."""
    refused = labelled.filter(pc.field("reason").is_valid()).sort_by("id").select(QUARANTINE_SCHEMA.names)
    return refused.cast(QUARANTINE_SCHEMA)


def rows_name(table: pa.Table) -> str:
    """A name that follows from the ids of a table's rows."""
    ids = "\n".join(sorted(table["id"].to_pylist()))
    return hashlib.blake2b(ids.encode(), digest_size=12).hexdigest()


def encode_signals(table: pa.Table) -> bytes:
    """A Parquet file of signals. Numbers are split by byte before zstd: exponents and high bytes of ids hardly vary."""
    buffer = BytesIO()
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        compression_level=9,
        use_dictionary=["answer_lengths.list.element", "visual_tokens"],  # pyright: ignore[reportArgumentType]
        column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in _NUMBER_COLUMNS},
        write_statistics=False,
        store_schema=True,
    )
    return buffer.getvalue()


def signal_files(storage: Storage) -> list[str]:
    """Keys of the signal files, in order."""
    return [key for key in storage.keys("") if key.startswith("part-") and key.endswith(".parquet")]


def iter_signals(storage: Storage) -> Iterator[TeacherSignal]:
    """All signals, one file in memory at a time, lists as numpy arrays without a Python object a value.

    Raises `DataError` where a file is damaged or of another version.
    """
    for key in signal_files(storage):
        yield from signals_of(read_signal_table(storage, key))


def read_signal_table(storage: Storage, key: str) -> pa.Table:
    """One signal file, checked. Raises `DataError` if it is damaged or of another version."""
    where = f"'{storage.uri}/{key}'"
    data = storage.read_bytes(key)
    try:
        table = pq.read_table(BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where} is damaged ({error}): delete it and label again") from error
    wanted = SIGNAL_SCHEMA.metadata[b"sparsight.signals"]
    found = (table.schema.metadata or {}).get(b"sparsight.signals")
    if found != wanted:
        raise DataError(f"{where} has signals version {found!r}, this code reads {wanted!r}: label again")
    return table


def signals_of(table: pa.Table) -> Iterator[TeacherSignal]:
    """The rows of a SIGNAL_SCHEMA table."""
    columns: dict[str, Any] = {}
    for name in table.schema.names:
        column = table[name].combine_chunks()
        if pa.types.is_list(column.type):
            values = column.flatten().to_numpy(zero_copy_only=False)
            columns[name] = np.split(values, np.cumsum(column.value_lengths().to_numpy())[:-1])
        else:
            columns[name] = column.to_pylist()
    for index in range(table.num_rows):
        yield TeacherSignal.from_row({name: values[index] for name, values in columns.items()})
