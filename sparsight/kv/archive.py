"""Copies of a stream's segments in an object store.

A full segment is copied once, its index last: an index in the store means that its pages are there. The segment that is
still open is copied under another name, as a whole, whenever its owner asks; the full one replaces it. What is in the
store is checked where it is read, not here. Used by `tiers`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from sparsight.errors import StorageError
from sparsight.kv.segments import HEADER, SINK, PageState, SegmentFolder
from sparsight.storage import LocalStorage, Storage

_OPEN = "open"


class SegmentArchive:
    """One stream's place in a store."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.full: set[int] = {int(key[:5]) for key in storage.keys("") if key[5:] == ".index"}
        """The full segments that are in the store."""
        self._header = b""

    def upload(self, folder: SegmentFolder, *, with_open: bool) -> None:
        """Copy every full segment that is not in the store yet; `with_open`, also what the open one holds now."""
        header = _read(folder.folder / HEADER)
        if header != self._header:
            self._storage.write_bytes(SINK, _read(folder.folder / SINK))
            self._storage.write_bytes(HEADER, header)
            self._header = header
        full_segments = folder.full_segments
        for segment in range(full_segments):
            if segment not in self.full:
                self._upload(folder, segment, f"{segment:05d}")
                self.full.add(segment)
                self._storage.delete(f"{_OPEN}-{segment:05d}.index")
                self._storage.delete(f"{_OPEN}-{segment:05d}.pages")
        if with_open and folder.open_pages:
            self._upload(folder, full_segments, f"{_OPEN}-{full_segments:05d}")

    def read(self, folder: SegmentFolder, number: int, first_layer: int, rows: Sequence[Tensor]) -> PageState:
        """`SegmentFolder.read` of the store's copy: these rows travel, and nothing else.

        Raises `StorageError` where the store does not answer.
        """
        key = folder.pages_path(folder.places[number].segment).name
        wanted_bytes = sum(row_U.nbytes for row_U in rows)
        try:
            data = self._storage.read_range(key, folder.offset_bytes(number, first_layer), wanted_bytes)
        except StorageError:
            if self._storage.exists(key):
                raise
            return "absent"
        if len(data) < wanted_bytes:
            return "damaged"
        for row_U, found_U in zip(rows, np.frombuffer(data, np.uint8).reshape(len(rows), -1), strict=True):
            row_U.numpy()[:] = found_U
        return folder.check(number, first_layer, rows)

    def fetch_pages(self, folder: SegmentFolder, segment: int) -> bool:
        """Put a full segment's pages back into the folder; False if the store has them no more."""
        path = folder.pages_path(segment)
        if not self._storage.exists(path.name):
            return False
        LocalStorage(path.parent).write_bytes(path.name, self._storage.read_bytes(path.name))
        return True

    def clear(self) -> None:
        self._storage.delete("")
        self.full.clear()
        self._header = b""

    def _upload(self, folder: SegmentFolder, segment: int, name: str) -> None:
        # Read in the other order than written: of a segment that grows meanwhile, no record comes without its page.
        index, pages = _read(folder.index_path(segment)), _read(folder.pages_path(segment))
        self._storage.write_bytes(f"{name}.pages", pages)
        self._storage.write_bytes(f"{name}.index", index)


def fetch_missing(storage: Storage, local: LocalStorage) -> None:
    """Bring into a folder what a stream needs to be opened and is not there: header, sink, indexes, the open segment.

    Pages of full segments stay in the store. Of the folder's last segment, the store may have the longer version.
    """
    remote = set(storage.keys())
    for name in (SINK, HEADER):
        if name in remote and not local.exists(name):
            local.write_bytes(name, storage.read_bytes(name))
    here = sorted(key for key in local.keys("") if key.endswith(".index"))
    for key in sorted(key for key in remote if key.endswith(".index")):
        name = key.removeprefix(f"{_OPEN}-")
        if name in here[:-1] or (name != key and name in remote):
            continue
        index = storage.read_bytes(key)
        if name in here and len(index) <= len(local.read_bytes(name)):
            continue
        pages = name.replace(".index", ".pages")
        if name == key:
            local.delete(pages)
        else:
            local.write_bytes(pages, storage.read_bytes(f"{_OPEN}-{pages}"))
        local.write_bytes(name, index)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read '{path}': {error.strerror or error}") from error
