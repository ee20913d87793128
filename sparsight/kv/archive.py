"""Copies of a stream's segments in an object store.

A full segment is copied once, its index last: an index in the store means that its pages are there. The segment that is
still open is copied under another name, as a whole, whenever its owner asks; the full one replaces it. What is in the
store is checked where it is read. A page or record that is damaged in the folder does not replace a whole one.
`owner` names the one bank that writes to the store: the last that was made for it or restored from it. Used by `disk`.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from socket import gethostname
from uuid import uuid4

import numpy as np
from torch import Tensor

from sparsight.errors import StorageError, StreamError
from sparsight.kv.block import KvBlock
from sparsight.kv.header import HEADER, SINK, Header
from sparsight.kv.page import PageFormat
from sparsight.kv.records import Array, fitted, has_page, merged, parse, whole, written
from sparsight.kv.segments import PageState, SegmentFolder
from sparsight.storage import LocalStorage, Storage

OWNER = "owner"
_OPEN = "open-"
_Reader = Callable[[int, int, Sequence[Tensor]], PageState]
"""`SegmentFolder.read`, or what reads like it."""


class SegmentArchive:
    """One stream's place in a store, for the bank in one folder."""

    def __init__(self, storage: Storage, folder: Path) -> None:
        self.full: set[int] = set()
        """The full segments that are in the store."""
        self._open: set[int] = set()  # segments that are there as they were before they were full
        self._storage = storage
        self._owner = f"{uuid4().hex} '{folder}' on {gethostname()}"
        self._owner_before = b""
        self._header = b""

    def has(self, segment: int) -> bool:
        """Whether the store has pages of a segment."""
        return segment in self.full or segment in self._open

    def take_over(self, folder: SegmentFolder) -> None:
        """Become the one that writes to the store; bring into the folder what the stream needs to be opened and is not
        there, or damaged: indexes, and the pages of the open segment. Pages of full segments stay in the store.

        Raises `StreamError` where folder and store have different blocks in one place.
        """
        self._owner_before = self._read_if_there(OWNER)
        self._storage.write_bytes(OWNER, self._owner.encode())
        keys = list(self._storage.keys(""))
        names = [key.removesuffix(".index") for key in keys if key.endswith(".index")]
        self.full = {int(name) for name in names if name.isdigit()}
        self._open = {int(name.removeprefix(_OPEN)) for name in names if name.startswith(_OPEN)} - self.full
        last_here = folder.known_segments - 1
        segments = sorted(self.full | self._open)
        # All segments before one that both have were copied before it was: if this is the same, so are they.
        newest_of_both = max((segment for segment in segments if folder.index_path(segment).exists()), default=-1)
        for segment in segments:
            here_N = folder.durable_records(segment, is_last=segment >= last_here)
            if segment == newest_of_both or len(here_N) < folder.pages_per_segment or not whole(here_N).all():
                self._complete(folder, segment, here_N)
        for key in keys:  # a killed upload left copies that full segments have replaced
            segment = Path(key).stem.removeprefix(_OPEN)
            if key.startswith(_OPEN) and segment.isdigit() and int(segment) in self.full:
                self._storage.delete(key)

    def give_back(self) -> None:
        """Undo `take_over`, as far as the store answers: whoever wrote to it before goes on."""
        with suppress(OSError):
            if self._read_if_there(OWNER) != self._owner.encode():
                return
            if self._owner_before:
                self._storage.write_bytes(OWNER, self._owner_before)
            else:
                self._storage.delete(OWNER)

    def upload(self, folder: SegmentFolder, *, with_open: bool) -> None:
        """Copy every full segment that is not in the store yet; `with_open`, also what the open one holds now.

        Raises `StreamError` where another bank has taken over the store, `StorageError` where the store does not answer
        or, after all others were copied, for a segment that cannot be read now.
        """
        self._upload_header(folder)
        count, unreadable = folder.count, None
        if count == 0:
            return
        full_segments, open_pages = divmod(count, folder.pages_per_segment)
        for segment in range(full_segments + (1 if with_open and open_pages else 0)):
            if segment in self.full:
                continue
            slots = folder.pages_per_segment if segment < full_segments else open_pages
            try:
                records_N = self._best_records(folder, segment, slots)
                pages = self._best_pages(folder, segment, records_N)
            except StorageError as error:
                unreadable = error
                continue
            self._write(f"{'' if segment < full_segments else _OPEN}{segment:05d}", records_N.tobytes(), pages)
            if segment < full_segments:
                self.full.add(segment)
                self._open.discard(segment)
                self._storage.delete(f"{_OPEN}{segment:05d}.index")
                self._storage.delete(f"{_OPEN}{segment:05d}.pages")
            else:
                self._open.add(segment)
        if unreadable is not None:
            raise unreadable

    def read(self, folder: SegmentFolder, number: int, first_layer: int, rows: Sequence[Tensor]) -> PageState:
        """`SegmentFolder.read` of the store's copy: these rows travel, and nothing else.

        Raises `StorageError` where the store does not answer.
        """
        name = self._name(folder.places[number].segment)
        wanted_bytes = sum(row_U.nbytes for row_U in rows)
        try:
            data = self._storage.read_range(f"{name}.pages", folder.offset_bytes(number, first_layer), wanted_bytes)
        except StorageError:
            if name != self._name(folder.places[number].segment):  # the full segment has just replaced the open one
                return self.read(folder, number, first_layer, rows)
            if self._storage.exists(f"{name}.pages"):
                raise
            return "absent"
        if len(data) < wanted_bytes:
            return "damaged"
        for row_U, found_U in zip(rows, np.frombuffer(data, np.uint8).reshape(len(rows), -1), strict=True):
            row_U.numpy()[:] = found_U
        return folder.check(number, first_layer, rows)

    def fetch_pages(self, folder: SegmentFolder, segment: int) -> bool:
        """Put a full segment's pages back into the folder; False if the store has them no more.

        Pages that are whole in the folder only stay. Raises `StorageError`.
        """
        path = folder.pages_path(segment)
        if not self._storage.exists(path.name):
            return False
        pages = self._storage.read_bytes(path.name)
        if path.exists():
            records_N = fitted(folder.read_records(segment), folder.pages_per_segment)
            pages = _repaired(pages, records_N, folder.known_format, [folder.read])
        LocalStorage(path.parent).write_bytes(path.name, pages)
        return True

    def clear(self) -> None:
        """Remove the stream, its header last. Raises `StreamError` where another bank has taken over the store."""
        self._check_owner()
        for key in list(self._storage.keys("")):
            if key not in (OWNER, HEADER):
                self._storage.delete(key)
        self._storage.delete(HEADER)
        self.full.clear()
        self._open.clear()
        self._header = b""

    def _name(self, segment: int) -> str:
        return f"{_OPEN if segment in self._open else ''}{segment:05d}"

    def _upload_header(self, folder: SegmentFolder) -> None:
        self._check_owner()
        header = folder.header.to_bytes()
        if header != self._header:
            self._storage.write_bytes(SINK, folder.sink.to_bytes())
            self._storage.write_bytes(HEADER, header)
            self._header = header

    def _write(self, name: str, index: bytes, pages: bytes) -> None:
        for key, data in ((f"{name}.pages", pages), (f"{name}.index", index)):
            self._check_owner()
            self._storage.write_bytes(key, data)

    def _check_owner(self) -> None:
        """Raises `StreamError` where another bank has taken over the store."""
        owner = self._read_if_there(OWNER).decode(errors="replace")
        if not owner:
            self._storage.write_bytes(OWNER, self._owner.encode())
        elif owner != self._owner:
            raise StreamError(
                f"the stream in '{self._storage.uri}' was taken over by the bank in {owner.partition(' ')[2]}: what is "
                f"put into the bank in {self._owner.partition(' ')[2]} stays there. Close it and go on with the other, "
                "or restore it to take the stream over again."
            )

    def _read_if_there(self, key: str) -> bytes:
        try:
            return self._storage.read_bytes(key)
        except StorageError:
            if self._storage.exists(key):
                raise
            return b""

    def _complete(self, folder: SegmentFolder, segment: int, here_N: Array) -> None:
        """Bring records that are whole in the store only into the folder, and their pages where the segment is open."""
        page_format = folder.known_format
        there_N = parse(self._storage.read_bytes(f"{self._name(segment)}.index"), page_format)
        slots = folder.pages_per_segment if segment in self.full else max(len(here_N), written(there_N))
        here_N, there_N = fitted(here_N, slots), fitted(there_N, slots)
        whole_here_N, whole_there_N = whole(here_N), whole(there_N)
        both_N = whole_here_N & whole_there_N
        if here_N[both_N].tobytes() != there_N[both_N].tobytes():
            raise StreamError(
                f"the stream in '{folder.folder}' and its copy in '{self._storage.uri}' went on with different blocks: "
                "restore the copy into an empty folder, or the folder without the store."
            )
        if whole_here_N.all():
            return
        pages: dict[int, Array] = {}
        if segment not in self.full:
            data = memoryview(self._read_if_there(f"{self._name(segment)}.pages"))
            for slot in np.flatnonzero(whole_there_N & ~whole_here_N).tolist():
                page = _page(data, slot, page_format.page_bytes)
                if has_page(there_N[slot], page):
                    pages[slot] = np.frombuffer(page, np.uint8)
        folder.mend(segment, merged(here_N, there_N), pages)

    def _best_records(self, folder: SegmentFolder, segment: int, slots: int) -> Array:
        """A segment's records; what is damaged in the folder, from the copy of when the segment was open."""
        here_N = fitted(folder.read_records(segment), slots)
        if segment not in self._open or whole(here_N).all():
            return here_N
        there = self._read_if_there(f"{self._name(segment)}.index")
        return merged(here_N, fitted(parse(there, folder.known_format), slots))

    def _best_pages(self, folder: SegmentFolder, segment: int, records_N: Array) -> bytes:
        """The pages of these records; what is damaged in the folder, from the copy of when the segment was open. Where
        that is not whole either, something else."""
        page_format = folder.known_format
        found = folder.read_pages(segment)[: len(records_N) * page_format.page_bytes]
        readers: list[_Reader] = [folder.read]
        if segment in self._open:
            readers.append(lambda number, first_layer, rows: self.read(folder, number, first_layer, rows))
        return _repaired(found, records_N, page_format, readers)


