"""What a Ray Train worker does: the stages that it is given, one after another, each ending as a finished artefact.

A checkpoint names the artefact that it belongs to, so a worker group that is started again, after a worker or the
driver died, continues the stage that was cut short, if that is still to become the same artefact. What a step computes
is `sparsight.distill.loop`; the driver's side is `pipelines.training`.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.train
import torch
from ray.train.torch import get_device

from sparsight import layout
from sparsight.artifacts import Artifact
from sparsight.config import StageConfig
from sparsight.data.samples import iter_samples
from sparsight.data.visual_signals import VisualStore
from sparsight.distill.loop import StageTrainer
from sparsight.distill.pictures import FeaturePictures, Pictures, PixelPictures
from sparsight.distill.rows import Row
from sparsight.distill.taught import LiveSide, StoredSide, TeacherSide
from sparsight.media.images import DecodeLimits
from sparsight.model.parameters import activated_parameters, total_parameters
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.observe import MetricsWriter
from sparsight.storage import LocalStorage, Storage, open_storage
from sparsight.teacher.load import TeacherSource, load_teacher
from sparsight.teacher.protocol import SignalSettings, TeacherIdentity

START = "start"
METRICS = "metrics.jsonl"
STATE = "state.pt"


class LiveTeacher(NamedTuple):
    """A teacher to be loaded beside the student."""

    source: TeacherSource
    identity: TeacherIdentity
    settings: SignalSettings

    def side(self, rows: Sequence[Row], samples: Storage, student: VisionLanguageModel, device: str) -> TeacherSide:
        wanted = {row.id for row in rows}
        asked = {sample.id: sample for sample in iter_samples(samples) if sample.id in wanted}
        return LiveSide(load_teacher(*self, device).label, asked, student.chat, student.head_VD.shape[0])


class Teaching(NamedTuple):
    """Where the teacher's side of a stage is, beyond what its rows hold: a store of visual signals, or the teacher."""

    store: str | None = None
    teacher: LiveTeacher | None = None


@dataclass(frozen=True)
class StageJob:
    """Everything that a worker needs to train one stage. Plain data: it travels. Places are storage URIs."""

    artifact: Artifact
    """The stage's draft."""
    stage: StageConfig
    rows: Sequence[Row]
    start: str
    """The model directory that the stage starts from, before up-cycling."""
    samples: str
    """The samples that hold the rows' pictures."""
    features: str | None
    """The feature table; None computes features from the samples' pictures in the step."""
    seed: int
    vocabulary: int | None
    limits: DecodeLimits
    threads: int
    gpu: bool
    teaching: Teaching = field(default_factory=Teaching)

    @property
    def identity(self) -> str:
        """What its checkpoints are called: where its artefact lies, and what that is made from."""
        return f"{self.artifact.storage.uri} {self.artifact.fingerprint}"

    def trainer(self) -> StageTrainer:
        student = VisionLanguageModel.load(open_storage(self.start).fetch())
        if self.stage.upcycle is not None:
            student = upcycle(student, self.stage.upcycle, self.seed)
        pictures = self._pictures(student)
        device = str(get_device()) if self.gpu else "cpu"
        student.model.to(device)
        side = self._side(student, device)
        return StageTrainer(student, self.stage, self.rows, pictures, self.seed, self.vocabulary, side)

    def _pictures(self, student: VisionLanguageModel) -> Pictures:
        if self.features is not None:
            return FeaturePictures(open_storage(self.features))
        samples = iter_samples(open_storage(self.samples))
        return PixelPictures(samples, student.pixels, *self.limits)

    def _side(self, student: VisionLanguageModel, device: str) -> TeacherSide:
        if self.teaching.teacher is not None:
            return self.teaching.teacher.side(self.rows, open_storage(self.samples), student, device)
        return StoredSide(None if self.teaching.store is None else VisualStore(open_storage(self.teaching.store)))


def train_stages(jobs: Sequence[StageJob]) -> None:
    """Train the stages in turn; the first worker commits each one's artefact."""
    checkpoint = _last_checkpoint()
    for job in jobs:
        if not job.artifact.finished:  # by the workers before these
            _train_stage(job, checkpoint.get(job.identity))


def _last_checkpoint() -> dict[str, dict[str, Any]]:
    """The state of the stage that was cut short, by its identity; empty without a checkpoint."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return {}
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / STATE, map_location="cpu")


def _train_stage(job: StageJob, state: dict[str, Any] | None) -> None:
    started_s = time.monotonic()
    torch.set_num_threads(job.threads)
    trainer = job.trainer()
    if state is not None:
        trainer.load_state_dict(state)
    first = ray.train.get_context().get_world_rank() == 0
    with _StageFiles(job.artifact.storage, trainer.step, first) as files:
        while not trainer.done:
            metrics = trainer.train_step()
            files.write(trainer.step, metrics)
            if trainer.step % job.stage.checkpoint_every_steps == 0 and not trainer.done:
                files.publish()
                _report(job, trainer, metrics)
        files.save(trainer.student)
    figures: dict[str, float] = {
        "steps": trainer.step,
        "activated_parameters": activated_parameters(trainer.student),
        "total_parameters": total_parameters(trainer.student),
    }
    _report(job, trainer, figures)  # all workers wait here: the next stage starts from the model just saved
    if first:
        tokens = sum(len(row.positions_n) for row in job.rows)
        counts = {"rows": len(job.rows), "response_tokens": tokens, "steps": trainer.step}
        figures["train_s"] = time.monotonic() - started_s
        job.artifact.commit(counts, figures, {"stage": job.stage.name})
        job.artifact.storage.delete(START)


def _report(job: StageJob, trainer: StageTrainer, metrics: dict[str, Any]) -> None:
    """A checkpoint of the first worker, which all workers wait for."""
    if ray.train.get_context().get_world_rank() > 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save({job.identity: trainer.state_dict()}, Path(folder) / STATE)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


class _StageFiles:
    """The first worker's metrics and model. On an object store they are kept in a local folder and published."""

    def __init__(self, storage: Storage, step: int, first: bool) -> None:
        self._storage = storage
        self._first = first
        self._scratch = tempfile.TemporaryDirectory()
        local = isinstance(storage, LocalStorage)
        self._folder = storage.root if isinstance(storage, LocalStorage) else Path(self._scratch.name)
        if first and not local and storage.exists(METRICS):
            (self._folder / METRICS).write_bytes(storage.read_bytes(METRICS))
        self._metrics = MetricsWriter(self._folder, step) if first else None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.write(step, metrics)

    def publish(self) -> None:
        if self._first and not isinstance(self._storage, LocalStorage):
            self._storage.publish(self._folder, "")

    def save(self, student: VisionLanguageModel) -> None:
        if self._first:
            self.publish()
            save_model(student, self._storage, layout.MODEL)

    def __enter__(self) -> "_StageFiles":
        return self

    def __exit__(self, *_: object) -> None:
        if self._metrics is not None:
            self._metrics.close()
        self._scratch.cleanup()


def save_model(model: VisionLanguageModel, target: Storage, key: str) -> None:
    """The model's directory under a key, in place of what is there."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        target.delete(key)
        target.publish(Path(folder), key)
