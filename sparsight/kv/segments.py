"""A stream's blocks in a folder: few large files that are only appended to.

`stream.json` says what the stream is, `sink.safetensors` is the system prompt's block, and each segment is a pair of
plain binary files: `00000.pages` holds pages end to end, `00000.index` one record a page. A page exists when its record
does; a record carries its own checksum and a digest for every row of its page. Records are written after their pages
have reached the disk, so a killed writer leaves whole blocks and at most a torn end, which is written over.
It keeps no pages in memory and knows no budgets. Used by `tiers`.
"""

import fcntl
import json
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from sparsight.errors import StorageError, StreamError
from sparsight.kv.block import DIGEST_BYTES, SINK_NUMBER, KvBlock, block_digest, row_digests
from sparsight.kv.page import PageFormat
from sparsight.storage import LocalStorage

HEADER, SINK, LOCK = "stream.json", "sink.safetensors", "lock"
VERSION = 1
PageState = Literal["whole", "damaged", "absent"]


class Place(NamedTuple):
    """Where a page lies, and the digests of its rows, one after the other."""

    segment: int
    slot: int
    digests: bytes


@dataclass(frozen=True)
class Records:
    """What a segment's index knows of its blocks, in time order."""

    numbers_N: Tensor
    spans_s_N2: Tensor
    mean_keys_NLGC: Tensor
    lost: tuple[int, ...]
    """Blocks before these whose records are damaged."""


