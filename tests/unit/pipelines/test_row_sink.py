"""Where rows end up, without a cluster: files named by their rows, damaged and stray files, sums that do not add up."""

from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipelines.row_sink import RowKind, RowStore, Tally, write_rows
from sparsight.errors import ArtifactError
from sparsight.records import QUARANTINE_SCHEMA, Quarantined
from sparsight.storage import LocalStorage
from tests.quarantine import read_quarantine

SCHEMA = pa.schema([("id", pa.string()), ("source", pa.string()), ("reason", pa.string()), ("tokens", pa.int64())])


def good_rows(table: pa.Table) -> pa.Table:
    return table.filter(pc.field("reason").is_null()).select(["id", "tokens"])


def bad_rows(table: pa.Table) -> pa.Table:
    return table.filter(pc.field("reason").is_valid()).select(["id", "source", "reason"]).cast(QUARANTINE_SCHEMA)


def tokens(table: pa.Table) -> Tally:
    return {"tokens": sum(table["tokens"].to_pylist())}


GOOD = RowKind("part-", good_rows, columns=("tokens",), tally=tokens)
BAD = RowKind("bad-", bad_rows)


def results(good: list[str], bad: list[str]) -> pa.Table:
    rows = [{"id": row, "source": "s", "reason": None, "tokens": len(row)} for row in good]
    return pa.Table.from_pylist(
        [*rows, *({"id": row, "source": "s", "reason": f"why {row}", "tokens": None} for row in bad)], schema=SCHEMA
    )


def write(folder: Path, good: list[str], bad: list[str]) -> list[str]:
    (row,) = write_rows(results(good, bad), str(folder), (GOOD, BAD)).to_pylist()
    assert row["rows"] == len(good) + len(bad)
    return row["files"]


def store_of(folder: Path) -> RowStore:
    return RowStore(LocalStorage(folder), (GOOD, BAD), "test")


def test_rows_part_ways_and_files_are_named_by_them(tmp_path: Path) -> None:
    files = write(tmp_path, ["aa", "b"], ["c"])
    assert [file.split("-")[0] for file in files] == ["part", "bad"]
    assert write(tmp_path, ["b", "aa"], ["c"]) == files
    assert len(list(tmp_path.iterdir())) == 2
    assert write(tmp_path, [], ["d"])[0].startswith("bad-")


def test_what_is_there_is_found_and_counted(tmp_path: Path) -> None:
    write(tmp_path, ["aa", "b"], ["c"])
    reported = write(tmp_path, ["dddd"], [])
    first, second = store_of(tmp_path), store_of(tmp_path)
    first.find()
    assert sorted(first.ids) == ["aa", "b", "c", "dddd"]
    assert (first.rows(GOOD), first.rows(BAD), first.tally(GOOD)["tokens"], first.tally(BAD)["tokens"]) == (3, 1, 7, 0)
    assert first.size_bytes(GOOD) == sum(path.stat().st_size for path in tmp_path.glob("part-*"))
    second.add(reported)
    assert second.ids == ["dddd"]


def test_damaged_files_are_made_again_and_strays_go(tmp_path: Path) -> None:
    (damaged,) = write(tmp_path, ["aa"], [])
    (tmp_path / damaged).write_bytes(b"PAR1")
    (kept,) = write(tmp_path, ["b"], [])
    store = store_of(tmp_path)
    store.find()
    assert list(store.parts) == [kept]
    write(tmp_path, ["c"], [])
    store.drop_strays()
    assert [path.name for path in tmp_path.iterdir()] == [kept]


@pytest.mark.parametrize(
    ("expected", "fault"),
    [(["a", "b", "c"], "1 missing .such as 'c'"), (["a"], "1 not asked for .such as 'b'"), (["a", "b"], None)],
)
def test_sums_that_do_not_add_up_are_refused(tmp_path: Path, expected: list[str], fault: str | None) -> None:
    write(tmp_path, ["a"], ["b"])
    store = store_of(tmp_path)
    store.find()
    if fault is None:
        store.check(expected)
        return
    with pytest.raises(ArtifactError, match=fault):
        store.check(expected)


def test_a_row_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    write(tmp_path, ["a", "b"], [])
    write(tmp_path, ["a"], [])
    store = store_of(tmp_path)
    store.find()
    with pytest.raises(ArtifactError, match="1 there twice"):
        store.check(["a", "b"])


def test_refused_rows_are_gathered_in_one_file(tmp_path: Path) -> None:
    for rows in (["c"], ["a", "b"]):
        write(tmp_path, [], rows)
    store = store_of(tmp_path)
    store.find()
    store.gather_quarantine(BAD, [Quarantined("0", "file", "early")])
    found = read_quarantine(LocalStorage(tmp_path))
    assert [(row.id, row.reason) for row in found] == [("0", "early"), ("a", "why a"), ("b", "why b"), ("c", "why c")]
    assert [path.name for path in tmp_path.iterdir()] == ["quarantine.parquet"]


def more_about(table: pa.Table) -> pa.Table:
    return good_rows(table).append_column("more", pa.array([["x"]] * good_rows(table).num_rows))


def encode_arrow(table: pa.Table) -> bytes:
    buffer = BytesIO()
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


MORE = RowKind("more-", more_about, encode_arrow, ("tokens",), tokens, suffix=".arrow", half_of=GOOD.prefix)


def halves(folder: Path, *rows: list[str]) -> RowStore:
    """A store found again after each list of rows was written with both halves."""
    for good in rows:
        write_rows(results(good, []), str(folder), (MORE, GOOD, BAD))
    store = RowStore(LocalStorage(folder), (MORE, GOOD, BAD), "test")
    store.find()
    return store


def test_a_second_half_is_counted_for_itself_and_its_rows_once(tmp_path: Path) -> None:
    store = halves(tmp_path, ["aa", "b"], ["c"])
    assert sorted(store.ids) == ["aa", "b", "c"]
    assert store.tally(MORE) == store.tally(GOOD) == {"tokens": 4}
    store.check(["aa", "b", "c"])


@pytest.mark.parametrize("lost", ["part-*.parquet", "more-*.arrow"])
@pytest.mark.parametrize("damage", [True, False])
def test_neither_half_stays_without_the_other(tmp_path: Path, lost: str, damage: bool) -> None:
    halves(tmp_path, ["aa", "b"])
    (path,) = tmp_path.glob(lost)
    if damage:
        path.write_bytes(b"nothing")
    else:
        path.unlink()
    store = halves(tmp_path)
    assert store.ids == []
    assert list(tmp_path.iterdir()) == []
    store = halves(tmp_path, ["aa", "b"])
    store.check(["aa", "b"])


def test_a_half_that_vanished_while_rows_were_made_is_a_fault(tmp_path: Path) -> None:
    store = halves(tmp_path, ["aa"])
    del store.parts[next(key for key in store.parts if key.startswith("more-"))]
    with pytest.raises(ArtifactError, match=r"1 in files of which a half is missing \(such as 'part-"):
        store.check(["aa"])
