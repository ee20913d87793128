"""Rows of pages in one buffer: what a tier of fast memory holds of a slower one.

A row is one layer of one block. The least recently used row leaves first, except those of blocks that are kept. The
buffer is allocated once and never moves, so memory stays what the budget says, and a layer's rows are gathered by one
copy. It knows nothing of files or locks. Used by `tiers`, for main memory and for an accelerator's.
"""

import mmap
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

Key = tuple[int, int]
"""A block's number, a layer."""


def keys_of(number: int, layers: int) -> list[Key]:
    """Of all rows of a block's page."""
    return [(number, layer) for layer in range(layers)]


class RowCache:
    """At most `capacity` rows of `row_bytes` bytes on `device`."""

    def __init__(self, row_bytes: int, capacity: int, device: torch.device) -> None:
        self._row_bytes = row_bytes
        self._mapping: mmap.mmap | None = None
        if device.type == "cpu" and capacity * row_bytes > 0:
            # Anonymous pages cost nothing until they are written, and can be given back one by one.
            self._mapping = mmap.mmap(-1, capacity * row_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a system without huge pages
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
            self._buffer_NU = torch.frombuffer(self._mapping, dtype=torch.uint8).view(capacity, row_bytes)
        else:
            self._buffer_NU = torch.empty(capacity, row_bytes, dtype=torch.uint8, device=device)
        self._capacity = capacity
        self._free = list(range(capacity - 1, -1, -1))
        self._used: OrderedDict[Key, int] = OrderedDict()
        self._kept: dict[Key, int] = {}

    @property
    def device(self) -> torch.device:
        return self._buffer_NU.device

    @property
    def capacity(self) -> int:
        return self._capacity

    def __len__(self) -> int:
        return len(self._used) + len(self._kept)

    @property
    def free(self) -> int:
        """Rows that can be added before another has to leave."""
        return len(self._free)

    def read(self, keys: Sequence[Key], rows_RU: Tensor) -> list[int]:
        """Copy rows to their places in `rows_RU`, on `device`; returns the places of those that are not here. What is
        found counts as used now."""
        slots = [self._touch(key) for key in keys]
        here = [slot for slot in slots if slot is not None]
        if len(here) == len(slots):
            slots_R = torch.tensor(here, dtype=torch.long, device=self.device)
            torch.index_select(_in_words(self._buffer_NU), 0, slots_R, out=_in_words(rows_RU))
            return []
        for slot, row_U in zip(slots, rows_RU, strict=True):
            if slot is not None:
                row_U.copy_(self._buffer_NU[slot])
        return [place for place, slot in enumerate(slots) if slot is None]

    def add(self, key: Key, row_U: Tensor, keep: bool = False) -> None:
        """Copy a row in, as far as there is room for it."""
        slot = self.claim(key, keep)
        if slot is not None:
            slot.copy_(row_U)

    def claim(self, key: Key, keep: bool = False) -> Tensor | None:
        """The place [U] of a row, for the caller to write; None where every row is kept."""
        slot = self._touch(key)
        if slot is None:
            if not self._free and not self._used:
                return None
            slot = self._free.pop() if self._free else self._used.popitem(last=False)[1]
            (self._kept if keep else self._used)[key] = slot
        elif keep and key in self._used:
            self._kept[key] = self._used.pop(key)
        return self._buffer_NU[slot]

    def release(self, keys: Sequence[Key]) -> None:
        """These rows may leave when others are used more recently."""
        for key in keys:
            if key in self._kept:
                self._used[key] = self._kept.pop(key)

    def forget(self, keys: Sequence[Key]) -> None:
        for key in keys:
            slot = self._used.pop(key, None)
            slot = self._kept.pop(key, None) if slot is None else slot
            if slot is not None:
                self._free.append(slot)

    def shrink(self, capacity: int) -> None:
        """Give up the slots from `capacity` on, with the rows in them, and their memory."""
        if capacity >= self._capacity:
            return
        for rows in (self._used, self._kept):
            for key in [key for key, slot in rows.items() if slot >= capacity]:
                del rows[key]
        self._free = [slot for slot in self._free if slot < capacity]
        if self._mapping is not None:
            start = -(-capacity * self._row_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            end = self._capacity * self._row_bytes
            if start < end:
                self._mapping.madvise(mmap.MADV_DONTNEED, start, end - start)
        self._capacity = capacity

    def _touch(self, key: Key) -> int | None:
        if key in self._used:
            self._used.move_to_end(key)
            return self._used[key]
        return self._kept.get(key)


def _in_words(rows_RU: Tensor) -> Tensor:
    """The same bytes, eight to a number where rows allow it: torch gathers numbers, and fewer are faster."""
    return rows_RU.view(torch.int64) if rows_RU.shape[1] % 8 == 0 else rows_RU
