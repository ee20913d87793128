"""The memory of running streams, in a process of its own: encoders and answerers may come and go around it.

`KvBankActor` is the Ray shell around `StreamBanks`; `RemoteBanks` and `RemoteBank` let another process use it as if it
were its own. Started by `serve_apps.stream_app`, as an actor that the Serve controller owns and that outlives every
replica.
"""

from collections.abc import Sequence
from typing import Any, cast

import ray
import torch
from ray.exceptions import RayTaskError
from torch import Tensor

from actors.stream_banks import StreamBanks, StreamInfo
from sparsight.errors import StreamError
from sparsight.kv.bank import BlockIndex
from sparsight.kv.block import KvBlock


class KvBankActor(StreamBanks):
    """`StreamBanks` in a process of its own; the extra methods are those of a `BlockBank`, for one stream by id."""

    def sink(self, stream_id: str) -> KvBlock:
        return self.bank(stream_id).sink

    def index(self, stream_id: str) -> BlockIndex:
        index = self.bank(stream_id).index()
        return index.rows(torch.arange(len(index)))  # a copy: a view would take its whole reserved room along

    def get(self, stream_id: str, number: int) -> KvBlock:
        return self.bank(stream_id).get(number)

    def gather(self, stream_id: str, layer: int, numbers: Sequence[int]) -> Tensor:
        return self.bank(stream_id).gather(layer, numbers)

    def clear(self, stream_id: str) -> None:
        self.bank(stream_id).clear()

    def next_number(self, stream_id: str) -> int:
        return self.bank(stream_id).next_number

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
    """One stream's `BlockBank`, in a `KvBankActor`. The sink never changes and is fetched once."""

    def __init__(self, actor: Any, stream_id: str) -> None:
        self._actor = actor
        self._stream_id = stream_id
        self._sink: KvBlock | None = None

    @property
    def sink(self) -> KvBlock:
        sink = self._sink
        if sink is None:
            sink = self._sink = cast(KvBlock, _result(self._actor.sink.remote(self._stream_id)))
        return sink

    @property
    def nbytes(self) -> int:
        return _result(self._actor.size.remote(self._stream_id))[1]

    @property
    def next_number(self) -> int:
        return _result(self._actor.next_number.remote(self._stream_id))

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
