"""A stream's blocks in a folder: few large files that are only appended to.

`stream.json` says what the stream is, `sink.safetensors` is the system prompt's block, and each segment is a pair of
plain binary files: `00000.pages` holds pages end to end, `00000.index` one record a page. A page exists when its record
does; a record carries its own checksum and a digest for every row of its page. Records are written after their pages
have reached the disk, so a killed writer leaves whole blocks and at most a torn end, which is written over.
It keeps no pages in memory and knows no budgets. Used by `tiers`.
"""

import errno
import fcntl
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self
from uuid import uuid4

import numpy as np
from torch import Tensor

from sparsight.errors import StorageError, StreamError
from sparsight.kv.block import DIGEST_BYTES, SINK_NUMBER, KvBlock, row_digests
from sparsight.kv.header import HEADER, SINK, Header
from sparsight.kv.page import PageFormat
from sparsight.kv.records import Array, Records, fitted, known, named_number, parse, records_of, whole, written
from sparsight.storage import LocalStorage

LOCK = "lock"
PageState = Literal["whole", "damaged", "absent"]


class Place(NamedTuple):
    """Where a page lies, and the digests of its rows, one after the other."""

    segment: int
    slot: int
    digests: bytes


class SegmentFolder:
    """One stream's folder, held by one process at a time. Not for several threads at once, except what reads."""

    def __init__(self, folder: Path, lock: int, header: Header, sink: KvBlock) -> None:
        """Only `create` and `open` call it."""
        self.folder = folder
        self.header = header
        self.sink = sink
        self.places: dict[int, Place] = {}
        self._folder_name = str(folder)
        self._lock = lock
        self._count = 0

    @classmethod
    def create(cls, folder: Path, lock: int, sink: KvBlock, segment_bytes: int) -> Self:
        """A new stream in a locked folder. Raises `StreamError` where there is one, `StorageError` where nothing can be
        written."""
        created = cls(folder, lock, Header(uuid4().hex, sink.digest, segment_bytes), sink)
        if (folder / HEADER).exists() or created.known_segments:
            raise StreamError(f"'{folder}' holds a stream already: restore it, or choose another folder.")
        LocalStorage(folder).write_bytes(SINK, sink.to_bytes())
        created._write_header(created.header)
        return created

    @classmethod
    def open(cls, folder: Path, lock: int) -> Self:
        """The stream that is in a locked folder. Raises `StreamError` where it cannot be understood."""
        try:
            header = Header.from_bytes(LocalStorage(folder).read_bytes(HEADER))
            sink = KvBlock.from_bytes(LocalStorage(folder).read_bytes(SINK))
        except (StorageError, StreamError) as error:
            raise StreamError(
                f"'{folder}' holds no stream that can be restored: {error}. Put a copy of that file back, from the "
                "stream's store if it has one, or restore the store into an empty folder."
            ) from error
        if sink.digest != header.sink_digest:
            raise StreamError(f"'{folder}' has the {SINK} of another stream: put back its own.")
        for unfinished in folder.glob(".*.partial"):  # of a killed process
            unfinished.unlink()
        return cls(folder, lock, header, sink)

    @property
    def format(self) -> PageFormat | None:
        """None before the first block."""
        return self.header.format

    @property
    def known_format(self) -> PageFormat:
        """That of a stream that has blocks."""
        assert self.header.format is not None, "no block was ever put"
        return self.header.format

    @property
    def count(self) -> int:
        """How many pages there are, lost ones among them."""
        return self._count

    @property
    def pages_per_segment(self) -> int:
        return max(1, self.header.segment_bytes // self.known_format.page_bytes)

    @property
    def full_bytes(self) -> int:
        """Bytes of a full segment's pages."""
        return self.pages_per_segment * self.known_format.page_bytes

    @property
    def known_segments(self) -> int:
        """How many segments there are, from the names of the files."""
        names = [path.stem for pattern in ("*.index", "*.pages") for path in self.folder.glob(pattern)]
        return 1 + max((int(name) for name in names if name.isdigit()), default=-1)

    @property
    def full_segments(self) -> int:
        """How many segments will never change again."""
        return self._count // self.pages_per_segment if self.format else 0

    @property
    def open_pages(self) -> int:
        """How many pages are in the segment that is not full."""
        return self._count % self.pages_per_segment if self.format else 0

    def pages_path(self, segment: int) -> Path:
        return Path(self._pages_name(segment))

    def index_path(self, segment: int) -> Path:
        return self.folder / f"{segment:05d}.index"

    def _pages_name(self, segment: int) -> str:
        """As text: for every row that is read, a path object would be a good part of the time."""
        return f"{self._folder_name}/{segment:05d}.pages"

    def append(self, blocks: Sequence[KvBlock]) -> int:
        """Write the first of these blocks, as many as the open segment takes; returns how many. They are durable then.

        Raises `StorageError`; then nothing has changed.
        """
        if self.format is None:
            self._write_header(replace(self.header, format=blocks[0].format))
        page_bytes = self.known_format.page_bytes
        segment, slot = divmod(self._count, self.pages_per_segment)
        blocks = blocks[: self.pages_per_segment - slot]
        records_N = records_of(blocks)
        try:
            if slot == 0:  # pages without an index are never a killed writer's: they are damage
                self.index_path(segment).touch()
                self.pages_path(segment).touch()
                _sync_folder(self.folder)
            _write_at(self.pages_path(segment), slot * page_bytes, [block.rows_LU.numpy() for block in blocks])
            _write_at(self.index_path(segment), slot * records_N.itemsize, [records_N])
        except OSError as error:
            raise StorageError(f"cannot write '{self.pages_path(segment)}': {error.strerror or error}") from error
        for shift, (record, block) in enumerate(zip(records_N, blocks, strict=True)):
            self.places[block.number] = Place(segment, slot + shift, record["row_digests"].tobytes())
        self._count += len(blocks)
        return len(blocks)

    def expect(self, layer: int, numbers: Sequence[int]) -> None:
        """Ask the system to start reading one layer's rows of these pages. What is not there is left to `read`."""
        for segment, pages in groupby(numbers, lambda number: self.places[number].segment):
            with suppress(OSError):
                file = os.open(self._pages_name(segment), os.O_RDONLY)
                try:
                    for number in pages:
                        start_bytes = self.offset_bytes(number, layer)
                        os.posix_fadvise(file, start_bytes, self.known_format.row_bytes, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(file)

    def read(self, number: int, first_layer: int, rows: Sequence[Tensor]) -> PageState:
        """Fill `rows` (each [U]) with a page's rows from `first_layer` on, and check every one.

        Raises `StorageError` where the file is there and cannot be read now: another time it may.
        """
        file = self._open_pages(self.places[number].segment)
        if file is None:
            return "absent"
        buffers = [row_U.numpy().data for row_U in rows]
        try:
            got = os.preadv(file, buffers, self.offset_bytes(number, first_layer))
        except OSError as error:
            if error.errno != errno.EIO:
                path = self._pages_name(self.places[number].segment)
                raise StorageError(f"cannot read '{path}': {error.strerror}") from error
            return "damaged"  # the disk itself cannot read it
        finally:
            os.close(file)
        if got < len(rows) * self.known_format.row_bytes:
            return "damaged"
        return self.check(number, first_layer, rows)

    def read_pages(self, segment: int) -> bytes:
        """All of a segment's pages; nothing where they are missing, or where the disk itself cannot read them all: then
        `read` may have some. Raises `StorageError` where they cannot be read now."""
        path = self.pages_path(segment)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            if error.errno == errno.EIO:
                return b""
            raise StorageError(f"cannot read '{path}': {error.strerror or error}") from error

    def offset_bytes(self, number: int, layer: int) -> int:
        """Where one row of a page begins in its segment's file."""
        return self.places[number].slot * self.known_format.page_bytes + layer * self.known_format.row_bytes

    def check(self, number: int, first_layer: int, rows: Sequence[Tensor]) -> PageState:
        """Whether these are a page's rows from `first_layer` on."""
        found, start = row_digests(rows), first_layer * DIGEST_BYTES
        return "whole" if found == self.places[number].digests[start : start + len(found)] else "damaged"

    def read_records(self, segment: int) -> Array:
        """A segment's records, whole or not; none where the file is missing. Raises `StorageError`."""
        path = self.index_path(segment)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = b""
        except OSError as error:
            raise StorageError(f"cannot read '{path}': {error.strerror or error}") from error
        return parse(data, self.known_format)[: self.pages_per_segment]

    def durable_records(self, segment: int, *, is_last: bool) -> Array:
        """The records of all pages that became durable: all that fit, or in the last segment those before a torn end.

        Where a record is missing, nobody's stands for it. Raises `StorageError`.
        """
        records_N = self.read_records(segment)
        if not is_last:
            return fitted(records_N, self.pages_per_segment)
        pages_path = self.pages_path(segment)
        if self.index_path(segment).exists() or not pages_path.exists():
            return records_N[: written(records_N)]
        pages = pages_path.stat().st_size // self.known_format.page_bytes
        return fitted(records_N, min(pages, self.pages_per_segment))

    def mend(self, segment: int, records_N: Array, pages: Mapping[int, Array]) -> None:
        """Write a segment's records anew, and some of its pages, by slot. Raises `StorageError`."""
        try:
            for slot, page in pages.items():
                _write_at(self.pages_path(segment), slot * self.known_format.page_bytes, [page])
            _write_at(self.index_path(segment), 0, [records_N])
            _sync_folder(self.folder)
        except OSError as error:
            raise StorageError(f"cannot write '{self.index_path(segment)}': {error.strerror or error}") from error

    def load(self) -> Iterator[Records]:
        """Read all records, a segment at a time. A damaged record loses its block, a torn end is forgotten.

        A block whose record cannot name it any more is taken for the one after the block before.
        """
        if self.format is None:
            self._remove_segments()  # a killed `clear` left them
            return
        newest, last_number, unnamed = self.sink.head, SINK_NUMBER, 0
        last_segment = self.known_segments - 1
        for segment in range(last_segment + 1):
            records_N = self.durable_records(segment, is_last=segment == last_segment)
            whole_N = whole(records_N)
            lost: list[int] = []
            for slot, record in enumerate(records_N):
                number = int(record["number"]) if whole_N[slot] else named_number(record)
                if number is None:
                    unnamed += 1
                    continue
                lost += range(last_number + 1, min(number, last_number + 1 + unnamed))
                last_number, unnamed = number, 0
                if whole_N[slot]:
                    self.places[number] = Place(segment, slot, record["row_digests"].tobytes())
                else:
                    lost.append(number)
            if segment == last_segment:
                lost += range(last_number + 1, last_number + 1 + unnamed)
            if len(records_N):
                self._count = segment * self.pages_per_segment + len(records_N)
                records = known(records_N[whole_N], lost, newest, self.known_format)
                newest = records.newest
                yield records
        if self._count == 0:  # its first block never became durable, so the next may be of another shape
            self.header = replace(self.header, format=None)
        elif not self.index_path(last_segment).exists():  # lost blocks, not a torn end, also after the next ones came
            self.mend(last_segment, self.durable_records(last_segment, is_last=True), {})

    def clear(self) -> None:
        """Remove all segments. What is left is another stream: copies of the old one are not taken for its own."""
        self._write_header(Header(uuid4().hex, self.sink.digest, self.header.segment_bytes))
        self._remove_segments()
        self._count = 0
        self.places.clear()

    def close(self) -> None:
        """Let another process open the folder."""
        os.close(self._lock)

    def _open_pages(self, segment: int) -> int | None:
        """A descriptor of a segment's pages; None where there are none."""
        try:
            return os.open(self._pages_name(segment), os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"cannot open '{self.pages_path(segment)}': {error.strerror or error}") from error

    def _remove_segments(self) -> None:
        for pattern in ("*.index", "*.pages"):
            for path in self.folder.glob(pattern):
                path.unlink()

    def _write_header(self, header: Header) -> None:
        LocalStorage(self.folder).write_bytes(HEADER, header.to_bytes())
        try:
            _sync_folder(self.folder)
        except OSError as error:
            raise StorageError(f"cannot write '{self.folder / HEADER}': {error.strerror or error}") from error
        self.header = header


def _write_at(path: Path, offset: int, parts: Sequence[np.ndarray[Any, Any]]) -> None:
    """Put bytes at an offset, through to the disk."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        for part in parts:
            data = part.reshape(-1).view(np.uint8).data
            while len(data):
                written = os.pwrite(file, data, offset)
                offset += written
                data = data[written:]
        os.fsync(file)
    finally:
        os.close(file)


def _sync_folder(folder: Path) -> None:
    """Make names that appeared in a folder as durable as the files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path) -> Generator[int]:
    """The open lock file of a folder, closed again only if the body fails: what the body makes owns it.

    The system releases it when this process ends, however it ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(f"cannot write '{folder}': {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StreamError(
                f"'{folder}' is in use already: close the stream there, or use another folder."
            ) from error
        yield lock
    except BaseException:
        os.close(lock)
        raise
