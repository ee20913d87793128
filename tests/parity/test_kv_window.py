"""The sliding window against its rule, written out token by token."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsight.kv.block import KvBlock
from sparsight.kv.disk import DiskBudget
from sparsight.kv.encoder import StreamEncoder, encode_sink
from sparsight.kv.tiers import MemoryBudget, TieredBank
from tests.unit.kv.tiny_stream import (
    ARCHITECTURES,
    FRAME_TOKENS,
    SINK_IDS,
    TinyStream,
    encode,
    frames_of,
    spans_of,
    tiny_stream,
)

FRAMES = 9
SINK_TOKENS = len(SINK_IDS)


@pytest.fixture(scope="module", params=["qwen2", "qwen3_moe"])
def stream(request: pytest.FixtureRequest) -> TinyStream:
    return tiny_stream(request.param)


class EveryPair:
    """The rule: a token sees those less than `window` before it at their distance, and the sink tokens further back at
    distance window - 1. Attends the whole stream at once, one query after the other."""

    def __init__(self, stream: TinyStream, window: int, far_sink: bool = False) -> None:
        self._far_sink = far_sink  # frames see the sink as if it had left the window
        self.keys_and_values_2GTC: list[Tensor] = []
        self._window = window
        self._inverse_C2 = stream.text_model.get_submodule("rotary_emb").inv_freq

    def attend(self, layer: int, queries_HTC: Tensor, keys_GTC: Tensor, values_GTC: Tensor, scale: float) -> Tensor:
        self.keys_and_values_2GTC.append(torch.stack((keys_GTC, values_GTC)))
        group = len(queries_HTC) // len(keys_GTC)
        keys_HTC, values_HTC = keys_GTC.repeat_interleave(group, 0), values_GTC.repeat_interleave(group, 0)
        outputs_HC = []
        for token in range(queries_HTC.shape[1]):
            seen = [key for key in range(token + 1) if key < SINK_TOKENS or token - key < self._window]
            distances_K = torch.tensor([min(token - key, self._window - 1) for key in seen])
            if self._far_sink and token >= SINK_TOKENS:
                distances_K[:SINK_TOKENS] = self._window - 1
            queries_HKC = self._turned(queries_HTC[:, token, None], distances_K)
            weights_HK = ((queries_HKC * keys_HTC[:, seen]).sum(-1) * scale).softmax(-1)
            outputs_HC.append((weights_HK[..., None] * values_HTC[:, seen]).sum(1))
        return torch.stack(outputs_HC, dim=1)

    def _turned(self, x_H1C: Tensor, by_K: Tensor) -> Tensor:
        first, second = x_H1C.chunk(2, dim=-1)
        turned = torch.complex(first, second) * torch.exp(1j * by_K[:, None] * self._inverse_C2)
        return torch.cat((turned.real, turned.imag), dim=-1)


# The sink leaves the window in the middle of a frame, at a frame's edge, and before the first frame is complete.
@pytest.mark.parametrize("window", [23, 24, 25, 12, 7, 5])
def test_every_block_follows_the_rule(stream: TinyStream, window: int) -> None:
    frames_FSD = frames_of(stream, FRAMES)
    pairs = EveryPair(stream, window)
    stream.kv_model.run(torch.cat((stream.kv_model.embed(SINK_IDS), frames_FSD.flatten(0, 1))), pairs)
    expected_L2GTC = torch.stack(pairs.keys_and_values_2GTC)
    sink, blocks = encode(stream, frames_FSD, window)
    pages = torch.cat([block.page_L2GSC for block in (sink, *blocks)], dim=3)
    torch.testing.assert_close(pages, expected_L2GTC, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_blocks_do_not_depend_on_the_calls_they_came_in(architecture: str) -> None:
    """Frames one by one, in sevens, or all 64 at once, until far beyond the window: the same archive."""
    stream, window = tiny_stream(architecture), 123
    frames_FSD = frames_of(stream, 64)
    sink, at_once = encode(stream, frames_FSD, window)
    for chunk in (1, 7):
        encoder = StreamEncoder(stream.kv_model, sink, window)
        blocks: list[KvBlock] = []
        for frames in frames_FSD.split(chunk):
            blocks += encoder.encode(frames, spans_of(len(frames), len(blocks)))
        for block, expected in zip(blocks, at_once, strict=True):
            assert (block.number, block.start_s) == (expected.number, expected.start_s)
            torch.testing.assert_close(block.page_L2GSC, expected.page_L2GSC, atol=2e-5, rtol=2e-5)


# The whole stream, a tail that just fills the window, and fewer blocks than the sink needs to leave it.
@pytest.mark.parametrize(("window", "before", "given"), [(500, 6, 6), (23, 6, 6), (23, 6, 5), (25, 3, 3), (5, 4, 1)])
def test_another_encoder_goes_on_from_the_newest_blocks(
    stream: TinyStream, window: int, before: int, given: int
) -> None:
    frames_FSD = frames_of(stream, FRAMES)
    sink, blocks = encode(stream, frames_FSD, window)
    heir = StreamEncoder(stream.kv_model, sink, window, blocks[before - given : before])
    rest = heir.encode(frames_FSD[before:], spans_of(FRAMES - before, before))
    assert [block.number for block in rest] == list(range(before, FRAMES))
    for block, expected in zip(rest, blocks[before:], strict=True):
        torch.testing.assert_close(block.page_L2GSC, expected.page_L2GSC, atol=2e-5, rtol=2e-5)


def bank_without(folder: Path, sink: KvBlock, blocks: list[KvBlock], lost: set[int]) -> TieredBank:
    """A restored bank of these blocks, some of whose pages are gone."""
    memory, disk = MemoryBudget(2**22), DiskBudget(2**30, segment_bytes=blocks[0].rows_LU.nbytes)
    with TieredBank.create(folder, sink, memory, disk) as bank:
        for block in blocks:
            bank.put(block)
    for number in lost:
        (folder / f"{number:05d}.pages").unlink()
    return TieredBank.restore(folder, memory, disk)


def test_a_stream_goes_on_behind_lost_blocks(stream: TinyStream, tmp_path: Path) -> None:
    """Everything is lost: what comes is encoded as behind a sink that has left the window, and nothing else."""
    window, before = 23, 4
    frames_FSD = frames_of(stream, FRAMES)
    sink, blocks = encode(stream, frames_FSD[:before], window)
    pairs = EveryPair(stream, window, far_sink=True)
    stream.kv_model.run(torch.cat((stream.kv_model.embed(SINK_IDS), frames_FSD[before:].flatten(0, 1))), pairs)
    expected_L2GTC = torch.stack(pairs.keys_and_values_2GTC)[..., SINK_TOKENS:, :]
    with bank_without(tmp_path, sink, blocks, lost=set(range(before))) as bank:
        heir = StreamEncoder.after(stream.kv_model, bank, window)
    rest = heir.encode(frames_FSD[before:], spans_of(FRAMES - before, before))
    assert [block.number for block in rest] == list(range(before, FRAMES))
    pages = torch.cat([block.page_L2GSC for block in rest], dim=3)
    torch.testing.assert_close(pages, expected_L2GTC, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("lost", [set(), {0}, {2}, {5}, {1, 4}])
@pytest.mark.parametrize("window", [23, 500])
def test_the_window_begins_behind_the_newest_lost_block(
    stream: TinyStream, window: int, lost: set[int], tmp_path: Path
) -> None:
    frames_FSD, before = frames_of(stream, FRAMES), 6
    sink, blocks = encode(stream, frames_FSD, window)
    ways: list[list[KvBlock]] = []
    bank_without(tmp_path, sink, blocks[:before], lost).close()
    for chunk in (1, 3):
        with TieredBank.restore(tmp_path, MemoryBudget(2**22), DiskBudget(2**30)) as bank:
            heir = StreamEncoder.after(stream.kv_model, bank, window)
        behind = before - 1 - max(lost, default=-1)
        tokens = behind * FRAME_TOKENS + (SINK_TOKENS if not lost else 0)
        assert heir.kept_tokens == min(tokens, window)
        ways.append([])
        for start in range(before, FRAMES, chunk):
            ways[-1] += heir.encode(frames_FSD[start : start + chunk], spans_of(chunk, start))
    for block, other, whole in zip(*ways, blocks[before:], strict=True):
        assert block.number == other.number == whole.number
        torch.testing.assert_close(block.page_L2GSC, other.page_L2GSC, atol=2e-5, rtol=2e-5)
        reaches_a_lost_one = lost and (before - max(lost)) * FRAME_TOKENS < window + FRAME_TOKENS
        if not reaches_a_lost_one:
            torch.testing.assert_close(block.page_L2GSC, whole.page_L2GSC, atol=2e-5, rtol=2e-5)


def test_what_is_kept_and_what_is_seen_is_bounded(stream: TinyStream) -> None:
    window = 23
    frames_FSD = frames_of(stream, 30)
    encoder = StreamEncoder(stream.kv_model, encode(stream, frames_FSD[:1])[0], window)
    kept = []
    for frame in range(30):
        encoder.encode(frames_FSD[frame : frame + 1], spans_of(1, frame))
        kept.append(encoder.kept_tokens)
    assert kept == [min(SINK_TOKENS + FRAME_TOKENS * (frame + 1), window) for frame in range(30)]


def test_a_frame_far_back_is_forgotten_and_the_sink_is_not(stream: TinyStream) -> None:
    window = 12
    frames_FSD = frames_of(stream, 20)
    changed_FSD = torch.cat((frames_of(stream, 1, seed=5), frames_FSD[1:]))
    _, blocks = encode(stream, frames_FSD, window)
    _, others = encode(stream, changed_FSD, window)
    layers, reach = stream.kv_model.layers, window // FRAME_TOKENS + 1
    assert not torch.allclose(blocks[1].page_L2GSC, others[1].page_L2GSC)
    # Through each layer, what a token knows reaches one window further back.
    torch.testing.assert_close(blocks[layers * reach].page_L2GSC, others[layers * reach].page_L2GSC)

    other_sink = encode_sink(stream.kv_model, SINK_IDS + 1)
    others = StreamEncoder(stream.kv_model, other_sink, window).encode(frames_FSD, spans_of(20))
    assert not torch.allclose(blocks[-1].page_L2GSC, others[-1].page_L2GSC, atol=1e-4)