class SegmentFolder:
    """One stream's folder, held by one process at a time. Not for several threads at once, except `read`."""

    def __init__(
        self, folder: Path, lock: int, sink: KvBlock, page_format: PageFormat | None, segment_bytes: int
    ) -> None:
        """Only `create` and `open` call it."""
        self.folder = folder
        self.sink = sink
        self.format = page_format
        self.places: dict[int, Place] = {}
        self._segment_bytes = segment_bytes
        self._folder_name = str(folder)
        self._lock = lock
        self._count = 0

    @classmethod
    def create(cls, folder: Path, lock: int, sink: KvBlock, segment_bytes: int) -> "SegmentFolder":
        """A new stream in a locked folder. Raises `StreamError` where there is one, `StorageError` where nothing can be
        written."""
        if (folder / HEADER).exists():
            raise StreamError(f"'{folder}' holds a stream already: restore it, or choose another folder.")
        LocalStorage(folder).write_bytes(SINK, sink.to_bytes())
        created = cls(folder, lock, sink, None, segment_bytes)
        created._write_header(None)
        return created

    @classmethod
    def open(cls, folder: Path, lock: int) -> "SegmentFolder":
        """The stream that is in a locked folder. Raises `StreamError` where it cannot be understood."""
        try:
            header = json.loads(LocalStorage(folder).read_bytes(HEADER))
            if header["version"] != VERSION:
                raise StreamError(f"'{folder}' was written by another version: {header['version']}, not {VERSION}.")
            page_format = None if header["format"] is None else PageFormat.from_json(header["format"])
            sink = KvBlock.from_bytes(LocalStorage(folder).read_bytes(SINK))
        except (StorageError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StreamError(f"'{folder}' holds no stream that can be restored: {error}") from error
        return cls(folder, lock, sink, page_format, int(header["segment_bytes"]))

    @property
    def pages_per_segment(self) -> int:
        return max(1, self._segment_bytes // self._known_format.page_bytes)

    @property
    def full_bytes(self) -> int:
        """Bytes of a full segment's pages."""
        return self.pages_per_segment * self._known_format.page_bytes

    @property
    def known_segments(self) -> int:
        """How many segments there are, from the names of the index files."""
        return 1 + max((int(path.stem) for path in self.folder.glob("*.index")), default=-1)

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
        """As text: a path object takes as long as reading a row."""
        return f"{self._folder_name}/{segment:05d}.pages"

    def append(self, blocks: Sequence[KvBlock]) -> int:
        """Write the first of these blocks, as many as the open segment takes; returns how many. They are durable then.

        Raises `StorageError`; then nothing has changed.
        """
        if self.format is None:
            self._write_header(blocks[0].format)
            self.format = blocks[0].format
        segment, slot = divmod(self._count, self.pages_per_segment)
        blocks = blocks[: self.pages_per_segment - slot]
        records_N = np.zeros(len(blocks), record_type(self.format))
        for record, block in zip(records_N, blocks, strict=True):
            _fill(record, block)
        try:
            _write_at(self.pages_path(segment), slot * self.format.page_bytes, [b.rows_LU.numpy() for b in blocks])
            _write_at(self.index_path(segment), slot * records_N.itemsize, [records_N])
            if slot == 0:
                _sync_folder(self.folder)
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
                for number in pages:
                    start_bytes = self.offset_bytes(number, layer)
                    os.posix_fadvise(file, start_bytes, self._known_format.row_bytes, os.POSIX_FADV_WILLNEED)
                os.close(file)

    def read(self, number: int, first_layer: int, rows: Sequence[Tensor]) -> PageState:
        """Fill `rows` (each [U]) with a page's rows from `first_layer` on, and check every one."""
        segment = self.places[number].segment
        buffers = [row_U.numpy().data for row_U in rows]
        try:
            file = os.open(self._pages_name(segment), os.O_RDONLY)
        except FileNotFoundError:
            return "absent"
        try:
            got = os.preadv(file, buffers, self.offset_bytes(number, first_layer))
        except OSError:  # the disk cannot read it
            return "damaged"
        finally:
            os.close(file)
        if got < len(rows) * self._known_format.row_bytes:
            return "damaged"
        return self.check(number, first_layer, rows)

    def offset_bytes(self, number: int, layer: int) -> int:
        """Where one row of a page begins in its segment's file."""
        return self.places[number].slot * self._known_format.page_bytes + layer * self._known_format.row_bytes

    def check(self, number: int, first_layer: int, rows: Sequence[Tensor]) -> PageState:
        """Whether these are a page's rows from `first_layer` on."""
        found, start = row_digests(rows), first_layer * DIGEST_BYTES
        return "whole" if found == self.places[number].digests[start : start + len(found)] else "damaged"

    def load(self) -> Iterator[Records]:
        """Read all records, a segment at a time. What is torn at the end is forgotten; a damaged record before others
        loses its block."""
        if self.format is None:
            return
        last_number, unread = SINK_NUMBER, 0
        for segment in range(self.known_segments):
            found: list[Any] = []
            lost: list[int] = []
            whole = self._whole_records(segment)
            for slot in range(self.pages_per_segment):
                if slot not in whole:
                    unread += 1
                    continue
                found.append(whole[slot])
                number = int(whole[slot]["number"])
                lost += range(last_number + 1, min(number, last_number + 1 + unread))
                last_number, unread = number, 0
                self.places[number] = Place(segment, slot, whole[slot]["row_digests"].tobytes())
                self._count = segment * self.pages_per_segment + slot + 1
            if found:
                yield _records(found, lost)
        if self._count == 0:
            self.format = None  # its first block never became durable, so the next may be of another shape

    def clear(self) -> None:
        """Remove all segments, newest first: a killed process leaves a shorter stream."""
        for path in sorted(self.folder.glob("*.index"), reverse=True):
            path.unlink()
            path.with_suffix(".pages").unlink(missing_ok=True)
        for path in self.folder.glob("*.pages"):
            path.unlink()
        self.format, self._count = None, 0
        self.places.clear()
        self._write_header(None)

    def close(self) -> None:
        """Let another process open the folder."""
        os.close(self._lock)

    @property
    def _known_format(self) -> PageFormat:
        assert self.format is not None, "no block was ever put"
        return self.format

    def _whole_records(self, segment: int) -> dict[int, Any]:
        """The records of a segment that are as they were written, by slot."""
        path = self.index_path(segment)
        data = path.read_bytes() if path.exists() else b""
        kind = record_type(self._known_format)
        records_N = np.frombuffer(data, kind, count=len(data) // kind.itemsize)
        return {slot: record for slot, record in enumerate(records_N) if _checksum(record) == record["check"].tobytes()}

    def _write_header(self, page_format: PageFormat | None) -> None:
        known = None if page_format is None else page_format.to_json()
        header = {"version": VERSION, "format": known, "segment_bytes": self._segment_bytes}
        LocalStorage(self.folder).write_bytes(HEADER, json.dumps(header).encode())
        _sync_folder(self.folder)


def record_type(page_format: PageFormat) -> np.dtype[Any]:
    """One record of an index file; little-endian, without gaps."""
    return np.dtype(
        [
            ("number", "<i8"),
            ("start_s", "<f8"),
            ("end_s", "<f8"),
            ("row_digests", "u1", (page_format.layers, DIGEST_BYTES)),
            ("mean_keys", "<f4", (page_format.layers, page_format.heads, page_format.width)),
            ("check", "u1", DIGEST_BYTES),
        ]
    )


def _records(found: Sequence[Any], lost: Sequence[int]) -> Records:
    spans_s_N2 = torch.tensor([(float(r["start_s"]), float(r["end_s"])) for r in found], dtype=torch.float64)
    mean_keys_NLGC = torch.from_numpy(np.stack([record["mean_keys"] for record in found]))
    return Records(torch.tensor([int(r["number"]) for r in found]), spans_s_N2, mean_keys_NLGC, tuple(lost))


def _fill(record: Any, block: KvBlock) -> None:
    digests = row_digests(block.rows_LU)
    assert block_digest(digests, block.mean_keys_LGC) == block.digest, "a block changed after it was made"
    record["number"], record["start_s"], record["end_s"] = block.number, block.start_s, block.end_s
    record["row_digests"] = np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES)
    record["mean_keys"] = block.mean_keys_LGC.numpy()
    record["check"] = np.frombuffer(_checksum(record), np.uint8)


def _checksum(record: Any) -> bytes:
    return xxhash.xxh3_128_digest(record.tobytes()[:-DIGEST_BYTES])


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
