"""A store belongs to one stream, and one bank writes to it."""

import shutil
from pathlib import Path

import pytest
import torch

from sparsight.errors import StreamError
from sparsight.kv.block import KvBlock
from sparsight.kv.header import HEADER
from sparsight.kv.tiers import MemoryBudget, TieredBank
from sparsight.storage import LocalStorage
from tests.unit.kv.random_blocks import PAGE_BYTES, block_of
from tests.unit.kv.small_streams import DISK, assert_holds, filled, put_more, restored, uploaded


def test_a_store_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    store, other = LocalStorage(tmp_path / "store"), LocalStorage(tmp_path / "other")
    uploaded(tmp_path / "stream", 4, store)
    uploaded(tmp_path / "another", 5, other)
    before = {key: other.read_bytes(key) for key in other.keys("")}
    with pytest.raises(StreamError, match=rf"'{tmp_path}/stream' and '{tmp_path}/other' hold different streams"):
        restored(tmp_path / "stream", other)
    other.delete(HEADER)
    with pytest.raises(StreamError, match="is not empty and holds no stream"):
        restored(tmp_path / "stream", other)
    other.write_bytes(HEADER, before[HEADER])
    assert {key: other.read_bytes(key) for key in other.keys("")} == before
    with restored(tmp_path / "stream", store) as bank, restored(tmp_path / "another", other) as another:
        assert_holds(bank, *range(4))
        assert_holds(another, *range(5))


def test_the_last_bank_that_was_restored_is_the_only_one_that_writes(tmp_path: Path) -> None:
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    with filled(folder, 4, store) as first:
        first.upload()
        with restored(tmp_path / "second", store) as second:
            put_more(first, 4, 5, 6)
            put_more(second, 4, 5)
            second.upload()
            for refused in (first.upload, first.clear):
                with pytest.raises(
                    StreamError, match=rf"'{store.uri}' was taken over by the bank in '{tmp_path}/second'"
                ):
                    refused()
            put_more(second, 6, 7)
            second.upload()
            assert_holds(first, *range(7))
    with restored(tmp_path / "third", store) as third:
        assert_holds(third, *range(8))
    with restored(folder, store) as first:  # was left behind, and has no other blocks
        assert_holds(first, *range(8))
        put_more(first, 8)
        first.upload()
    with restored(tmp_path / "fourth", store) as fourth:
        assert_holds(fourth, *range(9))


class TakenOverMidway(LocalStorage):
    """Another bank is restored from it while segment 1 is written."""

    def write_bytes(self, key: str, data: bytes) -> None:
        super().write_bytes(key, data)
        if key == "00001.pages":
            restored(self.root.parent / "second", LocalStorage(self.root)).close()


def test_an_upload_stops_where_another_bank_takes_over(tmp_path: Path) -> None:
    store = TakenOverMidway(tmp_path / "store")
    with filled(tmp_path / "stream", 10, store) as bank:
        with pytest.raises(StreamError, match="was taken over"):
            bank.upload()
        assert {key for key in store.keys("") if key.endswith("index")} == {"00000.index"}


def test_an_upload_of_nothing_new_notices_it_too(tmp_path: Path) -> None:
    store = LocalStorage(tmp_path / "store")
    with filled(tmp_path / "stream", 3, store) as first:
        first.upload()
        restored(tmp_path / "second", store).close()
        with pytest.raises(StreamError, match="was taken over"):
            first.upload()


def test_two_banks_of_one_empty_store_are_noticed(tmp_path: Path) -> None:
    store = LocalStorage(tmp_path / "store")
    with filled(tmp_path / "one", 2, store) as one, filled(tmp_path / "two", 2, store) as two:
        one.upload()
        with pytest.raises(StreamError, match=r"was taken over by the bank in '.*one'"):
            two.upload()


@pytest.mark.parametrize("other_blocks", [1, 2, 4])
def test_a_folder_that_went_another_way_than_the_store_is_refused(tmp_path: Path, other_blocks: int) -> None:
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    uploaded(folder, 4, store)
    shutil.copytree(folder, tmp_path / "copy")
    with restored(tmp_path / "elsewhere", store) as bank:
        put_more(bank, 4, 5, 6)
        bank.upload()
    with restored(tmp_path / "copy") as bank:
        for number in range(4, 4 + other_blocks):
            page_L2GSC = torch.ones_like(block_of(number).page_L2GSC)
            bank.put(KvBlock.from_page(number, 2.0 * number, 2.0 * number + 2, page_L2GSC))
    with pytest.raises(StreamError, match=rf"'{tmp_path}/copy' and its copy in '{store.uri}' went on with different"):
        restored(tmp_path / "copy", store)
    with restored(folder, store) as bank:
        assert_holds(bank, *range(7))


def test_a_bank_that_is_refused_leaves_the_store_to_whoever_has_it(tmp_path: Path) -> None:
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    with filled(folder, 4, store) as bank:
        bank.upload()
        shutil.copytree(folder, tmp_path / "copy")
        put_more(bank, 4, 5, 6)
        bank.upload()
        with restored(tmp_path / "copy") as copy:
            copy.put(KvBlock.from_page(4, 8.0, 10.0, torch.ones_like(block_of(4).page_L2GSC)))
        with pytest.raises(StreamError, match="went on with different blocks"):
            restored(tmp_path / "copy", store)
        with pytest.raises(StreamError, match="give the stream more"):
            TieredBank.restore(tmp_path / "elsewhere", MemoryBudget(PAGE_BYTES), DISK, store)
        put_more(bank, 7)
        bank.upload()
    with restored(tmp_path / "third", store) as third:
        assert_holds(third, *range(8))


def test_a_copy_from_before_a_clear_is_another_stream(tmp_path: Path) -> None:
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    with filled(folder, 4, store) as bank:
        bank.upload()
        shutil.copytree(folder, tmp_path / "copy")
        bank.clear()
        put_more(bank, 0)
        bank.upload()
    with pytest.raises(StreamError, match="hold different streams"):
        restored(tmp_path / "copy", store)
