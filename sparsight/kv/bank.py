"""Where a stream's blocks are kept, and the small index by which they are found.

`BlockBank` is the role: everything that an encoder's blocks go into and an answerer reads from, in calls coarse enough
to cross a process boundary. `RamBank` holds the blocks of one stream in main memory under a byte budget. A bank neither
scores nor chooses, and nothing in it is changed by a question. Filled from `encoder`, read by `answerer`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sparsight.errors import StreamError, StreamFullError
from sparsight.kv.block import SINK_NUMBER, BlockHead, KvBlock


@dataclass(frozen=True)
class BlockIndex:
    """A snapshot of which blocks there are, in time order: what retrieval needs, without a single page.

    `mean_keys_LNGC` are the blocks' mean keys (float32), layer first: one layer's are one matrix, read once to score
    them. `norms_LN` are their lengths, over all heads of a layer.
    """

    numbers_N: Tensor
    spans_s_N2: Tensor
    mean_keys_LNGC: Tensor
    norms_LN: Tensor

    def __len__(self) -> int:
        return self.numbers_N.shape[0]

    def until(self, time_s: float) -> "BlockIndex":
        """The blocks before the first that ends after `time_s`: what a question asked then may rest on."""
        return self.rows(slice(int((self.spans_s_N2[:, 1] <= time_s).cumprod(0).sum())))

    def without(self, numbers: Collection[int]) -> "BlockIndex":
        """The blocks but for these."""
        return self.rows(~torch.isin(self.numbers_N, torch.tensor(sorted(numbers), dtype=torch.long)))

    def rows(self, rows: slice | Tensor) -> "BlockIndex":
        """Some of the blocks; of a slice, views."""
        numbers_N, spans_s_N2 = self.numbers_N[rows], self.spans_s_N2[rows]
        return BlockIndex(numbers_N, spans_s_N2, self.mean_keys_LNGC[:, rows], self.norms_LN[:, rows])


class BlockBank(Protocol):
    """One stream's memory: the system prompt's block and the frames' blocks."""

    @property
    def sink(self) -> KvBlock:
        """The system prompt's block."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all pages and index vectors, the sink's among them."""
        ...

    @property
    def next_number(self) -> int:
        """The number after the last that was put: 0 for a new stream. Lost blocks count."""
        ...

    def __len__(self) -> int:
        """Number of frame blocks."""
        ...

    def put(self, block: KvBlock) -> None:
        """Keep the next frame's block. Raises `StreamError` when full, out of order or of another shape; then nothing
        has changed. Repeating the last put changes nothing either."""
        ...

    def index(self) -> BlockIndex:
        """The index as it is now; later puts do not change it."""
        ...

    def get(self, number: int) -> KvBlock:
        """One whole block. Raises `StreamError` if it is not kept."""
        ...

    def gather(self, layer: int, numbers: Sequence[int]) -> Tensor:
        """One layer's keys and values of several blocks, in the order given: a new tensor [R, 2, G, S, C] in the
        model's type. Raises `LostBlockError` for a block whose page is damaged or missing; the index has it no more."""
        ...

    def clear(self) -> None:
        """Forget all frames; the system prompt stays."""
        ...


class RamBank:
    """A `BlockBank` in this process's main memory that refuses blocks beyond `budget_bytes`."""

    def __init__(self, sink: KvBlock, budget_bytes: int) -> None:
        assert sink.number == SINK_NUMBER
        self.sink = sink
        self._budget_bytes = budget_bytes
        self.clear()

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def next_number(self) -> int:
        return 1 + next(reversed(self._blocks), SINK_NUMBER)

    def __len__(self) -> int:
        return len(self._blocks)

    def put(self, block: KvBlock) -> None:
        last = next(reversed(self._blocks.values()), self.sink)
        if (block.number, block.digest) == (last.number, last.digest):
            return
        check_follows(block, last.head)
        if self._nbytes + block.nbytes > self._budget_bytes:
            raise StreamFullError(
                f"the stream's memory is full: {len(self)} blocks take {self._nbytes} of {self._budget_bytes} bytes, "
                f"the next takes {block.nbytes}. Close the stream, or give it a larger budget."
            )
        self._blocks[block.number] = block
        self._rows.append(block)
        self._nbytes += block.nbytes

    def index(self) -> BlockIndex:
        return self._rows.snapshot()

    def get(self, number: int) -> KvBlock:
        if number not in self._blocks:
            raise StreamError(f"block {number} is not in this bank of {len(self)} blocks: take numbers from its index.")
        return self._blocks[number]

    def gather(self, layer: int, numbers: Sequence[int]) -> Tensor:
        blocks = [self.get(number) for number in numbers]
        return blocks[0].format.unpack(torch.stack([block.rows_LU[layer] for block in blocks]))

    def clear(self) -> None:
        self._blocks: dict[int, KvBlock] = {}
        self._rows = IndexRows(self.sink.mean_keys_LGC)
        self._nbytes = self.sink.nbytes


