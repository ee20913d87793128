"""Streams whose older segments lie in a store: the same answers, in the folder's budget, on another machine, mended."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsight.errors import LostBlockError, StreamError
from sparsight.kv.bank import RamBank
from sparsight.kv.disk import DiskBudget
from sparsight.kv.tiers import MemoryBudget, TieredBank
from sparsight.storage import Storage, open_storage
from tests.unit.kv.random_blocks import LAYERS, PAGE_BYTES, block_of, contents, sink_of

MEMORY = MemoryBudget(12 * PAGE_BYTES, recent_blocks=1)
SEGMENT = 3 * PAGE_BYTES
INDEXES = 40 * PAGE_BYTES // 4
DISK = DiskBudget(4 * SEGMENT + INDEXES, store_bytes=2**20, segment_bytes=SEGMENT)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage(str(tmp_path / "store"))
    new_bucket: Callable[[], str] = request.getfixturevalue("new_bucket")
    return open_storage(f"s3://{new_bucket()}/streams/one")


def filled(folder: Path, store: Storage, blocks: int) -> TieredBank:
    bank = TieredBank.create(folder, sink_of(), MEMORY, DISK, store)
    for number in range(blocks):
        bank.put(block_of(number))
    return bank


def assert_same(bank: TieredBank, blocks: int) -> None:
    twin = RamBank(sink_of(), 2**30)
    for number in range(blocks):
        twin.put(block_of(number))
    assert contents(bank) == contents(twin)
    numbers = list(range(blocks))
    for layer in range(LAYERS):
        assert torch.equal(bank.gather(layer, numbers), twin.gather(layer, numbers))


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.pages"))


def test_the_folder_stays_in_its_budget_and_nothing_is_lost(tmp_path: Path, store: Storage) -> None:
    folder = tmp_path / "stream"
    with filled(folder, store, 40) as bank:
        bank.flush()
        assert folder_bytes(folder) <= 4 * SEGMENT
        assert_same(bank, 40)
        assert folder_bytes(folder) <= 4 * SEGMENT
    with TieredBank.restore(folder, MEMORY, DISK, store) as bank:
        assert_same(bank, 40)
        assert not bank.lost


def test_another_machine_goes_on_from_the_store_alone(tmp_path: Path, store: Storage) -> None:
    with filled(tmp_path / "here", store, 10) as bank:
        bank.upload()
        bank.put(block_of(10))
        bank.put(block_of(11))
        bank.upload()
    shutil.rmtree(tmp_path / "here")
    with TieredBank.restore(tmp_path / "there", MEMORY, DISK, store) as bank:
        assert_same(bank, 12)
        for number in (12, 13):
            bank.put(block_of(number))
        bank.upload()
        assert_same(bank, 14)
    with TieredBank.restore(tmp_path / "elsewhere", MEMORY, DISK, store) as bank:
        assert_same(bank, 14)
    assert not [key for key in store.keys("") if key.startswith("open-00003")], "a full segment replaces its open copy"


def test_pages_are_read_alone_until_their_segment_is_worth_bringing(tmp_path: Path, store: Storage) -> None:
    folder, twin = tmp_path / "stream", RamBank(sink_of(), 2**30)
    with filled(folder, store, 9) as bank:
        bank.upload()
    for number in range(9):
        twin.put(block_of(number))
    for name in ("00000.pages", "00001.pages"):
        (folder / name).unlink()
    room_for_one = MemoryBudget(9 * PAGE_BYTES // 2, recent_blocks=0)
    with TieredBank.restore(folder, room_for_one, DISK, store) as bank:
        assert torch.equal(bank.gather(0, [1]), twin.gather(0, [1]))
        store.delete("00000.pages")
        assert torch.equal(bank.gather(1, [1]), twin.gather(1, [1])), "all layers came in one request"
        for number in (3, 4, 5):
            assert bank.get(number).digest == twin.get(number).digest
        assert not list(folder.glob("0000[01].pages"))
        assert torch.equal(bank.gather(0, [4, 3]), twin.gather(0, [4, 3]))
        assert (folder / "00001.pages").exists()
        assert not bank.lost


def test_a_damaged_or_missing_page_is_mended_from_the_store(tmp_path: Path, store: Storage) -> None:
    folder = tmp_path / "stream"
    with filled(folder, store, 9) as bank:
        bank.upload()
    (folder / "00000.pages").write_bytes(b"\0" * SEGMENT)
    (folder / "00001.pages").unlink()
    with TieredBank.restore(folder, MEMORY, DISK, store) as bank:
        assert_same(bank, 9)
        assert not bank.lost


def test_what_the_store_has_lost_is_reported(tmp_path: Path, store: Storage) -> None:
    folder = tmp_path / "stream"
    with filled(folder, store, 9) as bank:
        bank.upload()
    store.delete("00000.pages")
    store.write_bytes("00001.pages", b"\0" * SEGMENT)
    for path in folder.glob("*.pages"):
        path.unlink()
    with TieredBank.restore(folder, MEMORY, DISK, store) as bank:
        with pytest.raises(LostBlockError, match="is missing"):
            bank.gather(0, [0])
        assert sorted(bank.verify()) == [0, 1, 2, 3, 4, 5]
        assert bank.index().numbers_N.tolist() == [6, 7, 8]


def test_clear_empties_the_store_too(tmp_path: Path, store: Storage) -> None:
    with filled(tmp_path / "stream", store, 9) as bank:
        bank.upload()
        bank.clear()
        assert list(store.keys("")) == ["owner"]
        bank.put(block_of(0))
        bank.upload()
    with TieredBank.restore(tmp_path / "other", MEMORY, DISK, store) as bank:
        assert_same(bank, 1)


def test_a_store_that_is_taken_and_budgets_that_do_not_fit_are_refused(tmp_path: Path, store: Storage) -> None:
    with filled(tmp_path / "stream", store, 4) as bank:
        bank.upload()
    with pytest.raises(StreamError, match="is not empty: restore the stream in it"):
        TieredBank.create(tmp_path / "other", sink_of(), MEMORY, DISK, store)
    with pytest.raises(StreamError, match="no room for three segments"):
        TieredBank.restore(tmp_path / "stream", MEMORY, DiskBudget(2 * SEGMENT, 2**20, SEGMENT // 3), store)
    small = DiskBudget(4 * SEGMENT, store_bytes=5 * PAGE_BYTES, segment_bytes=SEGMENT)
    with (
        TieredBank.restore(tmp_path / "stream", MEMORY, small, store) as bank,
        pytest.raises(StreamError, match="memory is full: 4 blocks"),
    ):
        bank.put(block_of(4))


def test_parts_are_read_on_where_the_folder_has_no_room_for_the_whole(tmp_path: Path, store: Storage) -> None:
    folder = tmp_path / "stream"
    with filled(folder, store, 40) as bank:
        bank.upload()
    without_room = DiskBudget(3 * SEGMENT, store_bytes=2**20, segment_bytes=SEGMENT)
    with TieredBank.restore(folder, MEMORY, without_room, store) as bank:
        for _ in range(3):  # main memory holds a few blocks: most are read from below each time
            assert_same(bank, 40)


def test_a_store_that_does_not_answer_loses_nothing(tmp_path: Path, new_bucket: Callable[[], str]) -> None:
    folder, bucket = tmp_path / "stream", new_bucket()
    store = open_storage(f"s3://{bucket}/stream")
    with filled(folder, store, 9) as bank:
        bank.upload()
    (folder / "00000.pages").rename(tmp_path / "aside")
    with TieredBank.restore(folder, MEMORY, DISK, store) as bank:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "bucket", "no-such-bucket")
            with pytest.raises(
                StreamError, match=r"block 0 cannot be read now, but is not lost: .*check the URI, the AWS_"
            ):
                bank.gather(0, [0])
            assert torch.equal(bank.gather(0, [8]), block_of(8).page_L2GSC[:1])
        assert_same(bank, 9)
