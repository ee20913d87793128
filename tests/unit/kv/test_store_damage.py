"""Damaged, missing and unreadable files of a stream that has a store: whole copies are used, and kept."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sparsight.errors import StorageError, StreamError
from sparsight.kv.header import SINK
from sparsight.kv.tiers import TieredBank
from sparsight.storage import LocalStorage
from tests.unit.kv.random_blocks import PAGE_BYTES, block_of, sink_of
from tests.unit.kv.small_streams import (
    DISK,
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


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("file", ["index", "pages"])
def test_what_the_store_has_is_never_lost(tmp_path: Path, number: int, file: str) -> None:
    """Also what is in the segment that is still open, and the last record of all."""
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    uploaded(folder, 8, store)
    flip(folder / f"{number // 3:05d}.{file}", number % 3 * (RECORD if file == "index" else PAGE_BYTES) + IN_MEAN_KEYS)
    with restored(folder, store) as bank:
        assert not bank.lost
        assert_holds(bank, *range(8))
        put_more(bank, 8, 9)
        bank.upload()
        assert_holds(bank, *range(10))
    for place in (folder, tmp_path / "elsewhere"):
        with restored(place, store) as bank:
            assert_holds(bank, *range(10))


@pytest.mark.parametrize("file", ["index", "pages"])
def test_damage_does_not_replace_a_whole_copy(tmp_path: Path, file: str) -> None:
    """The open segment's copy is whole; the bank that made it goes on with damaged files until the segment is full."""
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    with filled(folder, 5, store) as bank:
        bank.upload()
        (folder / f"00001.{file}").write_bytes(b"\xaa" * (2 * RECORD if file == "index" else PAGE_BYTES + 1))
        bank.upload()
        put_more(bank, 5)
        bank.upload()
    with restored(tmp_path / "elsewhere", store) as bank:
        assert_holds(bank, *range(6))


def test_the_open_segment_comes_with_its_pages(tmp_path: Path) -> None:
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    uploaded(folder, 5, store)
    with restored(tmp_path / "elsewhere", store) as bank:
        store.delete("open-00001.pages")
        assert_holds(bank, *range(5))


def test_a_copy_is_checked_before_it_replaces_a_page(tmp_path: Path) -> None:
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    uploaded(folder, 5, store)
    flip(folder / "00001.index", RECORD + IN_MEAN_KEYS)
    flip(tmp_path / "store" / "open-00001.pages", PAGE_BYTES)
    with restored(folder, store) as bank:
        assert_holds(bank, *range(5))


def test_a_missing_index_comes_from_the_store_as_far_as_it_goes(tmp_path: Path) -> None:
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    with filled(folder, 7, store) as bank:
        bank.upload()
        put_more(bank, 7)
    for path in folder.glob("*.index"):
        path.unlink()
    for _ in range(2):
        with restored(folder, store) as bank:
            assert list(bank.lost) == [7]
            assert_holds(bank, *range(7))


def test_a_damaged_sink_is_refused_or_comes_from_the_store(tmp_path: Path) -> None:
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    uploaded(folder, 2, store)
    flip(folder / SINK, -1)
    with pytest.raises(StreamError, match="holds no stream that can be restored"):
        restored(folder)
    (folder / SINK).write_bytes(block_of(-1, tokens=4).to_bytes())
    with pytest.raises(StreamError, match=r"has the sink\.safetensors of another stream"):
        restored(folder)
    with restored(folder, store) as bank:
        assert bank.sink.digest == sink_of().digest
        assert_holds(bank, 0, 1)


def put_without_the_store(bank: TieredBank, place: Path, *numbers: int) -> None:
    """Blocks come while the store cannot be written; then it is back."""
    place.write_text("no folder")
    put_more(bank, *numbers)
    with pytest.raises(StorageError):
        bank.upload()
    place.unlink()


def test_pages_that_are_missing_before_they_were_copied_stop_nothing(tmp_path: Path) -> None:
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    with filled(folder, 0, store) as bank:
        put_without_the_store(bank, tmp_path / "store", *range(9))
        (folder / "00001.pages").unlink()
        bank.upload()
        put_more(bank, *range(9, 30))
        bank.upload()
        left = [*range(3), *range(6, 30)]
        assert sorted(bank.verify()) == [3, 4, 5]
        assert_holds(bank, *left)
        assert sum(path.stat().st_size for path in folder.glob("*.pages")) <= DISK.disk_bytes
    with restored(tmp_path / "elsewhere", store) as bank:
        assert sorted(bank.verify()) == [3, 4, 5]
        assert_holds(bank, *left)


def make_unreadable(path: Path, by: str) -> Callable[[], object]:
    """The file is there and cannot be opened, or opens and cannot be read; what is returned brings it back."""
    aside = path.rename(path.with_suffix(".aside"))
    if by == "open":
        path.symlink_to(path.name)  # itself
        return lambda: aside.replace(path)
    path.mkdir()
    return lambda: (path.rmdir(), aside.rename(path))