def fetch_header(storage: Storage, folder: Path) -> None:
    """Bring a stream's header and sink into a folder that lacks them.

    Raises `StreamError` where one of folder and store holds something else than the other's stream.
    """
    local = LocalStorage(folder)
    if not storage.exists(HEADER):
        if not {OWNER, SINK}.issuperset(storage.keys()):
            raise StreamError(f"'{storage.uri}' is not empty and holds no stream: give the store of '{folder}'.")
        return
    there = _header_in(storage, folder)
    has_blocks = any(path.stat().st_size for kind in ("*.index", "*.pages") for path in folder.glob(kind))
    here = _header_in(local, folder) if has_blocks or local.exists(HEADER) else there
    if here.stream_id != there.stream_id or (has_blocks and there.format not in (None, here.format)):
        raise StreamError(
            f"'{folder}' and '{storage.uri}' hold different streams: restore each with its own store, or the store "
            "into an empty folder."
        )
    if not has_blocks:
        local.write_bytes(HEADER, there.to_bytes())
    if not _has_sink(local, there):
        local.write_bytes(SINK, storage.read_bytes(SINK))


def _header_in(place: Storage, folder: Path) -> Header:
    try:
        return Header.from_bytes(place.read_bytes(HEADER))
    except (StorageError, StreamError) as error:
        raise StreamError(
            f"the stream in '{place.uri}' cannot be understood: {error}. Copy that file from the other one of the "
            f"stream's folder and its store, or restore the store into an empty folder instead of '{folder}'."
        ) from error


