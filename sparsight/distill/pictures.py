"""What the student sees of a picture in training: tower features computed once, or pixels for the tower in the step.

A feature table is float16 `features-*.npy` files [frames, P, D] with an index by content hash; reading maps the
files into memory, so a worker's cost is what it touches. Valid only for the frozen tower that wrote it, which is the
artefact's business. Called by the feature pipeline (writing) and the training loop (reading).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sparsight.errors import DataError
from sparsight.media.images import decode
from sparsight.media.pixels import PixelSettings, to_pixels
from sparsight.records import Sample
from sparsight.storage import Storage

INDEX = "index.parquet"
FEATURES_VERSION = 1


class Clips(NamedTuple):
    """Frames of several clips, one after another: features [N, P, D] or pixels [N, 3, side, side].

    `frames` says how many belong to each clip: none to the clip of a row that is text alone.
    """

    values: torch.Tensor
    frames: list[int]
    are_features: bool


class Pictures(Protocol):
    """Gives the frames of clips by their content hashes."""

    def load(self, content_hashes: Sequence[str]) -> Clips: ...


class PixelPictures:
    """Decodes pictures when they are asked for; keeps only their encoded bytes."""

    def __init__(self, samples: Iterable[Sample], pixels: PixelSettings, max_bytes: int, max_pixels: int) -> None:
        self._frames = {sample.content_hash: sample.frames for sample in samples}
        self._pixels = pixels
        self._limits = (max_bytes, max_pixels)

    @property
    def content_hashes(self) -> list[str]:
        """Every clip once, in the samples' order; each sample of text alone has its own, without frames."""
        return list(self._frames)

    def load(self, content_hashes: Sequence[str]) -> Clips:
        clips = [self._frames[content_hash] for content_hash in content_hashes]
        pictures = [decode(frame, *self._limits) for clip in clips for frame in clip]
        return Clips(to_pixels(pictures, self._pixels), [len(clip) for clip in clips], are_features=False)


class FeaturePictures:
    """Reads a finished feature table."""

    def __init__(self, storage: Storage) -> None:
        self._uri = storage.uri
        folder = storage.fetch()
        names = sorted(folder.glob("features-*.npy"))
        self._files = [np.load(name, mmap_mode="r") for name in names]
        index = pq.read_table(folder / INDEX).to_pydict()
        places = zip(index["file"], index["first"], index["frames"], strict=True)
        self._index: dict[str, tuple[int, int, int]] = dict(zip(index["content_hash"], places, strict=True))

    def load(self, content_hashes: Sequence[str]) -> Clips:
        """Raises `DataError` for a picture that the table does not hold."""
        clips = [self._clip(content_hash) for content_hash in content_hashes]
        shown = [clip for clip in clips if len(clip)]
        values = torch.from_numpy(np.concatenate(shown or clips[:1]).astype(np.float32))
        return Clips(values, [len(clip) for clip in clips], are_features=True)

    def _clip(self, content_hash: str) -> np.ndarray:
        if content_hash not in self._index:
            raise DataError(f"'{self._uri}' has no features of picture {content_hash}: delete it and compute it again")
        file, first, frames = self._index[content_hash]
        return self._files[file][first : first + frames]


def write_features(
    storage: Storage,
    pictures: PixelPictures,
    clips: Iterable[Sequence[str]],
    tower: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[int]:
    """Compute and store features, one file for each list of content hashes; yields the clips done, file by file.

    `tower` maps pixels [N, 3, side, side] to features [N, P, D]. The index comes last. Raises `DataError` where
    float16 cannot hold a feature.
    """
    places: dict[str, list[str | int]] = {"content_hash": [], "file": [], "first": [], "frames": []}
    for file, content_hashes in enumerate(clips):
        pixels = pictures.load(content_hashes)
        seen = tower(pixels.values) if len(pixels.values) else torch.zeros(0, 0, 0)  # towers refuse to see nothing
        features_NPD = seen.to(torch.float16).cpu()
        if not bool(features_NPD.isfinite().all()):
            raise DataError("the tower's features do not fit float16: set distill.precompute_features: false")
        buffer = BytesIO()
        np.save(buffer, features_NPD.numpy())
        storage.write_bytes(f"features-{file:05d}.npy", buffer.getvalue())
        first = 0
        for content_hash, frames in zip(content_hashes, pixels.frames, strict=True):
            for name, value in zip(places, (content_hash, file, first, frames), strict=True):
                places[name].append(value)
            first += frames
        yield len(content_hashes)
    buffer = BytesIO()
    pq.write_table(pa.table(places), buffer)
    storage.write_bytes(INDEX, buffer.getvalue())


def in_groups(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """Consecutive lists of at most `size` items."""
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group
