"""A writer is killed in the middle: what it was told is durable is there, and nothing else but more of the same."""

import subprocess
import sys
from pathlib import Path

from sparsight.kv.bank import RamBank
from sparsight.kv.tiers import TieredBank
from sparsight.storage import LocalStorage
from tests.unit.kv.random_blocks import contents, sink_of
from tests.unit.kv.stream_writer import DISK, MEMORY, SMALL_DISK, frame

REPOSITORY = Path(__file__).parents[3]


def said_until_killed(lines: int, *arguments: str) -> dict[str, int]:
    """The most that a writer said of each kind, killed some time after so many lines."""
    command = [sys.executable, "-m", "tests.unit.kv.stream_writer", *arguments]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        said = [writer.stdout.readline() for _ in range(lines)]
        writer.kill()
        said += list(writer.stdout)
    return {what: int(blocks) for what, blocks in map(str.split, said)}


def assert_goes_on(bank: TieredBank, least: int) -> None:
    assert len(bank) >= least
    assert not bank.verify()
    twin = RamBank(sink_of(), 2**30)
    for number in range(len(bank)):
        twin.put(frame(number))
    assert contents(bank) == contents(twin)
    for more in (bank, twin):
        more.put(frame(len(more)))
    assert contents(bank) == contents(twin)


def test_what_was_durable_survives_sigkill(tmp_path: Path) -> None:
    said = said_until_killed(20, str(tmp_path))
    assert said["durable"] >= 58
    with TieredBank.restore(tmp_path, MEMORY, DISK) as bank:
        assert_goes_on(bank, said["durable"])


def test_what_was_uploaded_survives_sigkill_and_the_loss_of_the_folder(tmp_path: Path) -> None:
    folder, store = tmp_path / "stream", LocalStorage(tmp_path / "store")
    said = said_until_killed(60, str(folder), store.uri)
    assert not (folder / "00000.pages").exists(), "segments left the folder"
    with TieredBank.restore(tmp_path / "elsewhere", MEMORY, SMALL_DISK, store) as bank:
        assert_goes_on(bank, said["uploaded"])
    with TieredBank.restore(folder, MEMORY, SMALL_DISK, store) as bank:
        assert_goes_on(bank, said["durable"])
