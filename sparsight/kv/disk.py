"""The slow tiers of one stream: its folder, and a store that full segments have been copied to before they leave it.

A page is read from the folder or, where its segment has left that or is damaged, from the store: alone at first, with
its whole segment once that pays. No page is kept in memory. Written to by one thread, read by any number.
Used by `tiers`.
"""

import threading
from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor

from sparsight.errors import StorageError, StreamError, StreamFullError
from sparsight.kv.archive import SegmentArchive, fetch_header
from sparsight.kv.block import KvBlock
from sparsight.kv.page import PageFormat
from sparsight.kv.records import Records, record_type
from sparsight.kv.segments import PageState, SegmentFolder, locked
from sparsight.storage import Storage


@dataclass(frozen=True)
class DiskBudget:
    """`disk_bytes` bounds the stream, or, with a store, what of it is in the folder; then `store_bytes` bounds it."""

    disk_bytes: int
    store_bytes: int = 0
    segment_bytes: int = 2**26


class DiskTier:
    """Made by `create` or `restore`; `close` lets another process open the stream."""

    def __init__(self, folder: SegmentFolder, budget: DiskBudget, archive: SegmentArchive | None) -> None:
        self._folder = folder
        self._budget = budget
        self._archive = archive
        self._moving = threading.RLock()  # segments leave the folder and come back one at a time
        self._mutex = threading.Lock()  # of what follows
        self._read_bytes: dict[int, int] = {}  # of segments that are in the store only, since they last left
        self._uploader = ThreadPoolExecutor(1, "stream-upload")
        self._here: OrderedDict[int, None] = OrderedDict()  # full segments in the folder, least recently used first

    @classmethod
    def create(cls, folder: Path, sink: KvBlock, budget: DiskBudget, store: Storage | None) -> Self:
        """A new stream. Raises `StreamError` where there is one, or for a budget that segments cannot move in."""
        if store is not None and any(store.keys()):
            raise StreamError(f"'{store.uri}' is not empty: restore the stream in it, or choose another place.")
        archive = None if store is None else SegmentArchive(store, folder)
        _check_budget(budget, budget.segment_bytes, archive)
        with locked(folder) as lock:
            return cls(SegmentFolder.create(folder, lock, sink, budget.segment_bytes), budget, archive)

    @classmethod
    def restore(cls, folder: Path, budget: DiskBudget, store: Storage | None) -> Self:
        """The stream that is in the folder or, where something is damaged or not there, in the store; the store is this
        folder's from then on. `budget.segment_bytes` is for new streams."""
        archive = None if store is None else SegmentArchive(store, folder)
        with locked(folder) as lock:
            if store is not None:
                fetch_header(store, folder)
            opened = SegmentFolder.open(folder, lock)
            _check_budget(budget, opened.header.segment_bytes, archive)
            restored = cls(opened, budget, archive)
            if archive is not None:
                try:
                    archive.take_over(opened)
                except BaseException:
                    restored.give_back()
                    raise
            return restored

    @property
    def sink(self) -> KvBlock:
        return self._folder.sink

    @property
    def format(self) -> PageFormat | None:
        """None before the first page."""
        return self._folder.format

    @property
    def capacity_bytes(self) -> int:
        """What the stream may grow to."""
        return self._budget.disk_bytes if self._archive is None else self._budget.store_bytes

    def load(self) -> Iterator[Records]:
        """What the indexes say, a segment at a time; once, after `restore`."""
        yield from self._folder.load()
        for segment in range(self._folder.full_segments):
            if self._folder.pages_path(segment).exists():
                self._use(segment)

    def check_capacity(self, page_format: PageFormat, pages: int) -> None:
        """Raises `StreamError` where a stream of so many pages takes no other."""
        entry_bytes = page_format.page_bytes + record_type(page_format).itemsize
        if (pages + 1) * entry_bytes > self.capacity_bytes:
            raise StreamFullError(
                f"the stream's memory is full: {pages} blocks take {pages * entry_bytes} of {self.capacity_bytes} "
                f"bytes, the next takes {entry_bytes}. Close the stream, or give it a larger budget."
            )

    def is_near(self, number: int) -> bool:
        """Whether a page is read without asking the store."""
        segment = self._folder.places[number].segment
        return segment in self._here or self._archive is None or segment not in self._archive.full

    def append(self, blocks: Sequence[KvBlock]) -> int:
        """Make the first of these blocks durable; returns how many. Raises `StorageError` or `StreamError` where there
        is no room; then nothing has changed."""
        if self._archive is not None:
            with self._moving:
                self._make_room()
        written = self._folder.append(blocks)
        if self._folder.open_pages == 0:
            self._use(self._folder.full_segments - 1)
            if self._archive is not None:
                self._uploader.submit(self._archive.upload, self._folder, with_open=False)
        return written

    def upload(self) -> None:
        """Return when everything that was appended and is not lost is in the store.

        Raises `StorageError`, and `StreamError` where another bank has taken over the store."""
        if self._archive is not None:
            self._uploader.submit(self._archive.upload, self._folder, with_open=True).result()

    def expect(self, layer: int, numbers: Sequence[int]) -> None:
        """Let the disk work on one layer's rows of several pages at once, before they are read one by one."""
        if len(numbers) > 1:
            self._folder.expect(layer, numbers)

    def read(self, number: int, first_layer: int, rows: Sequence[Tensor]) -> str | None:
        """Fill `rows` (each [U]) with a page's rows from `first_layer` on; None, or why the page is lost.

        Raises `StreamError` where folder or store cannot be read just now: then nothing is lost.
        """
        segment = self._folder.places[number].segment
        with self._mutex:
            if segment in self._here:
                self._here.move_to_end(segment)
        try:
            state = self._read_anywhere(segment, number, first_layer, rows)
        except StorageError as error:
            raise StreamError(f"block {number} cannot be read now, but is not lost: {error}") from error
        if state == "whole":
            return None
        return f"its page in '{self._folder.pages_path(segment)}' is {'missing' if state == 'absent' else 'damaged'}"

    def _read_anywhere(self, segment: int, number: int, first_layer: int, rows: Sequence[Tensor]) -> PageState:
        unreadable: StorageError | None = None
        try:
            state = self._folder.read(number, first_layer, rows)
        except StorageError as error:
            state, unreadable = "absent", error
        archive = self._archive
        if state != "whole" and archive is not None and archive.has(segment):
            wanted_bytes = sum(row_U.nbytes for row_U in rows)
            if segment in archive.full and self._bring_back(archive, segment, wanted_bytes):
                state = self._folder.read(number, first_layer, rows)
            if state != "whole":
                state = archive.read(self._folder, number, first_layer, rows)
        if state != "whole" and unreadable is not None:
            raise unreadable
        return state

    def clear(self) -> None:
        """Remove all pages, also from the store."""
        self._uploader.submit(lambda: None).result()
        if self._archive is not None:
            self._archive.clear()
        self._folder.clear()
        self._here.clear()
        self._read_bytes.clear()

    def give_back(self) -> None:
        """Undo what `restore` did to the store, where the stream is not opened after all."""
        if self._archive is not None:
            self._archive.give_back()

    def close(self) -> None:
        self._uploader.shutdown()
        self._folder.close()

    def _bring_back(self, archive: SegmentArchive, segment: int, wanted_bytes: int) -> bool:
        """Fetch a whole segment once as many bytes of it were read in parts as it has: so what travels is at most twice
        what had to. False while that is not so, or where the folder has no room: then parts are read on."""
        with self._mutex:
            self._read_bytes[segment] = self._read_bytes.get(segment, 0) + wanted_bytes
            if self._read_bytes[segment] <= self._folder.full_bytes:
                return False
        with self._moving:
            if segment not in self._read_bytes:  # another thread was quicker
                return True
            with self._mutex:
                del self._read_bytes[segment]
            try:
                self._make_room()
                if archive.fetch_pages(self._folder, segment):
                    self._use(segment)
            except (StorageError, StreamError):
                return False
        return True

    def _use(self, segment: int) -> None:
        with self._mutex:
            self._here[segment] = None
            self._here.move_to_end(segment)

    def _make_room(self) -> None:
        """Let full segments that are in the store leave the folder until it has room for another."""
        assert self._archive is not None
        page_format = self._folder.format
        if page_format is None:
            return
        per_segment = self._folder.full_bytes
        indexes_bytes = len(self._folder.places) * record_type(page_format).itemsize
        limit_bytes = self._budget.disk_bytes - per_segment
        fixed_bytes = self._folder.open_pages * page_format.page_bytes + indexes_bytes
        stuck: dict[int, StorageError] = {}
        while self._here and fixed_bytes + len(self._here) * per_segment > limit_bytes:
            segment = self._forget_a_copied(self._archive, stuck)
            if segment is None:
                failure = self._uploader.submit(self._archive.upload, self._folder, with_open=False).exception()
                segment = self._forget_a_copied(self._archive, stuck)
                if segment is None:
                    failure = failure or next(iter(stuck.values()), None)
                    assert failure is not None, "every segment was copied"
                    raise failure
            path = self._folder.pages_path(segment)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                stuck[segment] = StorageError(f"cannot remove '{path}', which was copied: {error.strerror or error}")
                self._use(segment)
        if fixed_bytes > limit_bytes:
            raise StreamError(
                f"{self._budget.disk_bytes} bytes of disk have no room beside {fixed_bytes} that must stay: give the "
                "stream more, or close it."
            )

    def _forget_a_copied(self, archive: SegmentArchive, stuck: Container[int]) -> int | None:
        """The segment in the folder that was not used for longest, of those that are in the store and not stuck."""
        with self._mutex:
            copied = (segment for segment in self._here if segment in archive.full and segment not in stuck)
            segment = next(copied, None)
            if segment is not None:
                del self._here[segment]
        return segment


def _check_budget(budget: DiskBudget, segment_bytes: int, archive: SegmentArchive | None) -> None:
    if archive is not None and budget.disk_bytes < 3 * segment_bytes:
        raise StreamError(
            f"a disk budget of {budget.disk_bytes} bytes has no room for three segments of {segment_bytes}: one is "
            "written, one copied to the store, one read back. Give more; a new stream may have smaller segments."
        )
