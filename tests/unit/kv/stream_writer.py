"""A process that puts blocks into a stream for ever and says after each flush how many are durable.

`python -m tests.unit.kv.stream_writer FOLDER`; started, and killed, by `test_killed`.
"""

import itertools
import sys
from pathlib import Path

from sparsight.kv.disk import DiskBudget
from sparsight.kv.tiers import MemoryBudget, TieredBank
from tests.unit.kv.random_blocks import PAGE_BYTES, block_of, sink_of

MEMORY = MemoryBudget(2**20, recent_blocks=2)
DISK = DiskBudget(2**30, segment_bytes=5 * PAGE_BYTES)


def main() -> None:
    bank = TieredBank.create(Path(sys.argv[1]), sink_of(), MEMORY, DISK)
    for number in itertools.count():
        bank.put(block_of(number))
        if number % 3 == 0:
            bank.flush()
            sys.stdout.write(f"{number + 1}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
