"""Where labelled rows end up: part files of signals and of quarantined rows, and the count of what is there.

`write_rows` runs in Ray tasks and may run twice for the same rows: the file's name follows from them, and it appears
by rename. The `SignalStore` is the driver's view: which rows are there already, and whether the sum is right.
Called by `pipelines.label`; knows nothing of teachers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsight.data.samples import write_quarantine
from sparsight.data.signals import encode_signals, quarantine_rows, rows_name, signal_rows
from sparsight.errors import ArtifactError
from sparsight.observe import say
from sparsight.records import Quarantined
from sparsight.storage import Storage, open_storage

PART = "part-"
REFUSED = "quarantine-"


def write_rows(labelled: pa.Table, uri: str) -> pa.Table:
    """Write labelled rows (LABELLED_SCHEMA) to a storage; one row comes back: the files and how many rows they hold."""
    storage = open_storage(uri)
    files: list[str] = []
    signals, refused = signal_rows(labelled), quarantine_rows(labelled)
    if signals.num_rows:
        files.append(f"{PART}{rows_name(signals)}.parquet")
        storage.write_bytes(files[-1], encode_signals(signals))
    if refused.num_rows:
        files.append(f"{REFUSED}{rows_name(refused)}.parquet")
        buffer = BytesIO()
        pq.write_table(refused, buffer, compression="zstd")
        storage.write_bytes(files[-1], buffer.getvalue())
    return pa.table({"files": pa.array([files], pa.list_(pa.string())), "rows": [labelled.num_rows]})


@dataclass(frozen=True)
class Part:
    """What is in one file of the draft."""

    ids: tuple[str, ...]
    response_tokens: int
    size_bytes: int


class SignalStore:
    """The draft's files that count, by name: those found when the run began and those its tasks reported."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.parts: dict[str, Part] = {}

    def find(self) -> None:
        """Take up the complete files of an earlier attempt; one that cannot be read is removed and made again."""
        for key in _files(self.storage):
            try:
                self.add([key])
            except (pa.ArrowException, OSError) as error:
                say(f"label: '{key}' of an earlier attempt is damaged ({error}); its rows are labelled again")
                self.storage.delete(key)

    def add(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.parts[key] = _read_part(self.storage, key)

    @property
    def ids(self) -> list[str]:
        return [row for part in self.parts.values() for row in part.ids]

    def drop_strays(self) -> None:
        """Remove files that nobody reported: a writer that outlived its killed driver may leave one behind."""
        for key in _files(self.storage):
            if key not in self.parts:
                self.storage.delete(key)

    def counts(self, wanted: Mapping[str, bool]) -> dict[str, int]:
        """Rows by what became of them; `wanted` says of every input id whether it has anything to label.

        Raises `ArtifactError` unless each wanted row is there exactly once and no other row is.
        """
        ids = self.ids
        labelled = sum(len(part.ids) for key, part in self.parts.items() if key.startswith(PART))
        expected = {row for row, asks in wanted.items() if asks}
        missing, foreign = expected.difference(ids), set(ids).difference(expected)
        faults = {
            "labelled twice": len(ids) - len(set(ids)),
            f"missing (such as '{next(iter(missing), '')}')": len(missing),
            f"not among the samples (such as '{next(iter(foreign), '')}')": len(foreign),
        }
        if any(faults.values()):
            found = ", ".join(f"{count} {fault}" for fault, count in faults.items() if count)
            raise ArtifactError(
                f"'{self.storage.uri}' does not add up: rows {found}; delete the folder and label again"
            )
        return {
            "input": len(wanted),
            "labelled": labelled,
            "quarantined": len(ids) - labelled,
            "skipped": len(wanted) - len(expected),
            "response_tokens": sum(part.response_tokens for part in self.parts.values()),
        }

    @property
    def signal_bytes(self) -> int:
        return sum(part.size_bytes for key, part in self.parts.items() if key.startswith(PART))

    def gather_quarantine(self) -> None:
        """One `quarantine.parquet` in place of the draft's small files."""
        keys = [key for key in self.parts if key.startswith(REFUSED)]
        rows: list[dict[str, Any]] = []
        for key in keys:
            rows += pq.read_table(BytesIO(self.storage.read_bytes(key))).to_pylist()
        rows.sort(key=lambda row: row["id"])
        write_quarantine(self.storage, [Quarantined(row["id"], row["source"], row["reason"]) for row in rows])
        for key in keys:
            self.storage.delete(key)


def _files(storage: Storage) -> list[str]:
    return [key for key in storage.keys("") if key.startswith((PART, REFUSED))]


def _read_part(storage: Storage, key: str) -> Part:
    """Ids and counts of a file; only the columns that hold them are read."""
    filesystem, path = storage.arrow(key)
    size_bytes = int(filesystem.get_file_info(path).size)
    columns = ["id", "answer_lengths"] if key.startswith(PART) else ["id"]
    table = pq.read_table(path, filesystem=filesystem, columns=columns)
    tokens = 0
    if key.startswith(PART):
        tokens = int(table["answer_lengths"].combine_chunks().flatten().to_numpy().sum())
    return Part(tuple(table["id"].to_pylist()), tokens, size_bytes)
