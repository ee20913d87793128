"""Answers do not depend on where blocks lie: main memory, disk, another process's leavings, or with one block lost."""

from pathlib import Path

import pytest
import torch

from sparsight.kv.answerer import Answer, Ask, StreamAnswerer
from sparsight.kv.bank import BlockBank, RamBank
from sparsight.kv.disk import DiskBudget
from sparsight.kv.encoder import StreamEncoder
from sparsight.kv.retrieve import BestAndRecent
from sparsight.kv.tiers import MemoryBudget, TieredBank
from sparsight.storage import open_storage
from tests.unit.kv.tiny_stream import (
    ARCHITECTURES,
    PROMPT_IDS,
    TinyStream,
    bank_of,
    encode,
    frames_of,
    said,
    spans_of,
    tiny_stream,
)

FRAMES = 16
WINDOW = 21


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def stream(request: pytest.FixtureRequest) -> TinyStream:
    return tiny_stream(request.param)


def ask(stream: TinyStream, bank: BlockBank, best: int = 4) -> Answer:
    answerer = StreamAnswerer(stream.kv_model, stream.head)
    return answerer.ask(bank, PROMPT_IDS, BestAndRecent(best, recent=2), max_new_tokens=5)


def test_the_answer_after_restoring_is_the_answer_before(stream: TinyStream, tmp_path: Path) -> None:
    sink, blocks = encode(stream, frames_of(stream, FRAMES), WINDOW)
    page_bytes = blocks[0].rows_LU.nbytes
    memory, disk = MemoryBudget(6 * page_bytes, recent_blocks=2), DiskBudget(2**30, segment_bytes=3 * page_bytes)
    expected = ask(stream, bank_of(sink, blocks))
    with TieredBank.create(tmp_path, sink, memory, disk) as bank:
        for block in blocks:
            bank.put(block)
        assert ask(stream, bank) == expected
    with TieredBank.restore(tmp_path, memory, disk) as bank:
        assert ask(stream, bank) == expected


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_the_answer_from_the_store_alone_is_the_answer_before(
    stream: TinyStream, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """On another machine, that is: nothing is in its folder."""
    sink, blocks = encode(stream, frames_of(stream, FRAMES), WINDOW)
    page_bytes = blocks[0].rows_LU.nbytes
    memory, disk = MemoryBudget(6 * page_bytes), DiskBudget(2**20, 2**30, segment_bytes=3 * page_bytes)
    place = f"s3://{request.getfixturevalue('new_bucket')()}/stream" if kind == "s3" else str(tmp_path / "store")
    with TieredBank.create(tmp_path / "one", sink, memory, disk, open_storage(place)) as bank:
        for block in blocks:
            bank.put(block)
        bank.upload()
    with TieredBank.restore(tmp_path / "other", memory, disk, open_storage(place)) as bank:
        assert not list((tmp_path / "other").glob("00000.pages"))
        assert ask(stream, bank) == ask(stream, bank_of(sink, blocks))


def test_an_encoder_goes_on_from_a_restored_bank(stream: TinyStream, tmp_path: Path) -> None:
    frames_FSD = frames_of(stream, FRAMES)
    sink, blocks = encode(stream, frames_FSD, WINDOW)
    memory, disk = MemoryBudget(2**22), DiskBudget(2**30)
    with TieredBank.create(tmp_path, sink, memory, disk) as bank:
        for block in blocks[:10]:
            bank.put(block)
    with TieredBank.restore(tmp_path, memory, disk) as bank:
        newest = [bank.get(number) for number in range(4, 10)]
        encoder = StreamEncoder(stream.kv_model, bank.sink, WINDOW, newest)
        for block in encoder.encode(frames_FSD[10:], spans_of(FRAMES - 10, 10)):
            bank.put(block)
        pages_R2GSC = bank.gather(2, list(range(FRAMES)))
        expected_R2GSC = torch.stack([block.page_L2GSC[2] for block in blocks])
        torch.testing.assert_close(pages_R2GSC, expected_R2GSC, atol=2e-5, rtol=2e-5)


def test_an_encoder_goes_on_behind_a_damaged_page(stream: TinyStream, tmp_path: Path) -> None:
    """Block 8 is in the window of the next frame, and block 9 is the newest: numbers go on behind what is lost."""
    frames_FSD = frames_of(stream, FRAMES)
    sink, blocks = encode(stream, frames_FSD, WINDOW)
    memory, disk = MemoryBudget(2**22), DiskBudget(2**30, segment_bytes=blocks[0].rows_LU.nbytes)
    for lost in (8, 9):
        folder = tmp_path / str(lost)
        with TieredBank.create(folder, sink, memory, disk) as bank:
            for block in blocks[:10]:
                bank.put(block)
        (folder / f"{lost:05d}.pages").unlink()
        with TieredBank.restore(folder, memory, disk) as bank:
            encoder = StreamEncoder.after(stream.kv_model, bank, WINDOW)
            assert list(bank.lost) == [lost]
            for block in encoder.encode(frames_FSD[10:], spans_of(FRAMES - 10, 10)):
                bank.put(block)
            assert bank.index().numbers_N.tolist() == [number for number in range(FRAMES) if number != lost]
            found = ask(stream, bank, best=FRAMES)
        kept = RamBank(sink, 2**30)
        with TieredBank.restore(folder, memory, disk) as bank:
            for number in bank.index().numbers_N.tolist():
                kept.put(bank.get(number))
        assert ask(stream, kept, best=FRAMES) == found


def test_a_lost_block_is_as_if_it_had_never_been(stream: TinyStream, tmp_path: Path) -> None:
    sink, blocks = encode(stream, frames_of(stream, FRAMES), WINDOW)
    memory, disk = MemoryBudget(2**22), DiskBudget(2**30, segment_bytes=blocks[0].rows_LU.nbytes)
    with TieredBank.create(tmp_path, sink, memory, disk) as bank:
        for block in blocks:
            bank.put(block)
    (tmp_path / "00003.pages").unlink()
    damaged = tmp_path / "00015.pages"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    left = [block for block in blocks if block.number not in (3, 15)]
    expected = ask(stream, bank_of(sink, left), best=FRAMES)
    with TieredBank.restore(tmp_path, memory, disk) as bank:
        assert ask(stream, bank, best=FRAMES) == expected
        assert sorted(bank.lost) == [3, 15]
    with TieredBank.restore(tmp_path, memory, disk) as bank:
        asks = [Ask(each, PROMPT_IDS, BestAndRecent(FRAMES, recent=2), 5) for each in (bank_of(sink, blocks), bank)]
        whole, damaged_one = StreamAnswerer(stream.kv_model, stream.head).ask_all(asks)
        assert said(whole) == said(ask(stream, bank_of(sink, blocks), best=FRAMES))
        assert said(damaged_one) == said(expected)