@pytest.mark.parametrize("by", ["open", "read"])
def test_pages_that_cannot_be_read_now_are_copied_later(tmp_path: Path, by: str) -> None:
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    with filled(folder, 0, store) as bank:
        put_without_the_store(bank, tmp_path / "store", *range(6))
        mend = make_unreadable(folder / "00000.pages", by)
        with pytest.raises(StorageError, match=r"cannot read '.*00000\.pages'"):
            bank.upload()
        assert not store.exists("00000.index")
        put_more(bank, *range(6, 30))
        mend()
        bank.upload()
    with restored(tmp_path / "elsewhere", store) as bank:
        assert_holds(bank, *range(30))


@pytest.mark.parametrize("by", ["open", "read"])
def test_pages_that_cannot_be_read_now_are_not_lost(tmp_path: Path, by: str) -> None:
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    uploaded(folder, 9, store)
    with TieredBank.restore(folder, ROOM_FOR_FEW, replace(DISK, disk_bytes=2**20)) as bank:
        mend = make_unreadable(folder / "00000.pages", by)
        with pytest.raises(StreamError, match=f"cannot be read now, but is not lost: cannot {by}"):
            bank.gather(0, [0, 1, 2])
        assert not bank.lost
        mend()
        assert_holds(bank, *range(9))
    make_unreadable(folder / "00000.pages", by)
    with restored(folder, store) as bank:
        assert_holds(bank, *range(9))


def test_others_leave_in_place_of_a_segment_that_cannot_be_removed(tmp_path: Path) -> None:
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    with filled(folder, 6, store) as bank:
        bank.upload()
        mend = make_unreadable(folder / "00000.pages", by="read")  # nor does a folder let itself be unlinked
        for number in range(6, 45):
            put_more(bank, number)
        bank.flush()
        pages = [path for path in folder.glob("*.pages") if path.is_file()]
        assert sum(path.stat().st_size for path in [*pages, folder / "00000.aside"]) <= DISK.disk_bytes
        assert_holds(bank, *range(45))
        mend()
        put_more(bank, *range(45, 60))
        bank.upload()
        assert not (folder / "00000.pages").exists()
        assert_holds(bank, *range(60))


def test_a_sector_that_the_disk_cannot_read_costs_its_segment_no_other_page(tmp_path: Path) -> None:
    """What can be read is copied, once, and the segment leaves the folder like any other."""
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    with filled(folder, 0, store) as bank:
        put_without_the_store(bank, tmp_path / "store", *range(6))
        (folder / "00000.pages").unlink()
        (folder / "00000.pages").symlink_to("/proc/self/mem")  # reading its beginning is an input/output error
        bank.upload()
        put_more(bank, *range(6, 45))
        bank.upload()
        assert sorted(bank.verify()) == [0, 1, 2]
        assert_holds(bank, *range(3, 45))
        assert not (folder / "00000.pages").is_symlink()


def test_what_the_disk_cannot_read_comes_back_from_the_store(tmp_path: Path) -> None:
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    uploaded(folder, 9, store)
    (folder / "00000.pages").unlink()
    (folder / "00000.pages").symlink_to("/proc/self/mem")
    with TieredBank.restore(folder, ROOM_FOR_FEW, DISK, store) as bank:
        for _ in range(8):
            bank.gather(0, [1])
            bank.gather(0, [3, 4, 5, 6, 7, 8])
            bank.gather(1, [3, 4, 5, 6, 7, 8])
        assert not (folder / "00000.pages").is_symlink()
        assert_holds(bank, *range(9))


def test_a_segment_that_comes_back_replaces_no_whole_page(tmp_path: Path) -> None:
    """Page 1 is damaged in the folder, page 2 in the store: asking often for 1 brings the segment."""
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    uploaded(folder, 9, store)
    flip(folder / "00000.pages", PAGE_BYTES)
    flip(tmp_path / "store" / "00000.pages", 2 * PAGE_BYTES)
    damaged = (folder / "00000.pages").read_bytes()
    with TieredBank.restore(folder, ROOM_FOR_FEW, DISK, store) as bank:
        for _ in range(8):
            bank.gather(0, [1])
            bank.gather(0, [3, 4, 5, 6, 7, 8])
            bank.gather(1, [3, 4, 5, 6, 7, 8])
        assert (folder / "00000.pages").read_bytes() != damaged
        assert_holds(bank, *range(9))


def test_what_a_killed_upload_left_is_removed(tmp_path: Path) -> None:
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    with filled(folder, 2, store) as bank:
        bank.upload()
        left = {key: store.read_bytes(key) for key in ("open-00000.index", "open-00000.pages")}
        put_more(bank, 2, 3)
        bank.upload()
    for key, data in left.items():
        store.write_bytes(key, data)
    with restored(folder, store) as bank:
        assert_holds(bank, *range(4))
    assert {key for key in store.keys("") if key.startswith("open")} == {"open-00001.index", "open-00001.pages"}
