"""A stream's memory in another process: bit for bit what main memory here holds, for every process that reads it."""

from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch

from actors.kv_bank_actor import KvBankActor, RemoteBank, RemoteBanks
from sparsight.errors import StreamError
from sparsight.kv.answerer import StreamAnswerer
from sparsight.kv.block import SINK_NUMBER, KvBlock
from sparsight.kv.encoder import StreamEncoder, encode_sink
from sparsight.kv.page import Encoding
from sparsight.kv.retrieve import BestAndRecent
from tests.ray.bank_reader import read_back
from tests.unit.kv.random_blocks import LAYERS, block_of, contents
from tests.unit.kv.tiny_stream import PROMPT_IDS, SINK_IDS, bank_of, frames_of, spans_of, tiny_stream

ENCODINGS: list[Encoding] = ["plain", "int8", "int4"]
MAX_STREAM_BYTES = 2**22
BLOCKS = 4


@pytest.fixture(scope="module")
def actor(ray_cluster: None) -> Iterator[Any]:
    kind: Any = ray.remote(KvBankActor)
    handle = kind.options(num_cpus=0).remote(max_streams=2, max_stream_bytes=MAX_STREAM_BYTES)
    yield handle
    ray.kill(handle)


@pytest.fixture
def banks(actor: Any) -> Iterator[RemoteBanks]:
    banks = RemoteBanks(actor)
    yield banks
    for info in banks.describe_all():
        banks.close(info.id)


def opened(banks: RemoteBanks, sink: KvBlock) -> RemoteBank:
    assert banks.open("s", "tiny", sink) is not None
    return banks.bank("s")


def assert_identical(found: KvBlock, expected: KvBlock) -> None:
    assert found.head == expected.head
    assert found.end_s == expected.end_s
    assert torch.equal(found.rows_LU, expected.rows_LU)
    assert torch.equal(found.mean_keys_LGC, expected.mean_keys_LGC)
    assert torch.equal(found.page_L2GSC, expected.page_L2GSC)
    again = KvBlock.of_rows(found.number, found.start_s, found.end_s, found.format, found.rows_LU, found.mean_keys_LGC)
    assert again.digest == expected.digest


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(3, torch.float32), (2048, torch.bfloat16)],  # inside a message, and in Ray's shared memory
)
def test_what_another_process_keeps_a_third_reads_bit_for_bit(
    banks: RemoteBanks, encoding: Encoding, tokens: int, dtype: torch.dtype
) -> None:
    sink = block_of(SINK_NUMBER, 5, dtype=dtype)
    blocks = [block_of(number, tokens, dtype=dtype, encoding=encoding) for number in range(BLOCKS)]
    here, there = bank_of(sink, blocks), opened(banks, sink)
    there.put(blocks[0])
    banks.put("s", blocks[1:])
    assert (len(there), there.nbytes) == (len(here), here.nbytes)
    reader: Any = ray.remote(read_back)
    readings = [read_back(there), ray.get(reader.options(num_cpus=0).remote(there))]
    assert readings[0][0] != readings[1][0], "a process of its own"
    _, _, expected_index, expected_blocks, expected_pages = read_back(here)
    for _, found_sink, index, found_blocks, pages in readings:
        assert_identical(found_sink, sink)
        for found, expected in zip(vars(index).values(), vars(expected_index).values(), strict=True):
            assert torch.equal(found, expected)
        for found, expected in zip(found_blocks, expected_blocks, strict=True):
            assert_identical(found, expected)
        assert len(pages) == LAYERS
        for found, expected in zip(pages, expected_pages, strict=True):
            assert (found.dtype, found.shape) == (dtype, (BLOCKS + 1, 2, 2, tokens, 4))
            assert torch.equal(found, expected)
    for found, expected in zip(banks.newest("s", 2 * tokens), blocks[-2:], strict=True):
        assert_identical(found, expected)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_answer_is_the_one_that_main_memory_here_gives(banks: RemoteBanks, encoding: Encoding) -> None:
    stream = tiny_stream()
    sink = encode_sink(stream.kv_model, SINK_IDS)
    blocks = StreamEncoder(stream.kv_model, sink, 21, encoding=encoding).encode(frames_of(stream, 12), spans_of(12))
    here, there = bank_of(sink, blocks), opened(banks, sink)
    banks.put("s", blocks)
    answerer = StreamAnswerer(stream.kv_model, stream.head)
    for until_s, two_pass in ((None, False), (None, True), (13.0, False)):
        found, expected = (
            answerer.ask(
                bank, PROMPT_IDS, BestAndRecent(3, recent=1), max_new_tokens=6, until_s=until_s, two_pass=two_pass
            )
            for bank in (there, here)
        )
        assert found == expected
        assert len({layer.numbers for layer in found.evidence}) > 1, "layers that all agree prove little"


def test_an_encoder_goes_on_from_there_as_from_here(banks: RemoteBanks) -> None:
    stream = tiny_stream()
    sink, window_tokens = encode_sink(stream.kv_model, SINK_IDS), 21
    frames_FSD = frames_of(stream, 9)
    blocks = StreamEncoder(stream.kv_model, sink, window_tokens).encode(frames_FSD[:7], spans_of(7))
    bank = opened(banks, sink)
    banks.put("s", blocks)
    newest = banks.newest("s", window_tokens)
    assert [block.number for block in newest] == [2, 3, 4, 5, 6]
    here, there = (
        StreamEncoder(stream.kv_model, first, window_tokens, window).encode(frames_FSD[7:], spans_of(2, first=7))
        for first, window in ((sink, blocks[2:]), (bank.sink, newest))
    )
    for found, expected in zip(there, here, strict=True):
        assert_identical(found, expected)


def test_what_is_refused_there_is_raised_here_and_changes_nothing(banks: RemoteBanks) -> None:
    blocks = [block_of(number) for number in range(4)]
    bank = opened(banks, block_of(SINK_NUMBER))
    banks.put("s", blocks[:2])
    before = contents(bank)
    huge = block_of(2, tokens=MAX_STREAM_BYTES // 64)
    for block, why in (
        (blocks[3], "do not follow 2 kept ones"),
        (huge, "the stream is full"),
        (block_of(2, 4), "page of"),
    ):
        with pytest.raises(StreamError, match=why):
            bank.put(block)
        assert contents(bank) == before
    with pytest.raises(StreamError, match="block 2 is not in this bank of 2 blocks"):
        bank.get(2)
    with pytest.raises(StreamError, match="block 7 is not in this bank of 2 blocks"):
        bank.gather(0, [0, 7])
    with pytest.raises(StreamError, match="stream 'other' is not open"):
        banks.bank("other").index()
    bank.put(blocks[1])
    assert contents(bank) == before, "a put may be repeated"
    bank.clear()
    assert (len(bank), bank.nbytes) == (0, block_of(SINK_NUMBER).nbytes)
