"""Ready-made preference pairs become a store of samples in the run, so that their pictures travel like all others.

The artefact `samples/imported_pairs` holds a sample a pair: two turns that ask the same, the better answer first. No
pair shows a picture of an evaluation set. The teacher scores the answers in `pipelines.pairs`, which calls this.
"""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pyarrow.parquet as pq

from sparsight import layout
from sparsight.artifacts import MANIFEST, Artifact, Manifest, RunDirectory, read_manifest
from sparsight.config import DataConfig
from sparsight.data.files import files_digest
from sparsight.data.rlaif_v import read_rlaif_v
from sparsight.data.samples import QUARANTINE, sample_files, write_quarantine, write_samples
from sparsight.errors import DataError
from sparsight.observe import progress, say
from sparsight.records import SAMPLES_VERSION, Quarantined, Sample
from sparsight.storage import Storage

KIND = "samples"
TRAINING = frozenset({layout.TEACHER_SAMPLES, layout.STUDENT_SAMPLES, layout.KEPT_SAMPLES, layout.IMPORTED_PAIRS})
"""Stores of samples to learn from; all others of a run are for choosing settings and for tests."""


def held_out_sets(run: RunDirectory) -> dict[str, Storage]:
    """The finished stores of samples that nothing may learn from, by name."""
    names = {key.removesuffix(f"/{MANIFEST}") for key in run.storage.keys("samples") if key.endswith(f"/{MANIFEST}")}
    return {name: run.storage.child(name) for name in sorted(names - TRAINING)}


def held_out_pictures(run: RunDirectory) -> frozenset[str]:
    """Content hashes of all pictures in validation and test sets."""
    hashes: set[str] = set()
    for storage in held_out_sets(run).values():
        for key in sample_files(storage):
            filesystem, path = storage.arrow(key)
            column = pq.read_table(path, filesystem=filesystem, columns=["content_hash"])["content_hash"]
            hashes.update(column.to_pylist())
    return frozenset(hashes)


def imported_pairs(run: RunDirectory, path: Path, data: DataConfig) -> Artifact:
    """The artefact that an import of this file or folder writes: its files and the held-out pictures count."""
    limits = {"max_picture_bytes": data.max_picture_bytes, "max_picture_pixels": data.max_picture_pixels}
    inputs = {name: read_manifest(held).fingerprint for name, held in held_out_sets(run).items()}
    return run.artifact(layout.IMPORTED_PAIRS, KIND, SAMPLES_VERSION, limits, {"files": files_digest(path), **inputs})


def import_pairs(run: RunDirectory, path: Path, data: DataConfig) -> tuple[Storage, Manifest]:
    """Write the imported pairs; finished ones are left alone.

    Raises `DataError` where the files cannot be read, or no row of them can be used.
    """
    artifact = imported_pairs(run, path, data)
    if artifact.finished is not None:
        return artifact.storage, artifact.finished
    artifact.begin()
    rows = read_rlaif_v(path, data, held_out_pictures(run))
    quarantined: list[Quarantined] = []

    def usable() -> Iterator[Sample]:
        for row in progress(rows.items, "importing pairs", total=rows.total):
            if isinstance(row, Quarantined):
                quarantined.append(row)
            else:
                yield row

    written = write_samples(artifact.storage, usable())
    if not written:
        first = f": the first, '{quarantined[0].id}', {quarantined[0].reason}" if quarantined else ""
        raise DataError(f"no pair in '{path}' can be used{first}")
    write_quarantine(artifact.storage, quarantined)
    counts = {"input": written + len(quarantined), "samples": written, "quarantined": len(quarantined)}
    say(f"pairs: {written} imported, {len(quarantined)} quarantined")
    return artifact.storage, artifact.commit(counts)


def refused_pairs(imported: Storage) -> list[Quarantined]:
    """The rows that could not be imported."""
    table = pq.read_table(BytesIO(imported.read_bytes(QUARANTINE)))
    return [Quarantined(row["id"], row["source"], row["reason"]) for row in table.to_pylist()]
