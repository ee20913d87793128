"""The bank in tiers: equal to the bank in main memory, within its budgets, through damage, a full disk and restarts."""

import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sparsight.errors import LostBlockError, StorageError, StreamError
from sparsight.kv.bank import RamBank
from sparsight.kv.disk import DiskBudget
from sparsight.kv.page import Encoding
from sparsight.kv.tiers import MemoryBudget, TieredBank
from tests.unit.kv.random_blocks import LAYERS, PAGE_BYTES, block_of, contents, sink_of

MEMORY = MemoryBudget(9 * PAGE_BYTES, recent_blocks=2)
DISK = DiskBudget(2**20, segment_bytes=4 * PAGE_BYTES)


def twin_of(blocks: int, encoding: Encoding = "plain") -> RamBank:
    twin = RamBank(sink_of(), 2**30)
    for number in range(blocks):
        twin.put(block_of(number, encoding=encoding))
    return twin


def filled(folder: Path, blocks: int, memory: MemoryBudget = MEMORY, disk: DiskBudget = DISK) -> TieredBank:
    bank = TieredBank.create(folder, sink_of(), memory, disk)
    for number in range(blocks):
        bank.put(block_of(number))
    return bank


def assert_same(bank: TieredBank, twin: RamBank) -> None:
    assert contents(bank) == contents(twin)
    numbers = twin.index().numbers_N.flip(0).tolist()
    for layer in range(LAYERS):
        assert torch.equal(bank.gather(layer, numbers + numbers[:3]), twin.gather(layer, numbers + numbers[:3]))


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """Files cannot grow beyond that, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("encoding", ["plain", "int8", "int4"])
def test_a_stream_larger_than_memory_is_the_same(tmp_path: Path, encoding: Encoding) -> None:
    with TieredBank.create(tmp_path, sink_of(), MEMORY, DISK) as bank:
        for number in range(30):
            bank.put(block_of(number, encoding=encoding))
            bank.put(block_of(number, encoding=encoding))
        assert_same(bank, twin_of(30, encoding))
    with TieredBank.restore(tmp_path, MEMORY, DISK) as bank:
        assert_same(bank, twin_of(30, encoding))
        bank.put(block_of(29, encoding=encoding))
        bank.put(block_of(30, encoding=encoding))
        assert_same(bank, twin_of(31, encoding))


def test_a_device_in_front_changes_nothing(tmp_path: Path) -> None:
    memory = MemoryBudget(8 * PAGE_BYTES, device_bytes=3 * PAGE_BYTES, recent_blocks=2)
    with filled(tmp_path, 20, memory) as bank:
        for _ in range(2):
            assert_same(bank, twin_of(20))


def test_gathered_tensors_and_snapshots_are_the_callers(tmp_path: Path) -> None:
    with filled(tmp_path, 10) as bank:
        snapshot = bank.index()
        before = snapshot.mean_keys_LNGC.clone()
        bank.gather(1, [4, 0]).zero_()
        bank.put(block_of(10))
        assert torch.equal(snapshot.mean_keys_LNGC, before)
        assert_same(bank, twin_of(11))


def test_a_block_that_was_put_or_got_is_the_callers(tmp_path: Path) -> None:
    with filled(tmp_path, 0) as bank, files_of_at_most(10):
        block = block_of(0)
        bank.put(block)
        block.rows_LU.zero_()
        block.mean_keys_LGC.zero_()
        with pytest.raises(StreamError, match="in memory only"):
            bank.flush()
        bank.get(0).rows_LU.zero_()
        assert_same(bank, twin_of(1))
    with TieredBank.restore(tmp_path, MEMORY, DISK) as bank:
        assert_same(bank, twin_of(1))


def test_questions_are_answered_while_blocks_come(tmp_path: Path) -> None:
    twin = twin_of(60)

    def read(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for turn in range(300):
            numbers_N = bank.index().numbers_N
            chosen: list[int] = numbers_N[torch.randint(len(numbers_N), (5,), generator=generator)].tolist()
            assert torch.equal(bank.gather(turn % LAYERS, chosen), twin.gather(turn % LAYERS, chosen))
            assert bank.get(chosen[0]).digest == twin.get(chosen[0]).digest

    with filled(tmp_path, 1, MemoryBudget(20 * PAGE_BYTES)) as bank, ThreadPoolExecutor(2) as readers:
        reading = [readers.submit(read, seed) for seed in (0, 1)]
        for number in range(1, 60):
            bank.put(block_of(number))
        for done in reading:
            done.result()


def test_recent_blocks_are_answered_without_the_disk(tmp_path: Path) -> None:
    with filled(tmp_path, 20) as bank:
        bank.flush()
        bank.gather(0, list(range(20)))
        for path in tmp_path.glob("*.pages"):
            path.unlink()
        assert torch.equal(bank.gather(0, [18, 19]), twin_of(20).gather(0, [18, 19]))
        with pytest.raises(LostBlockError, match=r"block 0 is lost, its page in '.*00000\.pages' is missing"):
            bank.get(0)


def test_prefetched_blocks_are_answered_without_the_disk(tmp_path: Path) -> None:
    with filled(tmp_path, 20, MemoryBudget(10 * PAGE_BYTES, recent_blocks=2)) as bank:
        bank.flush()
        bank.prefetch([3, 4]).result()
        for path in tmp_path.glob("*.pages"):
            path.unlink()
        assert torch.equal(bank.gather(1, [4, 3]), twin_of(20).gather(1, [4, 3]))
        bank.prefetch([5]).result()
        assert list(bank.lost) == [5]


def test_a_damaged_page_is_left_out_and_the_rest_goes_on(tmp_path: Path) -> None:
    with filled(tmp_path, 12):
        pass
    damaged = tmp_path / "00001.pages"
    data = bytearray(damaged.read_bytes())
    data[PAGE_BYTES + PAGE_BYTES // LAYERS + 5] ^= 4  # block 5, layer 1
    damaged.write_bytes(data)
    with TieredBank.restore(tmp_path, MEMORY, DISK) as bank:
        layer_0 = bank.gather(0, [4, 5])
        assert torch.equal(layer_0, twin_of(12).gather(0, [4, 5])), "its other layer is whole"
        with pytest.raises(LostBlockError, match=r"block 5 is lost, its page in '.*00001\.pages' is damaged"):
            bank.gather(1, [4, 5])
        with pytest.raises(LostBlockError, match="block 5 is lost"):
            bank.gather(0, [5])
        assert list(bank.lost) == [5]
        assert bank.index().numbers_N.tolist() == [*range(5), *range(6, 12)]
        assert (len(bank), bank.nbytes) == (11, twin_of(11).nbytes)
        assert torch.equal(bank.gather(1, [4, 6]), twin_of(12).gather(1, [4, 6]))
        bank.put(block_of(12))
        assert bank.index().numbers_N.tolist()[-1] == 12


def test_verify_finds_what_nobody_asked_for(tmp_path: Path) -> None:
    with filled(tmp_path, 12):
        pass
    (tmp_path / "00000.pages").unlink()
    cut = tmp_path / "00001.pages"
    cut.write_bytes(cut.read_bytes()[: 2 * PAGE_BYTES - 1])
    small = MemoryBudget(4 * PAGE_BYTES, recent_blocks=1)
    with TieredBank.restore(tmp_path, small, DISK) as bank:
        assert not bank.lost
        assert sorted(bank.verify()) == [0, 1, 2, 3, 5, 6, 7]
        assert bank.index().numbers_N.tolist() == [4, 8, 9, 10, 11]


def test_a_damaged_record_loses_its_block_only(tmp_path: Path) -> None:
    with filled(tmp_path, 10):
        pass
    index = tmp_path / "00000.index"
    record_bytes = index.stat().st_size // 4
    data = bytearray(index.read_bytes())
    data[2 * record_bytes + 30] ^= 1
    index.write_bytes(data)
    (tmp_path / "00001.index").unlink()
    with TieredBank.restore(tmp_path, MEMORY, DISK) as bank:
        assert sorted(bank.lost) == [2, 4, 5, 6, 7]
        assert bank.index().numbers_N.tolist() == [0, 1, 3, 8, 9]
        with pytest.raises(LostBlockError, match="block 2 is lost, its record is damaged"):
            bank.get(2)
        assert len(bank) == 5


@pytest.mark.parametrize("cut_bytes", [1, 100])
def test_a_torn_end_is_written_over(tmp_path: Path, cut_bytes: int) -> None:
    with filled(tmp_path, 7):
        pass
    index = tmp_path / "00001.index"
    index.write_bytes(index.read_bytes()[:-cut_bytes])
    with TieredBank.restore(tmp_path, MEMORY, DISK) as bank:
        assert_same(bank, twin_of(6))
        for number in (6, 7, 8):
            bank.put(block_of(number))
        assert_same(bank, twin_of(9))
    with TieredBank.restore(tmp_path, MEMORY, DISK) as bank:
        assert_same(bank, twin_of(9))


def test_a_full_disk_is_one_error_and_the_stream_goes_on(tmp_path: Path) -> None:
    with filled(tmp_path, 2) as bank:
        bank.flush()
        with files_of_at_most(2 * PAGE_BYTES + 10):
            bank.put(block_of(2))
            with pytest.raises(StreamError, match=r"1 blocks of the stream are in memory only: cannot write '.*'"):
                bank.flush()
            for _ in range(2):
                with pytest.raises(StreamError, match="Make room, then put or flush again"):
                    bank.put(block_of(3))
            assert_same(bank, twin_of(3))
        bank.put(block_of(3))
        bank.flush()
        assert_same(bank, twin_of(4))
    with TieredBank.restore(tmp_path, MEMORY, DISK) as bank:
        assert_same(bank, twin_of(4))


def test_budgets_refuse_and_keep_what_is_there(tmp_path: Path) -> None:
    with filled(tmp_path / "disk", 3, disk=DiskBudget(5 * PAGE_BYTES)) as bank:  # a record is a third of a tiny page
        with pytest.raises(StreamError, match=r"memory is full: 3 blocks take \d+ of \d+ bytes"):
            bank.put(block_of(3))
        assert_same(bank, twin_of(3))
    tiny = MemoryBudget(PAGE_BYTES + 100)
    with (
        filled(tmp_path / "ram", 0, tiny) as bank,
        pytest.raises(StreamError, match=r"no room beside an index of \d+ for \d pages"),
    ):
        bank.put(block_of(0))
    with filled(tmp_path / "restored", 3):
        pass
    with pytest.raises(StreamError, match=r"no room beside an index of \d+ for \d pages"):
        TieredBank.restore(tmp_path / "restored", tiny, DISK)
    with TieredBank.restore(tmp_path / "restored", MEMORY, DISK) as bank:
        assert_same(bank, twin_of(3))
    for wrong in ({"ram_bytes": -1}, {"device_bytes": -1}, {"recent_blocks": -1}):
        with pytest.raises(StreamError, match="give numbers of at least 0"):
            MemoryBudget(**{"ram_bytes": 2**20, **wrong})


def test_memory_that_cannot_be_had_is_one_error(tmp_path: Path) -> None:
    with filled(tmp_path, 0, MemoryBudget(2**60)) as bank:
        for _ in range(2):
            with pytest.raises(StreamError, match="cannot be reserved"):
                bank.put(block_of(0))
        assert len(bank) == 0


def test_a_closed_bank_says_so_and_touches_nothing(tmp_path: Path) -> None:
    bank = filled(tmp_path, 3)
    bank.close()
    with (tmp_path / "lock").open() as another:  # its descriptor is the bank's old one, perhaps
        bank.close()
        assert another.read() == ""
    for use in (
        lambda: bank.put(block_of(3)),
        lambda: bank.get(0),
        lambda: bank.gather(0, [0]),
        lambda: bank.prefetch([0]),
        bank.flush,
        bank.upload,
        bank.verify,
        bank.clear,
    ):
        with pytest.raises(StreamError, match="was closed"):
            use()
    with TieredBank.restore(tmp_path, MEMORY, DISK) as again:
        assert_same(again, twin_of(3))


def test_pages_are_verified_while_others_come(tmp_path: Path) -> None:
    with filled(tmp_path, 1, MemoryBudget(2**20)) as bank, ThreadPoolExecutor(1) as putter:
        put = putter.submit(lambda: [bank.put(block_of(number)) for number in range(1, 200)])
        while not put.done():
            assert bank.verify() == {}
        put.result()
        assert len(bank) == 200


def test_memory_stays_within_its_budget(tmp_path: Path) -> None:
    """Index, waiting blocks and cached rows together, while the stream grows to many times that."""
    mean_bytes = sink_of().mean_keys_LGC.nbytes
    memory = MemoryBudget(20 * PAGE_BYTES, recent_blocks=2)
    with filled(tmp_path, 0, memory) as bank:
        for number in range(60):
            bank.put(block_of(number))
            bank.gather(0, list(range(0, number + 1, 3)))
            held_bytes = len(bank._ram) * PAGE_BYTES // LAYERS + len(bank) * mean_bytes
            assert held_bytes + len(bank._waiting) * PAGE_BYTES <= memory.ram_bytes
        assert_same(bank, twin_of(60))


@pytest.mark.parametrize("number", [0, 2])
def test_what_does_not_belong_is_refused(tmp_path: Path, number: int) -> None:
    with filled(tmp_path, 3) as bank:
        for wrong in (block_of(number, tokens=4), block_of(3, tokens=4), block_of(3, encoding="int8"), block_of(1)):
            with pytest.raises(StreamError, match=r"one frame size|time order"):
                bank.put(wrong)
        with pytest.raises(StreamError, match="block 3 is not in this bank of 3 blocks"):
            bank.gather(0, [0, 3])
        assert_same(bank, twin_of(3))


def test_clear_forgets_the_frames_and_another_size_may_follow(tmp_path: Path) -> None:
    with filled(tmp_path, 9) as bank:
        bank.clear()
        assert contents(bank) == contents(twin_of(0))
        assert not list(tmp_path.glob("*.pages"))
        bank.put(block_of(0, tokens=7))
    with TieredBank.restore(tmp_path, MEMORY, DISK) as bank:
        assert bank.get(0).digest == block_of(0, tokens=7).digest


def test_an_empty_stream_is_restored(tmp_path: Path) -> None:
    with filled(tmp_path, 0):
        pass
    with TieredBank.restore(tmp_path, MEMORY, DISK) as bank:
        assert contents(bank) == contents(twin_of(0))
        bank.put(block_of(0))
        assert_same(bank, twin_of(1))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with filled(tmp_path, 1), pytest.raises(StreamError, match="is in use already"):
        TieredBank.restore(tmp_path, MEMORY, DISK)
    with pytest.raises(StreamError, match="holds a stream already"):
        TieredBank.create(tmp_path, sink_of(), MEMORY, DISK)
    with TieredBank.restore(tmp_path, MEMORY, DISK) as bank:
        assert len(bank) == 1


def test_what_is_no_stream_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match="holds no stream that can be restored"):
        TieredBank.restore(tmp_path / "nothing", MEMORY, DISK)
    with filled(tmp_path / "header", 1):
        pass
    (tmp_path / "header" / "stream.json").write_text('{"version": 1}')
    with pytest.raises(StreamError, match="holds no stream that can be restored"):
        TieredBank.restore(tmp_path / "header", MEMORY, DISK)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        TieredBank.create(tmp_path / "file" / "stream", sink_of(), MEMORY, DISK)
