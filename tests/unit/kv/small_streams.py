"""A stream of random blocks, three a segment, and what tests do to its files."""

from dataclasses import replace
from pathlib import Path

from sparsight.kv.disk import DiskBudget
from sparsight.kv.records import record_type
from sparsight.kv.tiers import MemoryBudget, TieredBank
from sparsight.storage import Storage
from tests.unit.kv.random_blocks import PAGE_BYTES, block_of, sink_of

MEMORY = MemoryBudget(30 * PAGE_BYTES, recent_blocks=1)
ROOM_FOR_FEW = MemoryBudget(6 * PAGE_BYTES, recent_blocks=0)
SEGMENT = 3 * PAGE_BYTES
RECORD = record_type(block_of(0).format).itemsize
DISK = DiskBudget(4 * SEGMENT + 20 * PAGE_BYTES, store_bytes=2**20, segment_bytes=SEGMENT)
IN_HEAD, IN_MEAN_KEYS = 3, 60


def filled(folder: Path, blocks: int, store: Storage | None = None) -> TieredBank:
    disk = DISK if store else replace(DISK, disk_bytes=2**20)
    bank = TieredBank.create(folder, sink_of(), MEMORY, disk, store)
    for number in range(blocks):
        bank.put(block_of(number))
    return bank


def uploaded(folder: Path, blocks: int, store: Storage) -> None:
    with filled(folder, blocks, store) as bank:
        bank.upload()


def restored(folder: Path, store: Storage | None = None) -> TieredBank:
    return TieredBank.restore(folder, MEMORY, DISK if store else replace(DISK, disk_bytes=2**20), store)


def put_more(bank: TieredBank, *numbers: int) -> None:
    for number in numbers:
        bank.put(block_of(number))


def assert_holds(bank: TieredBank, *numbers: int) -> None:
    """These blocks, every byte of them, and no others."""
    assert bank.verify().keys().isdisjoint(numbers)
    assert bank.index().numbers_N.tolist() == list(numbers)
    assert [bank.get(number).digest for number in numbers] == [block_of(number).digest for number in numbers]


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
