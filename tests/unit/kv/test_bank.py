"""The bank in main memory: order, shapes, budget, snapshots."""

import pytest
import torch

from sparsight.errors import StreamError
from sparsight.kv.bank import RamBank
from sparsight.kv.block import KvBlock
from sparsight.kv.page import Encoding
from tests.unit.kv.random_blocks import block_of, contents, sink_of


def bank_of(blocks: int, budget_bytes: int = 2**20) -> RamBank:
    bank = RamBank(sink_of(), budget_bytes)
    for number in range(blocks):
        bank.put(block_of(number))
    return bank


def test_what_was_put_is_there() -> None:
    bank = bank_of(200)  # the index grows more than once on the way
    index = bank.index()
    assert len(bank) == len(index) == 200
    assert index.numbers_N.tolist() == list(range(200))
    for number in (0, 63, 64, 199):
        block = block_of(number)
        assert bank.get(number).digest == block.digest
        assert torch.equal(index.mean_keys_LNGC[:, number], block.mean_keys_LGC)
        assert index.spans_s_N2[number].tolist() == [block.start_s, block.end_s]
    assert bank.nbytes == sink_of().nbytes + 200 * block_of(0).nbytes


def test_gather_keeps_the_order_asked_for_and_copies() -> None:
    bank = bank_of(6)
    pages_R2GSC = bank.gather(1, [4, 0, 4])
    assert torch.equal(pages_R2GSC, torch.stack([block_of(number).page_L2GSC[1] for number in (4, 0, 4)]))
    pages_R2GSC.zero_()
    assert bank.get(4).digest == KvBlock.from_page(4, 0, 0, bank.get(4).page_L2GSC).digest


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_quantised_blocks_are_gathered_in_the_models_type(encoding: Encoding) -> None:
    bank = RamBank(sink_of(), 2**20)
    pages = [block_of(number).page_L2GSC for number in range(4)]
    for number, page_L2GSC in enumerate(pages):
        bank.put(KvBlock.from_page(number, 2.0 * number, 2.0 * number + 2, page_L2GSC, encoding))
    pages_R2GSC = bank.gather(1, [3, 0])
    assert pages_R2GSC.dtype == torch.float32
    assert torch.equal(pages_R2GSC, torch.stack([bank.get(number).page_L2GSC[1] for number in (3, 0)]))
    torch.testing.assert_close(pages_R2GSC, torch.stack([pages[3][1], pages[0][1]]), atol=0.5, rtol=0.0)
    assert torch.equal(bank.index().mean_keys_LNGC, bank_of(4).index().mean_keys_LNGC)
    with pytest.raises(StreamError, match="one encoding"):
        bank.put(block_of(4))


def test_a_snapshot_stays_as_it_was() -> None:
    bank = bank_of(63)
    snapshot = bank.index()
    before = (snapshot.numbers_N.tolist(), snapshot.mean_keys_LNGC.clone())
    for number in range(63, 150):
        bank.put(block_of(number))
    assert snapshot.numbers_N.tolist() == before[0]
    assert torch.equal(snapshot.mean_keys_LNGC, before[1])


def test_until_hides_what_ends_later() -> None:
    index = bank_of(5).index()
    assert index.until(6.0).numbers_N.tolist() == [0, 1, 2]
    assert index.until(5.9).mean_keys_LNGC.shape[1] == 2
    assert len(index.until(0.0)) == 0
    assert len(index.until(99.0)) == 5


def test_a_full_bank_refuses_and_keeps_what_it_has() -> None:
    budget_bytes = sink_of().nbytes + 3 * block_of(0).nbytes
    bank = bank_of(3, budget_bytes)
    before = contents(bank)
    with pytest.raises(StreamError, match=r"memory is full: 3 blocks take \d+ of \d+ bytes"):
        bank.put(block_of(3))
    assert contents(bank) == before


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (block_of(1), "time order"),
        (KvBlock.from_page(3, 1.0, 9.0, block_of(3).page_L2GSC), "time order"),
        (block_of(3, tokens=4), "one frame size"),
        (block_of(3, layers=3), "one model"),
        (block_of(3, dtype=torch.float16), "one model"),
        (KvBlock.from_page(2, 4.0, 6.0, block_of(9).page_L2GSC), "time order"),
    ],
)
def test_what_does_not_belong_is_refused(block: KvBlock, message: str) -> None:
    bank = bank_of(3)
    before = contents(bank)
    with pytest.raises(StreamError, match=message):
        bank.put(block)
    assert contents(bank) == before


def test_the_last_put_may_be_repeated() -> None:
    bank = bank_of(3)
    before = contents(bank)
    bank.put(block_of(2))
    assert contents(bank) == before


def test_clear_forgets_the_frames_only() -> None:
    bank = bank_of(3)
    bank.clear()
    assert (len(bank), len(bank.index()), bank.nbytes) == (0, 0, sink_of().nbytes)
    with pytest.raises(StreamError, match="block 1 is not in this bank of 0 blocks"):
        bank.get(1)
    bank.put(block_of(0))
    assert bank.index().numbers_N.tolist() == [0]
    assert bank.sink.digest == sink_of().digest
