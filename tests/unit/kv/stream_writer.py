"""A process that puts blocks into a stream for ever and says after each flush how many are durable.

`python -m tests.unit.kv.stream_writer FOLDER [STORE]`; started, and killed, by `test_killed`. With a folder as a store,
it says after each upload how many are there, too.
"""

import itertools
import sys
from pathlib import Path

from sparsight.kv.block import KvBlock
from sparsight.kv.disk import DiskBudget
from sparsight.kv.tiers import MemoryBudget, TieredBank
from sparsight.storage import LocalStorage
from tests.unit.kv.random_blocks import block_of, sink_of


def frame(number: int) -> KvBlock:
    """Pages that are much larger than records."""
    return block_of(number, tokens=24)


PAGE_BYTES = frame(0).rows_LU.nbytes
MEMORY = MemoryBudget(2**20, recent_blocks=2)
DISK = DiskBudget(2**30, segment_bytes=5 * PAGE_BYTES)
SMALL_DISK = DiskBudget(60 * PAGE_BYTES, store_bytes=2**30, segment_bytes=5 * PAGE_BYTES)


def main(folder: str, place: str = "") -> None:
    store, disk = (LocalStorage(Path(place)), SMALL_DISK) if place else (None, DISK)
    bank = TieredBank.create(Path(folder), sink_of(), MEMORY, disk, store)
    for number in itertools.count():
        bank.put(frame(number))
        if number % 3 == 0:
            bank.flush()
            say("durable", number + 1)
        if store is not None and number % 7 == 0:
            bank.upload()
            say("uploaded", number + 1)


def say(what: str, blocks: int) -> None:
    sys.stdout.write(f"{what} {blocks}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
