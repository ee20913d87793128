"""The memory of running streams, in a process of its own: encoders and answerers may come and go around it.

`StreamBanks` is the plain class: one `RamBank` a stream. `KvBankActor` is the Ray shell around it, and `RemoteBank`
lets an answerer in another process read a stream's blocks as if they were its own. Knows no model and no pictures.
Started by `serve_apps.stream_app`, as an actor that the Serve controller owns and that outlives every replica.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError
from torch import Tensor

from sparsight.errors import StreamError
from sparsight.kv.bank import BlockIndex, RamBank
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
            raise StreamError(
                f"the stream is full: it holds {len(bank)} frames in {bank.nbytes} of {self._max_stream_bytes} bytes, "
                f"{len(new)} more take {wanted}. Close it and open another."
            )
        if [block.number for block in new] != list(range(len(bank), len(bank) + len(new))):
            raise StreamError(f"blocks {[block.number for block in new]} do not follow {len(bank)} kept ones.")
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


class KvBankActor(StreamBanks):
    """`StreamBanks` in a process of its own; the extra methods are those of a `BlockBank`, for one stream by id."""

    def sink(self, stream_id: str) -> KvBlock:
        return self.bank(stream_id).sink

    def index(self, stream_id: str) -> BlockIndex:
        return self.bank(stream_id).index()

    def get(self, stream_id: str, number: int) -> KvBlock:
        return self.bank(stream_id).get(number)

    def gather(self, stream_id: str, layer: int, numbers: Sequence[int]) -> Tensor:
        return self.bank(stream_id).gather(layer, numbers)

    def clear(self, stream_id: str) -> None:
        self.bank(stream_id).clear()

    def size(self, stream_id: str) -> tuple[int, int]:
        """Frame blocks, and bytes."""
        bank = self.bank(stream_id)
        return len(bank), bank.nbytes


class RemoteBanks:
    """`StreamBanks` in another process: the same methods, and `bank` gives a `BlockBank` over its blocks.

    Calls block; an error is raised here as it was raised there.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def open(self, stream_id: str, model: str, sink: KvBlock) -> StreamInfo | None:
        return _result(self._actor.open.remote(stream_id, model, sink))

    def close(self, stream_id: str) -> bool:
        return _result(self._actor.close.remote(stream_id))

    def describe(self, stream_id: str) -> StreamInfo | None:
        return _result(self._actor.describe.remote(stream_id))

    def describe_all(self) -> list[StreamInfo]:
        return _result(self._actor.describe_all.remote())

    def put(self, stream_id: str, blocks: Sequence[KvBlock]) -> StreamInfo:
        return _result(self._actor.put.remote(stream_id, list(blocks)))

    def newest(self, stream_id: str, tokens: int) -> list[KvBlock]:
        return _result(self._actor.newest.remote(stream_id, tokens))

    def bank(self, stream_id: str) -> "RemoteBank":
        return RemoteBank(self._actor, stream_id)


class RemoteBank:
    """One stream's `BlockBank`, in a `KvBankActor`."""

    def __init__(self, actor: Any, stream_id: str) -> None:
        self._actor = actor
        self._stream_id = stream_id

    @property
    def sink(self) -> KvBlock:
        return _result(self._actor.sink.remote(self._stream_id))

    @property
    def nbytes(self) -> int:
        return _result(self._actor.size.remote(self._stream_id))[1]

    def __len__(self) -> int:
        return _result(self._actor.size.remote(self._stream_id))[0]

    def put(self, block: KvBlock) -> None:
        _result(self._actor.put.remote(self._stream_id, [block]))

    def index(self) -> BlockIndex:
        return _result(self._actor.index.remote(self._stream_id))

    def get(self, number: int) -> KvBlock:
        return _result(self._actor.get.remote(self._stream_id, number))

    def gather(self, layer: int, numbers: Sequence[int]) -> Tensor:
        return _result(self._actor.gather.remote(self._stream_id, layer, list(numbers)))

    def clear(self) -> None:
        _result(self._actor.clear.remote(self._stream_id))


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, StreamError):
            raise cause from None
        raise