def check_follows(block: KvBlock, last: BlockHead) -> None:
    """Raises `StreamError` for a block that cannot come after `last`, the newest of the stream or its sink."""
    wanted = last.format
    if last.number == SINK_NUMBER:
        wanted = replace(wanted, encoding=block.format.encoding, tokens=block.tokens)
    if block.format != wanted:
        raise StreamError(
            f"block {block.number} has a page of {block.format}, this stream's have {wanted}: "
            "encode a stream with one model, one frame size and one encoding."
        )
    if block.number <= last.number or block.start_s < last.start_s:
        raise StreamError(
            f"block {block.number} at {block.start_s:g} s cannot follow block {last.number} at {last.start_s:g} s: "
            "put the blocks of a stream in time order."
        )


class IndexRows:
    """Index rows in tensors that double when they are full, so that a snapshot is a view and costs nothing.

    Rows are only ever added, and a full tensor is left as it is: no snapshot changes under its reader.
    """

    def __init__(self, like_LGC: Tensor, rows: int = 64) -> None:
        self._length = 0
        self._room = _room_for(rows, like_LGC.shape)

    def __len__(self) -> int:
        return self._length

    def append(self, block: KvBlock) -> None:
        span_s_12 = torch.tensor([[block.start_s, block.end_s]], dtype=torch.float64)
        self.extend(torch.tensor([block.number]), span_s_12, block.mean_keys_LGC[None])

    def extend(self, numbers_N: Tensor, spans_s_N2: Tensor, mean_keys_NLGC: Tensor) -> None:
        """Append rows of many blocks at once."""
        mean_keys_LNGC = mean_keys_NLGC.transpose(0, 1)
        self.add(BlockIndex(numbers_N, spans_s_N2, mean_keys_LNGC, mean_keys_LNGC.flatten(2).norm(dim=2)))

    def add(self, index: BlockIndex) -> None:
        """Append the rows of an index."""
        start, end = self._length, self._length + len(index)
        if end > len(self._room):
            full = self.snapshot()
            L, _, G, C = full.mean_keys_LNGC.shape
            self._room = _room_for(max(end, 2 * len(self._room)), torch.Size((L, G, C)))
            _copy(full, self._room.rows(slice(start)))
        _copy(index, self._room.rows(slice(start, end)))
        self._length = end

    def snapshot(self) -> BlockIndex:
        return self._room.rows(slice(self._length))


def index_row_bytes(mean_keys_LGC: Tensor) -> int:
    """What one block takes of an index: its mean keys, and their length in each layer."""
    return mean_keys_LGC.nbytes + 4 * mean_keys_LGC.shape[0]


def _room_for(rows: int, shape_LGC: torch.Size) -> BlockIndex:
    L, G, C = shape_LGC
    return BlockIndex(
        torch.empty(rows, dtype=torch.long),
        torch.empty(rows, 2, dtype=torch.float64),
        torch.empty(L, rows, G, C, dtype=torch.float32),
        torch.empty(L, rows, dtype=torch.float32),
    )


def _copy(index: BlockIndex, into: BlockIndex) -> None:
    into.numbers_N.copy_(index.numbers_N)
    into.spans_s_N2.copy_(index.spans_s_N2)
    into.mean_keys_LNGC.copy_(index.mean_keys_LNGC)
    into.norms_LN.copy_(index.norms_LN)
