"""The memory of all streams of a service: one bank a stream, under limits.

A plain class: no Ray, no model, no pictures. `kv_bank_actor` gives it a process of its own.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sparsight.errors import StreamError, StreamFullError
from sparsight.kv.bank import RamBank, check_follows
from sparsight.kv.block import KvBlock


@dataclass(frozen=True)
class StreamInfo:
    """What is known of a stream; `span_s` are the first and last frame's times, None before the first frame."""

    id: str
    model: str
    created: int
    frames: int
    bytes: int
    span_s: tuple[float, float] | None


@dataclass(frozen=True)
class _Stream:
    model: str
    created: int
    bank: RamBank


class StreamBanks:
    """At most `max_streams` streams, each with a byte budget of its own."""

    def __init__(self, max_streams: int, max_stream_bytes: int) -> None:
        self._max_streams = max_streams
        self._max_stream_bytes = max_stream_bytes
        self._streams: dict[str, _Stream] = {}

    def open(self, stream_id: str, model: str, sink: KvBlock) -> StreamInfo | None:
        """Start a stream, or find it again; None when there are `max_streams` already."""
        if stream_id not in self._streams:
            if len(self._streams) >= self._max_streams:
                return None
            bank = RamBank(sink, self._max_stream_bytes)
            self._streams[stream_id] = _Stream(model, int(time.time()), bank)
        return self.describe(stream_id)

    def close(self, stream_id: str) -> bool:
        """Forget a stream; False if there was none."""
        return self._streams.pop(stream_id, None) is not None

    def describe(self, stream_id: str) -> StreamInfo | None:
        stream = self._streams.get(stream_id)
        if stream is None:
            return None
        spans_s_N2 = stream.bank.index().spans_s_N2
        span_s = (float(spans_s_N2[0, 0]), float(spans_s_N2[-1, 1])) if len(spans_s_N2) else None
        return StreamInfo(stream_id, stream.model, stream.created, len(stream.bank), stream.bank.nbytes, span_s)

    def describe_all(self) -> list[StreamInfo]:
        infos = (self.describe(stream_id) for stream_id in self._streams)
        return [info for info in infos if info is not None]

    def put(self, stream_id: str, blocks: Sequence[KvBlock]) -> StreamInfo:
        """Keep all of the blocks or none. A block that is there already, of equal content, is left as it is.

        Raises `StreamError` when they do not fit, do not follow the last block, or contradict one that is kept.
        """
        bank = self.bank(stream_id)
        new = [block for block in blocks if not _kept(bank, block)]
        wanted = sum(block.nbytes for block in new)
        if bank.nbytes + wanted > self._max_stream_bytes:
            raise StreamFullError(
                f"the stream is full: it holds {len(bank)} frames in {bank.nbytes} of {self._max_stream_bytes} bytes, "
                f"{len(new)} more take {wanted}. Close it and open another."
            )
        if [block.number for block in new] != list(range(len(bank), len(bank) + len(new))):
            raise StreamError(f"blocks {[block.number for block in new]} do not follow {len(bank)} kept ones.")
        last = bank.get(len(bank) - 1).head if len(bank) else bank.sink.head
        for block in new:
            check_follows(block, last)
            last = block.head
        for block in new:
            bank.put(block)
        info = self.describe(stream_id)
        assert info is not None
        return info

    def newest(self, stream_id: str, tokens: int) -> list[KvBlock]:
        """The newest blocks that hold at least `tokens` tokens together, in time order; all if there are fewer."""
        bank = self.bank(stream_id)
        if len(bank) == 0:
            return []
        blocks = -(-tokens // bank.get(len(bank) - 1).tokens)
        return [bank.get(number) for number in range(max(0, len(bank) - blocks), len(bank))]

    def bank(self, stream_id: str) -> RamBank:
        """A stream's own bank. Raises `StreamError` for a stream that is not open."""
        if stream_id not in self._streams:
            raise StreamError(f"stream '{stream_id}' is not open.")
        return self._streams[stream_id].bank


def _kept(bank: RamBank, block: KvBlock) -> bool:
    if not 0 <= block.number < len(bank):
        return False
    if bank.get(block.number).digest != block.digest:
        raise StreamError(f"block {block.number} is kept already, with other content.")
    return True