def _has_sink(local: LocalStorage, header: Header) -> bool:
    try:
        return KvBlock.from_bytes(local.read_bytes(SINK)).digest == header.sink_digest
    except (StorageError, StreamError):
        return False


def _repaired(found: bytes, records_N: Array, page_format: PageFormat, readers: Sequence[_Reader]) -> bytes:
    """The pages of these records: as they were found or, where that is not whole, as the first reader has them that
    does; else something else."""
    slots: list[int] = np.flatnonzero(whole(records_N)).tolist()
    view, page_bytes = memoryview(found), page_format.page_bytes
    damaged = [slot for slot in slots if not has_page(records_N[slot], _page(view, slot, page_bytes))]
    if not damaged and len(found) == len(records_N) * page_bytes:
        return found
    pages = bytearray(found.ljust(len(records_N) * page_bytes, b"\0"))
    rows_LU = page_format.empty_rows(page_format.layers)
    for slot in damaged:
        number = int(records_N[slot]["number"])
        if any(read(number, 0, list(rows_LU)) == "whole" for read in readers):
            pages[slot * page_bytes : (slot + 1) * page_bytes] = rows_LU.numpy().tobytes()
    return bytes(pages)


def _page(pages: memoryview, slot: int, page_bytes: int) -> memoryview:
    return pages[slot * page_bytes : (slot + 1) * page_bytes]
