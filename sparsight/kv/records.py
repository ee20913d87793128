"""The records of a segment's index: one a page, and what can still be told of a page when its record is damaged.

A record's last field is its checksum: a writer that is killed leaves half a record, or one whose checksum is still
zero. Its head, number and times, has a checksum of its own, so that a block can be named whose record is damaged
further on. It knows no files. Used by `segments` and `archive`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from sparsight.kv.block import DIGEST_BYTES, BlockHead, KvBlock, block_digest, row_digests
from sparsight.kv.page import PageFormat

Array = np.ndarray[Any, Any]
_HEAD_BYTES = 24
_NOBODYS = 0xFF
"""Fills a record that stands for a page of which nobody has the record any more."""


@dataclass(frozen=True)
class Records:
    """What a segment's index knows of its blocks, in time order."""

    numbers_N: Tensor
    spans_s_N2: Tensor
    mean_keys_NLGC: Tensor
    lost: tuple[int, ...]
    """Blocks whose records are damaged, in order: of this segment, and of earlier ones that named none."""
    newest: BlockHead
    """What the next block must follow, lost or not; what a lost one held has no digest."""


def record_type(page_format: PageFormat) -> np.dtype[Any]:
    """One record of an index file; little-endian, without gaps."""
    return np.dtype(
        [
            ("number", "<i8"),
            ("start_s", "<f8"),
            ("end_s", "<f8"),
            ("head_check", "u1", DIGEST_BYTES),
            ("row_digests", "u1", (page_format.layers, DIGEST_BYTES)),
            ("mean_keys", "<f4", (page_format.layers, page_format.heads, page_format.width)),
            ("check", "u1", DIGEST_BYTES),
        ]
    )


def records_of(blocks: Sequence[KvBlock]) -> Array:
    """One record a block; the blocks are of one format."""
    records_N = np.zeros(len(blocks), record_type(blocks[0].format))
    for record, block in zip(records_N, blocks, strict=True):
        digests = row_digests(block.rows_LU)
        assert block_digest(digests, block.mean_keys_LGC) == block.digest, "a block changed after it was made"
        record["number"], record["start_s"], record["end_s"] = block.number, block.start_s, block.end_s
        record["head_check"] = np.frombuffer(_head_checksum(record), np.uint8)
        record["row_digests"] = np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES)
        record["mean_keys"] = block.mean_keys_LGC.numpy()
        record["check"] = np.frombuffer(_checksum(record), np.uint8)
    return records_N


def parse(data: bytes, page_format: PageFormat) -> Array:
    """The records that an index file has in full length."""
    kind = record_type(page_format)
    return np.frombuffer(data, kind, count=len(data) // kind.itemsize)


def written(records_N: Array) -> int:
    """How many records there are without those at the end that a killed writer left unfinished."""
    finished = np.flatnonzero(records_N["check"].any(axis=1))
    return int(finished[-1]) + 1 if len(finished) else 0


def fitted(records_N: Array, slots: int) -> Array:
    """So many records: the first ones, filled up with nobody's."""
    filled_N = np.frombuffer(bytearray([_NOBODYS]) * (slots * records_N.itemsize), records_N.dtype)
    kept = min(slots, len(records_N))
    filled_N[:kept] = records_N[:kept]
    return filled_N


def whole(records_N: Array) -> Array:
    """Which records are as they were written."""
    return np.array([_checksum(record) == record["check"].tobytes() for record in records_N], np.bool_)


def merged(here_N: Array, there_N: Array) -> Array:
    """Of each record the copy that is whole or, where none is, the one that can still name its block."""
    best_N = fitted(here_N[:0], len(here_N))
    for copy_N in (there_N, here_N):
        named = np.array([named_number(record) is not None for record in copy_N], np.bool_)
        best_N[named] = copy_N[named]
    for copy_N in (there_N, here_N):
        best_N[whole(copy_N)] = copy_N[whole(copy_N)]
    return best_N


def named_number(record: Any) -> int | None:
    """The number of a record's block; None where its head is damaged."""
    return int(record["number"]) if _head_checksum(record) == record["head_check"].tobytes() else None


def has_page(record: Any, page: memoryview) -> bool:
    """Whether these bytes are the page that a whole record speaks of."""
    layers, row_bytes = len(record["row_digests"]), len(page) // len(record["row_digests"])
    rows = (page[layer * row_bytes : (layer + 1) * row_bytes] for layer in range(layers))
    return b"".join(xxhash.xxh3_128_digest(row) for row in rows) == record["row_digests"].tobytes()


def known(records_N: Array, lost: Sequence[int], before: BlockHead, page_format: PageFormat) -> Records:
    """What whole records say, and which others of the segment are lost; `before` is the newest of earlier blocks."""
    spans_s_N2 = torch.from_numpy(np.stack((records_N["start_s"], records_N["end_s"]), axis=1))
    mean_keys_NLGC = torch.from_numpy(np.ascontiguousarray(records_N["mean_keys"]))
    newest = before
    if len(records_N):
        digest = block_digest(records_N[-1]["row_digests"].tobytes(), mean_keys_NLGC[-1])
        newest = BlockHead(int(records_N[-1]["number"]), float(spans_s_N2[-1, 0]), page_format, digest)
    if lost and lost[-1] > newest.number:
        newest = BlockHead(lost[-1], newest.start_s, page_format, digest="")
    numbers_N = torch.from_numpy(np.ascontiguousarray(records_N["number"]))
    return Records(numbers_N, spans_s_N2, mean_keys_NLGC, tuple(lost), newest)


def _head_checksum(record: Any) -> bytes:
    return xxhash.xxh3_128_digest(record.tobytes()[:_HEAD_BYTES])


def _checksum(record: Any) -> bytes:
    return xxhash.xxh3_128_digest(record.tobytes()[:-DIGEST_BYTES])
