"""The frozen tower's features of all training pictures, computed once for every stage that uses this tower.

A table a tower, keyed by content hash, so the teacher's and the students' samples (the same pictures) share them. How
they are stored is `sparsight.distill.pictures`. Called by the teacher and distillation pipelines.
"""

from pathlib import Path

from sparsight import layout
from sparsight.artifacts import RunDirectory
from sparsight.config import RunConfig
from sparsight.data.samples import iter_samples
from sparsight.distill.pictures import FEATURES_VERSION, PixelPictures, in_groups, write_features
from sparsight.media.images import DecodeLimits
from sparsight.model.tower_fingerprint import tower_fingerprint
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.observe import progress_bar
from sparsight.storage import Storage

KIND = "features"
CLIPS_PER_FILE = 256


def make_features(config: RunConfig, model_directory: Path) -> Storage:
    """The finished features of the model's tower; computed here unless they are there."""
    run = RunDirectory(config.run_dir)
    samples, samples_manifest = run.finished(layout.STUDENT_SAMPLES, "samples")
    tower = tower_fingerprint(model_directory)
    inputs = {"samples": samples_manifest.fingerprint, "tower": tower}
    artifact = run.artifact(layout.features_of(tower), KIND, FEATURES_VERSION, {}, inputs)
    if artifact.finished:
        return artifact.storage
    artifact.begin()
    model = VisionLanguageModel.load(model_directory)
    pictures = PixelPictures(iter_samples(samples), model.pixels, *DecodeLimits.of(config.data))
    clips = in_groups(pictures.content_hashes, CLIPS_PER_FILE)
    with progress_bar("features", total=len(pictures.content_hashes), unit="clip") as bar:
        for done in write_features(artifact.storage, pictures, clips, model.features):
            bar.update(done)
    artifact.commit(counts={"clips": len(pictures.content_hashes)})
    return artifact.storage
