"""A stream that is larger than main memory: a `BlockBank` over accelerator, main memory, disk and object store.

Rows (one layer of one block) are cached upwards when they are read. Blocks go down behind the caller's back; `flush`
waits until they are durable. `restore` opens what another process left, killed or not. A page that is damaged or
missing is never used: its block is lost, and the stream goes on without it. One process holds a stream at a time; in
it, one thread puts and any number read, and `clear` and `close` come after all of them. `disk` is below main memory.
"""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor

from sparsight.errors import LostBlockError, StorageError, StreamError
from sparsight.kv.bank import BlockIndex, IndexRows, check_follows, index_row_bytes
from sparsight.kv.block import BlockHead, KvBlock
from sparsight.kv.budget import MemoryBudget
from sparsight.kv.disk import DiskBudget, DiskTier
from sparsight.kv.page import PageFormat
from sparsight.kv.row_cache import RowCache, keys_of
from sparsight.kv.waiting import WaitingBlocks
from sparsight.storage import Storage

CPU = torch.device("cpu")
FAR_READERS = 8
"""Requests to the object store at a time."""


class TieredBank:
    """One stream. Made by `create` or `restore`, given back by `close`."""

    def __init__(self, disk: DiskTier, memory: MemoryBudget, device: torch.device) -> None:
        """Only `create` and `restore` call it."""
        self.sink = disk.sink
        self._disk = disk
        self._memory = memory
        self._device = device
        self._mutex = threading.RLock()
        self._putting = threading.Lock()
        self._writer = ThreadPoolExecutor(1, "stream-write")
        self._prefetcher = ThreadPoolExecutor(1, "stream-prefetch")
        self._far_readers = ThreadPoolExecutor(FAR_READERS, "stream-far")
        self._closed = False
        self._forget()

    @classmethod
    def create(
        cls,
        folder: Path,
        sink: KvBlock,
        memory: MemoryBudget,
        disk: DiskBudget,
        store: Storage | None = None,
        device: torch.device = CPU,
    ) -> Self:
        """A new stream in a folder and, with `store`, at an empty prefix; `gather` returns tensors on `device`.

        Raises `StreamError` where there is a stream already, `StorageError` where nothing can be written.
        """
        return cls(DiskTier.create(folder, sink, disk, store), memory, device)

    @classmethod
    def restore(
        cls,
        folder: Path,
        memory: MemoryBudget,
        disk: DiskBudget,
        store: Storage | None = None,
        device: torch.device = CPU,
    ) -> Self:
        """The stream that is in a folder or, where the folder lacks something, in the store, which it takes over.

        The newest pages that main memory has room for are read and checked, the others when they are asked for.
        Raises `StreamError` where there is no stream, or while another process has it; whoever had the store keeps it
        then, as far as it answers.
        """
        tier = DiskTier.restore(folder, disk, store)
        bank = cls(tier, memory, device)
        try:
            bank._load()
        except BaseException:
            tier.give_back()
            bank.close()
            raise
        return bank

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def lost(self) -> Mapping[int, str]:
        """The blocks that are gone, and why."""
        return MappingProxyType(self._lost)

    @property
    def nbytes(self) -> int:
        page_bytes = 0 if self._format is None else self._format.page_bytes
        return self.sink.nbytes + len(self) * (page_bytes + self.sink.mean_keys_LGC.nbytes)

    @property
    def next_number(self) -> int:
        return self._last.number + 1

    def __len__(self) -> int:
        return len(self._numbers)

    def put(self, block: KvBlock) -> None:
        """As `BlockBank.put`; the block is copied. It is not durable yet. While blocks cannot be written, the next put
        tries again first, and raises `StreamError` without keeping its own."""
        with self._putting:
            self._check_open()
            if (block.number, block.digest) == (self._last.number, self._last.digest) and block.number in self._numbers:
                return
            check_follows(block, self._last)
            self._memory.check(block.format, self._index_bytes, cached_pages=1)
            self._disk.check_capacity(block.format, len(self) + len(self._lost))
            if self._format is None:
                self._open_memory(block.format)
            if self._fault is not None or self._waiting.full:
                self.flush()
            with self._mutex:
                self._numbers.add(block.number)
                self._index.append(block)
                self._waiting.add(block, self._index.snapshot().mean_keys_LNGC[:, -1])
                self._take_as_newest(block.head)
            self._writer.submit(self._write)

    def flush(self) -> None:
        """Return when every block put so far survives the end of this process. Raises `StreamError` if one cannot."""
        self._check_open()
        self._writer.submit(self._write).result()

    def upload(self) -> None:
        """Return when every block put so far is in the object store, too. Raises `StreamError` or `StorageError`."""
        self.flush()
        self._disk.upload()

    def index(self) -> BlockIndex:
        with self._mutex:
            if len(self._index) > len(self):
                left = self._index.snapshot().without(self._lost)
                self._index = self._new_index(self._known())
                self._index.add(left)
            return self._index.snapshot()

    def get(self, number: int) -> KvBlock:
        with self._mutex:
            page_format = self._known(number)
            index = self._index.snapshot()
        rows_LU = torch.cat([self._ram_rows(layer, [number]) for layer in range(page_format.layers)])
        row = int(torch.searchsorted(index.numbers_N, number))
        start_s, end_s = index.spans_s_N2[row].tolist()
        return KvBlock.of_rows(number, start_s, end_s, page_format, rows_LU, index.mean_keys_LNGC[:, row].clone())

    def gather(self, layer: int, numbers: Sequence[int]) -> Tensor:
        with self._mutex:
            page_format = self._known(*numbers)
        if self._near is None:
            return page_format.unpack(self._ram_rows(layer, numbers).to(self._device, non_blocking=True))
        return page_format.unpack(self._near_rows(self._near, layer, numbers))

    def prefetch(self, numbers: Sequence[int]) -> "Future[None]":
        """Bring whole blocks into main memory behind the caller's back; blocks that turn out lost are left out."""
        self._check_open()
        return self._prefetcher.submit(self._fetch_blocks, list(numbers))

    def verify(self) -> Mapping[int, str]:
        """Read every page from where it is durable and check it; what is not whole is lost then. Returns `lost`."""
        numbers: list[int] = self.index().numbers_N.tolist()
        self.flush()
        for number in numbers:
            with suppress(LostBlockError):
                self._read(number, 0, list(self._known(number).empty_rows(self._known(number).layers)))
        return self.lost

    def clear(self) -> None:
        with self._putting:
            self._check_open()
            self._prefetcher.submit(lambda: None).result()
            self._writer.submit(lambda: None).result()
            self._disk.clear()
            self._forget()

    def close(self) -> None:
        """Write what waits, end the threads, let another process open the stream. Raises `StreamError` for blocks that
        could not be written; they are gone then. A closed bank stays closed."""
        if self._closed:
            return
        try:
            self.flush()
        finally:
            self._prefetcher.shutdown()
            self._far_readers.shutdown()
            self._writer.shutdown()
            self._closed = True
            self._disk.close()

    def _forget(self) -> None:
        self._format: PageFormat | None = None
        self._last: BlockHead = self.sink.head
        self._index = IndexRows(self.sink.mean_keys_LGC)
        self._numbers: set[int] = set()  # of all blocks that are not lost
        self._waiting = WaitingBlocks(0, 0, 0)  # put, and not durable yet
        self._recent: deque[int] = deque(maxlen=self._memory.recent_blocks)
        self._lost: dict[int, str] = {}
        self._fault: StreamError | None = None
        self._ram = RowCache(1, 0, CPU)
        self._near: RowCache | None = None

    def _open_memory(self, page_format: PageFormat) -> None:
        """Reserve all memory: how much is known with the first page. Raises `StreamError` where it cannot be had."""
        memory = self._memory
        pages = memory.waiting_bytes(page_format) // page_format.page_bytes
        try:
            index = self._new_index(page_format)
            waiting = WaitingBlocks(pages, page_format.layers, page_format.row_bytes)
            ram = RowCache(page_format.row_bytes, memory.cache_rows(page_format, self._index_bytes), CPU)
            if memory.device_bytes:
                capacity = memory.device_bytes // page_format.row_bytes
                self._near = RowCache(page_format.row_bytes, capacity, self._device)
        except (MemoryError, OSError, RuntimeError) as error:
            raise StreamError(f"{memory} cannot be reserved: {error}. Give the stream less.") from error
        self._format, self._index, self._waiting, self._ram = page_format, index, waiting, ram

    def _new_index(self, page_format: PageFormat) -> IndexRows:
        """With room for as many blocks as disk and memory allow."""
        most_rows = 1 + min(
            self._disk.capacity_bytes // page_format.page_bytes,
            self._memory.ram_bytes // index_row_bytes(self.sink.mean_keys_LGC),
        )
        return IndexRows(self.sink.mean_keys_LGC, most_rows)

    @property
    def _index_bytes(self) -> int:
        """Of an index with one row more than now."""
        return (len(self._index) + 1) * index_row_bytes(self.sink.mean_keys_LGC)

    def _take_as_newest(self, head: BlockHead) -> None:
        self._last = head
        if len(self._recent) == self._recent.maxlen and self._recent:
            self._ram.release(keys_of(self._recent[0], head.format.layers))
        self._recent.append(head.number)
        self._give_way(head.format)

    def _give_way(self, page_format: PageFormat) -> None:
        rows = self._memory.cache_rows(page_format, self._index_bytes)
        if rows < self._ram.capacity:
            self._ram.shrink(max(0, rows - rows // 16))  # a sixteenth more, so that it happens rarely

    def _write(self) -> None:
        """On the writer's thread: make all waiting blocks durable, then leave their rows to the cache."""
        while True:
            with self._mutex:
                blocks = self._waiting.blocks()
            if not blocks:
                return
            try:
                written = blocks[: self._disk.append(blocks)]
            except (StorageError, StreamError) as error:
                self._fault = StreamError(
                    f"{len(blocks)} blocks of the stream are in memory only: {error}. Make room, then put or flush "
                    "again; questions are answered meanwhile."
                )
                raise self._fault from error
            self._fault = None
            with self._mutex:
                for block in written:
                    self._cache_page(block.number, block.rows_LU)
                    self._waiting.remove(block.number)

    def _load(self) -> None:
        for records in self._disk.load():
            page_format = self._disk.format
            assert page_format is not None
            if self._format is None:
                self._memory.check(page_format, self._index_bytes, cached_pages=0)
                self._open_memory(page_format)
            self._numbers.update(records.numbers_N.tolist())
            self._index.extend(records.numbers_N, records.spans_s_N2, records.mean_keys_NLGC)
            self._lost.update(dict.fromkeys(records.lost, "its record is damaged or missing"))
            self._last = records.newest
        if self._format is not None:
            self._memory.check(self._format, self._index_bytes, cached_pages=0)
            self._give_way(self._format)
            numbers: list[int] = self._index.snapshot().numbers_N.tolist()
            self._recent.extend(numbers)
            near = [number for number in numbers if self._disk.is_near(number)]
            newest = near[max(0, len(near) - self._ram.free // self._format.layers) :]
            with ThreadPoolExecutor(2) as readers:
                for done in [readers.submit(self._fill, newest[start::2]) for start in (0, 1)]:
                    done.result()

    def _fill(self, numbers: Sequence[int]) -> None:
        """Read pages straight into the cache, while nobody else has the bank."""
        for number in numbers:
            keep = number in self._recent
            with self._mutex:
                places = [self._ram.claim(key, keep) for key in keys_of(number, self._known().layers)]
            self._read(number, 0, [place for place in places if place is not None])

    def _fetch_blocks(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            with suppress(LostBlockError):
                self.get(number)

    def _near_rows(self, near: RowCache, layer: int, numbers: Sequence[int]) -> Tensor:
        """One layer's rows [R, U] on the accelerator, which has those of main memory then, too."""
        keys = [(number, layer) for number in numbers]
        rows_RU = self._known().empty_rows(len(numbers), self._device)
        with self._mutex:
            missing = near.read(keys, rows_RU)
        if missing:
            missing_RU = self._ram_rows(layer, [numbers[place] for place in missing])
            rows_RU[missing] = missing_RU.to(self._device, non_blocking=True)
        with self._mutex:
            for place in missing:
                near.add(keys[place], rows_RU[place])
        return rows_RU

    def _ram_rows(self, layer: int, numbers: Sequence[int]) -> Tensor:
        """One layer's rows [R, U]; main memory has them then, those of the slow tiers, too."""
        keys = [(number, layer) for number in numbers]
        rows_RU = self._known().empty_rows(len(numbers), page_locked=self._device.type == "cuda")
        with self._mutex:
            missing = self._ram.read(keys, rows_RU)
        near: list[tuple[int, Tensor]] = []
        far: list[Future[None]] = []
        for place in missing:
            number, row_U = numbers[place], rows_RU[place]
            with self._mutex:
                waits = self._waiting.copy_row(number, layer, row_U)
            if not waits and self._disk.is_near(number):
                near.append((number, row_U))
            elif not waits:
                far.append(self._far_readers.submit(self._read_far, number, layer, row_U))
        self._disk.expect(layer, [number for number, _ in near])
        for number, row_U in near:
            self._read(number, layer, [row_U])
        for done in far:
            done.result()
        with self._mutex:
            self._known(*numbers)
            for place in missing:
                self._ram.add(keys[place], rows_RU[place], keep=numbers[place] in self._recent)
        return rows_RU

    def _read_far(self, number: int, layer: int, row_U: Tensor) -> None:
        """Of a page that is in the store only, all rows come in one request: other layers will ask for them."""
        rows_LU = self._known(number).empty_rows(self._known(number).layers)
        self._read(number, 0, list(rows_LU))
        row_U.copy_(rows_LU[layer])
        with self._mutex:
            if number not in self._lost:
                self._cache_page(number, rows_LU)

    def _read(self, number: int, first_layer: int, rows: Sequence[Tensor]) -> None:
        """Rows from the slow tiers, checked; a page that is not whole is lost then."""
        reason = self._disk.read(number, first_layer, rows)
        if reason is not None:
            self._lose(number, reason)

    def _cache_page(self, number: int, rows_LU: Tensor) -> None:
        for key, row_U in zip(keys_of(number, self._known().layers), rows_LU, strict=True):
            self._ram.add(key, row_U, keep=number in self._recent)

    def _lose(self, number: int, reason: str) -> None:
        with self._mutex:
            self._lost[number] = reason
            self._numbers.discard(number)
            keys = keys_of(number, self._known().layers)
            self._ram.forget(keys)
            if self._near is not None:
                self._near.forget(keys)

    def _check_open(self) -> None:
        if self._closed:
            raise StreamError("this stream was closed: restore it from its folder.")

    def _known(self, *numbers: int) -> PageFormat:
        """The stream's format. Raises `StreamError` for a block that it does not have, or when it is closed."""
        self._check_open()
        for number in numbers:
            if number in self._lost:
                raise LostBlockError(f"block {number} is lost, {self._lost[number]}: ask again, without it.")
            if number not in self._numbers:
                raise StreamError(
                    f"block {number} is not in this bank of {len(self)} blocks: take numbers from its index."
                )
        assert self._format is not None
        return self._format
