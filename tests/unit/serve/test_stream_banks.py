"""The streams' memory: limits, all-or-none, and puts that may be repeated."""

import pytest
import torch

from actors.stream_banks import StreamBanks
from sparsight.errors import StreamError
from sparsight.kv.block import SINK_NUMBER, KvBlock


def block(number: int, seed: int | None = None, tokens: int = 3, time_s: float | None = None) -> KvBlock:
    """Two layers, one head, tokens of width four."""
    generator = torch.Generator().manual_seed(number + 10 if seed is None else seed)
    page_L2GSC = torch.randn(2, 2, 1, tokens, 4, generator=generator)
    time_s = float(max(number, 0)) if time_s is None else time_s
    return KvBlock.from_page(number, time_s, time_s, page_L2GSC)


@pytest.fixture
def banks() -> StreamBanks:
    banks = StreamBanks(max_streams=2, max_stream_bytes=5 * block(0).nbytes)
    assert banks.open("a", "m", block(SINK_NUMBER)) is not None
    return banks


def test_a_put_may_be_repeated(banks: StreamBanks) -> None:
    banks.put("a", [block(0), block(1)])
    info = banks.put("a", [block(0), block(1), block(2)])
    assert (info.frames, info.span_s, info.bytes) == (3, (0.0, 2.0), 4 * block(0).nbytes)


@pytest.mark.parametrize(
    "blocks",
    [
        [block(2), block(3), block(4)],  # the last does not fit beside the sink
        [block(3)],  # leaves a gap
        [block(1, seed=99)],  # contradicts
        [block(2), block(1, seed=99)],
        [block(2), block(3, tokens=2)],
        [block(2), block(3, time_s=1.5)],
    ],
)
def test_what_cannot_be_kept_whole_is_not_kept(banks: StreamBanks, blocks: list[KvBlock]) -> None:
    before = banks.put("a", [block(0), block(1)])
    with pytest.raises(StreamError):
        banks.put("a", blocks)
    assert banks.describe("a") == before


def test_streams_are_limited_and_found_again(banks: StreamBanks) -> None:
    assert banks.open("b", "m", block(SINK_NUMBER)) is not None
    assert banks.open("c", "m", block(SINK_NUMBER)) is None
    assert banks.open("a", "m", block(SINK_NUMBER)) == banks.describe("a")
    assert banks.close("b")
    assert not banks.close("b")
    assert banks.open("c", "m", block(SINK_NUMBER)) is not None
    assert [info.id for info in banks.describe_all()] == ["a", "c"]


def test_the_newest_blocks_fill_a_window(banks: StreamBanks) -> None:
    assert banks.newest("a", 5) == []
    banks.put("a", [block(0), block(1), block(2)])
    assert [kept.number for kept in banks.newest("a", 4)] == [1, 2]
    assert [kept.number for kept in banks.newest("a", 100)] == [0, 1, 2]


def test_a_closed_stream_has_no_bank(banks: StreamBanks) -> None:
    with pytest.raises(StreamError, match="not open"):
        banks.put("gone", [block(0)])
