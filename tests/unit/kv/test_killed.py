"""A writer is killed in the middle: what it was told is durable is there, and nothing else but more of the same."""

import subprocess
import sys
from pathlib import Path

from sparsight.kv.bank import RamBank
from sparsight.kv.tiers import TieredBank
from tests.unit.kv.random_blocks import block_of, contents, sink_of
from tests.unit.kv.stream_writer import DISK, MEMORY

REPOSITORY = Path(__file__).parents[3]


def test_what_was_durable_survives_sigkill(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.unit.kv.stream_writer", str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        said = [int(writer.stdout.readline()) for _ in range(20)]
        writer.kill()
        said += [int(line) for line in writer.stdout]
    with TieredBank.restore(tmp_path, MEMORY, DISK) as bank:
        assert len(bank) >= said[-1] >= 58
        assert not bank.verify()
        twin = RamBank(sink_of(), 2**30)
        for number in range(len(bank)):
            twin.put(block_of(number))
        assert contents(bank) == contents(twin)
        for more in (bank, twin):
            more.put(block_of(len(more)))
        assert contents(bank) == contents(twin)
