"""Where the rows of a long pass over samples end up: part files by kind of row, and the count of what is there.

`write_rows` runs in Ray tasks and may run twice for the same rows: a file's name follows from them, and it appears
by rename. The `RowStore` is the driver's view: which rows are there already, and whether the sum is right. Shared by
labelling and pair making, which say what kinds of rows they have; knows nothing of models.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsight.data.samples import write_quarantine
from sparsight.data.signals import rows_name
from sparsight.errors import ArtifactError
from sparsight.observe import say
from sparsight.records import Quarantined
from sparsight.storage import Storage, open_storage

Tally = Mapping[str, int]


def nothing(table: pa.Table) -> Tally:
    """Counts no more than rows."""
    return {}


def encode_table(table: pa.Table) -> bytes:
    """A plain Parquet file."""
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


@dataclass(frozen=True)
class RowKind:
    """One kind of row: how its files' names begin and end, which rows of a worker's table it is, and how a file is
    encoded.

    `tally` counts what is in a file from its `columns`. All functions are those of modules: they travel to the tasks.
    """

    prefix: str
    select: Callable[[pa.Table], pa.Table]
    encode: Callable[[pa.Table], bytes] = encode_table
    columns: tuple[str, ...] = ()
    tally: Callable[[pa.Table], Tally] = nothing
    suffix: str = ".parquet"
    """`.arrow` for Arrow files."""
    half_of: str | None = None
    """For a kind whose files hold more about the same rows: the prefix of the files that they belong to, one each. Its
    rows are not counted again, and neither half stays without the other."""

    def name_of(self, rows: pa.Table) -> str:
        return f"{self.prefix}{rows_name(rows)}{self.suffix}"


def write_rows(results: pa.Table, uri: str, kinds: Sequence[RowKind]) -> pa.Table:
    """Write a worker's results to a storage; one row comes back: the files and how many rows they hold."""
    storage = open_storage(uri)
    files: list[str] = []
    for kind in kinds:
        rows = kind.select(results)
        if rows.num_rows:
            files.append(kind.name_of(rows))
            storage.write_bytes(files[-1], kind.encode(rows))
    return pa.table({"files": pa.array([files], pa.list_(pa.string())), "rows": [results.num_rows]})


@dataclass(frozen=True)
class Part:
    """What is in one file of the draft."""

    kind: RowKind
    ids: tuple[str, ...]
    tally: Tally
    size_bytes: int


class RowStore:
    """The draft's files that count, by name: those found when the run began and those its tasks reported."""

    def __init__(self, storage: Storage, kinds: Sequence[RowKind], stage: str) -> None:
        self.storage = storage
        self.kinds = tuple(kinds)
        self.stage = stage
        self.parts: dict[str, Part] = {}

    def find(self) -> None:
        """Take up the complete files of an earlier attempt; one that cannot be read is removed and made again."""
        for key in self._files():
            try:
                self.add([key])
            except (pa.ArrowException, OSError) as error:
                say(f"{self.stage}: '{key}' of an earlier attempt is damaged ({error}); its rows are made again")
                self.storage.delete(key)
        for key in [key for key in self.parts if not self._is_whole(key)]:
            self.storage.delete(key)
            del self.parts[key]

    def add(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.parts[key] = self._read_part(key)

    @property
    def ids(self) -> list[str]:
        return [row for part in self.parts.values() if part.kind.half_of is None for row in part.ids]

    def drop_strays(self) -> None:
        """Remove files that nobody reported: a writer that outlived its killed driver may leave one behind."""
        for key in self._files():
            if key not in self.parts:
                self.storage.delete(key)

    def check(self, expected: Collection[str]) -> None:
        """Raises `ArtifactError` unless each expected row is there exactly once and no other row is."""
        ids, wanted = self.ids, set(expected)
        missing, foreign = wanted.difference(ids), set(ids).difference(wanted)
        halves = [key for key in self.parts if not self._is_whole(key)]
        faults = {
            f"in files of which a half is missing (such as '{next(iter(halves), '')}')": len(halves),
            "there twice": len(ids) - len(set(ids)),
            f"missing (such as '{next(iter(missing), '')}')": len(missing),
            f"not asked for (such as '{next(iter(foreign), '')}')": len(foreign),
        }
        if any(faults.values()):
            found = ", ".join(f"{count} {fault}" for fault, count in faults.items() if count)
            raise ArtifactError(f"'{self.storage.uri}' does not add up: rows {found}; delete the folder and run again")

    def rows(self, kind: RowKind) -> int:
        return sum(len(part.ids) for part in self._parts_of(kind))

    def tally(self, kind: RowKind) -> Counter[str]:
        """What all files of a kind hold; 0 for what none speaks of."""
        total: Counter[str] = Counter()
        for part in self._parts_of(kind):
            total.update(part.tally)
        return total

    def size_bytes(self, kind: RowKind) -> int:
        return sum(part.size_bytes for part in self._parts_of(kind))

    def gather(self, kind: RowKind) -> list[dict[str, Any]]:
        """All rows of a kind, by id, taken out of the draft's small files."""
        keys = [key for key, part in self.parts.items() if part.kind == kind]
        rows = [row for key in keys for row in pq.read_table(BytesIO(self.storage.read_bytes(key))).to_pylist()]
        for key in keys:
            self.storage.delete(key)
        return sorted(rows, key=lambda row: row["id"])

    def gather_quarantine(self, kind: RowKind, others: Iterable[Quarantined] = ()) -> None:
        """One `quarantine.parquet` in place of the draft's small files; `others` are rows that no worker saw."""
        rows = [Quarantined(row["id"], row["source"], row["reason"]) for row in self.gather(kind)]
        write_quarantine(self.storage, [*others, *rows])

    def _parts_of(self, kind: RowKind) -> list[Part]:
        return [part for part in self.parts.values() if part.kind == kind]

    def _is_whole(self, key: str) -> bool:
        """Whether the other half of a file is there, if the same rows must be in a file of another kind."""
        kind = self.parts[key].kind
        others = [other for other in self.kinds if kind.prefix == other.half_of or kind.half_of == other.prefix]
        name = key.removeprefix(kind.prefix).removesuffix(kind.suffix)
        return all(f"{other.prefix}{name}{other.suffix}" in self.parts for other in others)

    def _files(self) -> list[str]:
        prefixes = tuple(kind.prefix for kind in self.kinds)
        return [key for key in self.storage.keys("") if key.startswith(prefixes)]

    def _read_part(self, key: str) -> Part:
        """Ids and counts of a file; only the columns that hold them are read."""
        kind = next(kind for kind in self.kinds if key.startswith(kind.prefix))
        filesystem, path = self.storage.arrow(key)
        size_bytes = int(filesystem.get_file_info(path).size)
        if kind.suffix == ".arrow":
            with filesystem.open_input_file(path) as file:
                table = _arrow_columns(file, ["id", *kind.columns])
        else:
            table = pq.read_table(path, filesystem=filesystem, columns=["id", *kind.columns])
        return Part(kind, tuple(table["id"].to_pylist()), kind.tally(table), size_bytes)


def _arrow_columns(file: pa.NativeFile, columns: Sequence[str]) -> pa.Table:
    names = pa.ipc.open_file(file).schema.names
    options = pa.ipc.IpcReadOptions(included_fields=[names.index(name) for name in columns])
    return pa.ipc.open_file(file, options=options).read_all()
