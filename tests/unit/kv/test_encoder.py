"""What the encoder refuses; the window's arithmetic is in tests/parity/test_kv_window.py."""

import math

import pytest
import torch

from sparsight.errors import StreamError
from sparsight.kv.block import KvBlock
from sparsight.kv.encoder import StreamEncoder, encode_sink
from tests.unit.kv.tiny_stream import SINK_IDS, TinyStream, encode, frames_of, spans_of, tiny_stream


@pytest.fixture(scope="module")
def stream() -> TinyStream:
    return tiny_stream()


def test_the_sink_depends_on_model_and_ids_only(stream: TinyStream) -> None:
    sink = encode_sink(stream.kv_model, SINK_IDS)
    assert sink.digest == encode_sink(stream.kv_model, SINK_IDS).digest
    assert (sink.number, sink.tokens) == (-1, len(SINK_IDS))
    with pytest.raises(StreamError, match="at least one token"):
        encode_sink(stream.kv_model, SINK_IDS[:0])


@pytest.mark.parametrize("window_tokens", [0, 4, 513])
def test_impossible_windows_are_refused(stream: TinyStream, window_tokens: int) -> None:
    sink = encode_sink(stream.kv_model, SINK_IDS)
    with pytest.raises(StreamError, match="beside a system prompt of 4 in a model that takes 512"):
        StreamEncoder(stream.kv_model, sink, window_tokens)


@pytest.mark.parametrize(
    "spans_s",
    [
        [(3.0, 5.0), (2.9, 6.0)],
        [(3.0, 5.0), (6.0, 5.9)],
        [(1.9, 5.0), (6.0, 7.0)],
        [(3.0, 5.0), (math.nan, 7.0)],
        [(3.0, math.inf), (6.0, 7.0)],
        [(3.0, 5.0)],
    ],
)
def test_refused_frames_change_nothing(stream: TinyStream, spans_s: list[tuple[float, float]]) -> None:
    frames_FSD = frames_of(stream, 4)
    sink, expected = encode(stream, frames_FSD)
    encoder = StreamEncoder(stream.kv_model, sink, 500)
    blocks = encoder.encode(frames_FSD[:2], spans_of(2))
    with pytest.raises(StreamError):
        encoder.encode(frames_FSD[2:], spans_s)
    for unfit_FSD in (frames_FSD[2:, :, :-1], frames_FSD[2:, :0], frames_FSD[2:, 0]):
        with pytest.raises(StreamError, match="for a text model of width 64"):
            encoder.encode(unfit_FSD, spans_of(2, 2))
    with pytest.raises(StreamError, match="not finite"):
        encoder.encode(frames_FSD[2:].log(), spans_of(2, 2))
    with pytest.raises(StreamError, match="a frame of 4 tokens cannot follow frames of 5"):
        encoder.encode(frames_FSD[2:, :-1], spans_of(2, 2))
    with pytest.raises(StreamError, match="a span a frame"):
        encoder.encode(frames_FSD[:0], [])
    blocks += encoder.encode(frames_FSD[2:], spans_of(2, 2))
    assert [block.number for block in blocks] == [0, 1, 2, 3]
    torch.testing.assert_close(blocks[3].page_L2GSC, expected[3].page_L2GSC, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kept", [[3, 4], [0, 1, 3, 4], [4, 3, 2, 1], [2, 3, 4, 4]])
def test_blocks_that_do_not_fill_the_window_are_refused(stream: TinyStream, kept: list[int]) -> None:
    sink, blocks = encode(stream, frames_of(stream, 5), 16)
    with pytest.raises(StreamError, match="do not fill the stream's window of 16 tokens"):
        StreamEncoder(stream.kv_model, sink, 16, [blocks[number] for number in kept])


def test_an_encoder_that_goes_on_refuses_frames_of_another_size(stream: TinyStream) -> None:
    frames_FSD = frames_of(stream, 5)
    sink, blocks = encode(stream, frames_FSD, 16)
    heir = StreamEncoder(stream.kv_model, sink, 16, blocks[:4])
    with pytest.raises(StreamError, match="a frame of 3 tokens cannot follow frames of 5"):
        heir.encode(frames_FSD[4:, :3], spans_of(1, 4))
    [block] = heir.encode(frames_FSD[4:], spans_of(1, 4))
    torch.testing.assert_close(block.page_L2GSC, blocks[4].page_L2GSC, atol=2e-5, rtol=2e-5)


def test_quantised_pages_leave_the_window_as_it_is(stream: TinyStream) -> None:
    """However pages are kept, later frames see the window's own numbers."""
    frames_FSD = frames_of(stream, 6)
    sink = encode_sink(stream.kv_model, SINK_IDS)
    plain, coarse = (
        StreamEncoder(stream.kv_model, sink, 14, encoding=encoding).encode(frames_FSD, spans_of(6))
        for encoding in ("plain", "int4")
    )
    for block, exact in zip(coarse, plain, strict=True):
        again = KvBlock.from_page(block.number, block.start_s, block.end_s, exact.page_L2GSC, "int4")
        assert block.digest == again.digest
