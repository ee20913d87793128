"""Damaged and missing files of a stream without a store: refused, or reported, and never taken for a torn end."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from sparsight.errors import LostBlockError, StreamError
from sparsight.kv.header import HEADER, Header
from sparsight.kv.tiers import TieredBank
from sparsight.storage import LocalStorage
from tests.unit.kv.random_blocks import PAGE_BYTES, block_of
from tests.unit.kv.small_streams import (
    DISK,
    IN_HEAD,
    IN_MEAN_KEYS,
    RECORD,
    ROOM_FOR_FEW,
    assert_holds,
    filled,
    flip,
    put_more,
    restored,
    uploaded,
)


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    uploaded(folder, 4, store)
    whole = (folder / HEADER).read_bytes()
    for place in range(len(whole)):
        (folder / HEADER).write_bytes(whole)
        flip(folder / HEADER, place)
        with pytest.raises(StreamError, match=rf"'{folder}'.*its stream.json (is damaged|was written by another)"):
            restored(folder, store if place % 2 else None)
    with pytest.raises(StreamError, match="holds a stream already"):
        filled(folder, 0)
    (folder / HEADER).write_bytes(store.read_bytes(HEADER))
    with restored(folder, store) as bank:
        assert_holds(bank, *range(4))


def test_segments_without_a_header_are_no_place_for_a_new_stream(tmp_path: Path) -> None:
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    uploaded(folder, 4, store)
    (folder / HEADER).unlink()
    with pytest.raises(StreamError, match="holds a stream already"):
        filled(folder, 1)
    for given in (None, store):
        with pytest.raises(StreamError, match="cannot read"):
            restored(folder, given)


@pytest.mark.parametrize("place", [IN_HEAD, IN_MEAN_KEYS, RECORD - 1])
@pytest.mark.parametrize("damaged", [[0, 1, 2], [1], [2], [3], [4], [3, 4], range(5)])
def test_damaged_records_lose_their_blocks(tmp_path: Path, damaged: list[int], place: int) -> None:
    with filled(tmp_path, 5):
        pass
    for number in damaged:
        flip(tmp_path / f"{number // 3:05d}.index", number % 3 * RECORD + place)
    left = [number for number in range(5) if number not in damaged]
    with restored(tmp_path) as bank:
        assert list(bank.lost) == list(damaged)
        assert_holds(bank, *left)
        with pytest.raises(LostBlockError, match=f"block {damaged[0]} is lost, its record is damaged or missing"):
            bank.get(damaged[0])
        with pytest.raises(StreamError, match="cannot follow"):
            bank.put(block_of(3))
        put_more(bank, 5, 6)
    with restored(tmp_path) as bank:
        assert list(bank.lost) == list(damaged)
        assert_holds(bank, *left, 5, 6)


def test_a_damaged_record_still_names_its_block(tmp_path: Path) -> None:
    with filled(tmp_path, 0) as bank:
        put_more(bank, 4, 9, 11, 20)
    for slot in (1, 2):
        flip(tmp_path / "00000.index", slot * RECORD + IN_MEAN_KEYS)
    flip(tmp_path / "00001.index", IN_MEAN_KEYS)
    with restored(tmp_path) as bank:
        assert list(bank.lost) == [9, 11, 20]
        put_more(bank, 21)
        assert_holds(bank, 4, 21)


def test_missing_indexes_lose_the_blocks_whose_pages_are_there(tmp_path: Path) -> None:
    with filled(tmp_path, 7):
        pass
    (tmp_path / "00001.index").unlink()
    (tmp_path / "00002.index").unlink()
    for _ in range(2):
        with restored(tmp_path) as bank:
            assert list(bank.lost) == [3, 4, 5, 6]
            assert_holds(bank, 0, 1, 2)
    with restored(tmp_path) as bank:
        put_more(bank, 7)
    index = tmp_path / "00002.index"
    index.write_bytes(index.read_bytes()[:-1])
    with restored(tmp_path) as bank:
        assert list(bank.lost) == [3, 4, 5, 6]
        put_more(bank, 7, 8)
        assert_holds(bank, 0, 1, 2, 7, 8)


def test_pages_are_never_there_before_their_index(tmp_path: Path) -> None:
    with filled(tmp_path, 0) as bank:
        index = tmp_path / "00000.index"
        index.symlink_to(index.name)  # itself: it cannot be made
        bank.put(block_of(0))
        with pytest.raises(StreamError, match="in memory only"):
            bank.flush()
        assert not (tmp_path / "00000.pages").exists()
        index.unlink()
        assert_holds(bank, 0)


@pytest.mark.parametrize(
    "left", [b"", b"\x01" * (RECORD - 1), b"\0" * RECORD, b"\x01" * 50 + b"\0" * (2 * RECORD - 50)]
)
def test_what_a_killed_writer_leaves_is_no_damage(tmp_path: Path, left: bytes) -> None:
    """Pages without records, half a record, and after a power cut sectors of zeros."""
    with filled(tmp_path, 4):
        pass
    index, pages = tmp_path / "00001.index", tmp_path / "00001.pages"
    index.write_bytes(index.read_bytes() + left)
    pages.write_bytes(pages.read_bytes() + b"\x07" * PAGE_BYTES)
    with restored(tmp_path) as bank:
        assert not bank.lost
        put_more(bank, 4)
    with restored(tmp_path) as bank:
        assert not bank.lost
        put_more(bank, 5, 6)
        assert_holds(bank, *range(7))


def test_a_clear_that_was_killed_has_cleared(tmp_path: Path) -> None:
    with filled(tmp_path, 4):
        pass
    header = Header.from_bytes((tmp_path / HEADER).read_bytes())
    (tmp_path / HEADER).write_bytes(replace(header, format=None).to_bytes())
    with restored(tmp_path) as bank:
        assert len(bank) == len(bank.lost) == 0
        assert not list(tmp_path.glob("0*"))
        put_more(bank, 0)
        assert_holds(bank, 0)


def test_what_the_disk_itself_cannot_read_is_lost(tmp_path: Path) -> None:
    """The file is there and opens, and reading it is an input/output error, as for a broken sector."""
    with filled(tmp_path, 9):
        pass
    with TieredBank.restore(tmp_path, ROOM_FOR_FEW, replace(DISK, disk_bytes=2**20)) as bank:
        (tmp_path / "00000.pages").unlink()
        (tmp_path / "00000.pages").symlink_to("/proc/self/mem")  # nothing is mapped at its beginning
        with pytest.raises(LostBlockError, match="is damaged"):
            bank.gather(0, [0])
        assert sorted(bank.verify()) == [0, 1, 2]
        assert_holds(bank, *range(3, 9))


def test_what_a_killed_process_left_unfinished_is_removed(tmp_path: Path) -> None:
    with filled(tmp_path, 4):
        pass
    (tmp_path / ".00000.pages.0123456789abcdef.partial").write_bytes(b"\0" * PAGE_BYTES)
    with restored(tmp_path) as bank:
        assert_holds(bank, *range(4))
        assert not list(tmp_path.glob(".*"))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_announcing_rows_that_cannot_be_announced_costs_no_descriptor(tmp_path: Path) -> None:
    with filled(tmp_path, 9):
        pass
    from_pipe, into_pipe = os.pipe()
    with TieredBank.restore(tmp_path, ROOM_FOR_FEW, replace(DISK, disk_bytes=2**20)) as bank:
        (tmp_path / "00000.pages").unlink()
        (tmp_path / "00000.pages").symlink_to(f"/proc/self/fd/{from_pipe}")
        before = open_files()
        with pytest.raises(StreamError, match="cannot be read now"):
            bank.gather(0, [0, 1, 2])
        assert open_files() == before
    os.close(from_pipe)
    os.close(into_pipe)
