"""One training stage on Ray Train: workers around `StageTrainer`, checkpoints, metrics, and the bar that follows them.

A worker that dies is replaced and continues from the last checkpoint; a driver that died and runs again finds the
same checkpoints under the stage's artefact. What a step computes is `sparsight.distill.loop`. Called by the teacher
and distillation pipelines.
"""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError

from pipelines import runtime
from pipelines.features import make_features
from sparsight import layout
from sparsight.artifacts import Artifact
from sparsight.config import ResourcesConfig, RunConfig, StageConfig
from sparsight.data.samples import iter_samples
from sparsight.distill.loop import StageTrainer
from sparsight.distill.pictures import FeaturePictures, Pictures, PixelPictures
from sparsight.distill.rows import Row
from sparsight.errors import SparsightError
from sparsight.media.images import DecodeLimits
from sparsight.model.parameters import activated_parameters, total_parameters
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.observe import MetricsWriter, progress_bar, say
from sparsight.storage import LocalStorage, Storage, open_storage

START = "start"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
STATE = "state.pt"
_SNAPSHOT = "checkpoint_manager_snapshot.json"
_POLL_S = 0.5


@dataclass(frozen=True)
class StageJob:
    """Everything a worker needs but the rows. Plain data: it travels to the workers. Places are storage URIs."""

    stage: StageConfig
    start: str
    """The model directory that the stage starts from, before up-cycling."""
    target: str
    """The stage's artefact."""
    samples: str
    features: str | None
    """The feature table; None computes features from the samples' pictures in the step."""
    seed: int
    vocabulary: int | None
    limits: DecodeLimits
    threads: int
    gpu: bool

    def trainer(self, rows: Sequence[Row]) -> StageTrainer:
        student = VisionLanguageModel.load(open_storage(self.start).fetch())
        if self.stage.upcycle is not None:
            student = upcycle(student, self.stage.upcycle, self.seed)
        pictures = self._pictures(student)
        student.model.to(get_device() if self.gpu else "cpu")
        return StageTrainer(student, self.stage, rows, pictures, self.seed, self.vocabulary)

    def _pictures(self, student: VisionLanguageModel) -> Pictures:
        if self.features is not None:
            return FeaturePictures(open_storage(self.features))
        samples = iter_samples(open_storage(self.samples))
        return PixelPictures(samples, student.pixels, *self.limits)


def stage_job(
    config: RunConfig,
    stage: StageConfig,
    start: Storage,
    target: Storage,
    samples: Storage,
    vocabulary: int | None,
    known_pictures: bool = True,
) -> StageJob:
    """The stage as a worker sees it; computes the tower's features first, where they are wanted and may be used.

    `known_pictures`: whether the samples show the pictures of the student's samples, of which alone there are features.
    """
    uses_features = config.distill.precompute_features and "tower" not in stage.trainable and known_pictures
    features = make_features(config, start.fetch()).uri if uses_features else None
    return StageJob(
        stage=stage,
        start=start.uri,
        target=target.uri,
        samples=samples.uri,
        features=features,
        seed=config.seed,
        vocabulary=vocabulary,
        limits=DecodeLimits.of(config.data),
        threads=config.resources.threads_per_worker,
        gpu=config.resources.train_gpus,
    )


def finish_stage(artifact: Artifact, job: StageJob, rows: Sequence[Row], steps: int, config: RunConfig) -> None:
    """Train the stage, remove what only training needed, and write the manifest."""
    started_s = time.monotonic()
    figures = train_stage(job, rows, steps, config.resources)
    artifact.storage.delete(CHECKPOINTS)
    artifact.storage.delete(START)
    tokens = sum(len(row.positions_n) for row in rows)
    counts = {"rows": len(rows), "response_tokens": tokens, "steps": steps}
    artifact.commit(counts, {**figures, "train_s": time.monotonic() - started_s}, {"stage": job.stage.name})


def save_model(model: VisionLanguageModel, target: Storage, key: str) -> None:
    """The model's directory under a key, in place of what is there."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        target.delete(key)
        target.publish(Path(folder), key)


def train_stage(job: StageJob, rows: Sequence[Row], steps: int, resources: ResourcesConfig) -> dict[str, float]:
    """Train, leave the model under `model/` of the target and return the steps taken and the model's size.

    Raises `SparsightError` where the cluster lacks what the workers ask for, and a worker's own `SparsightError`.
    """
    runtime.connect(resources)
    gpus = float(resources.train_gpus)
    workers = resources.train_workers
    runtime.require(
        workers * resources.threads_per_worker, workers * gpus, resources.start_timeout_s, f"stage '{job.stage.name}'"
    )
    target = open_storage(job.target)
    _drop_damaged(target)
    filesystem, path = target.arrow()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "rows": [ray.put(list(rows))]},
        torch_config=TorchConfig(backend=None if resources.train_gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=resources.train_gpus,
            resources_per_worker={"CPU": resources.threads_per_worker, "GPU": gpus},
        ),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    with _followed(target, job.stage.name, steps):
        try:
            return dict(trainer.fit().metrics or {})
        except TrainingFailedError as error:
            raise _cause(error) from error


def _drop_damaged(target: Storage) -> None:
    """Ray Train's list of checkpoints is not written at once: cut short by a kill, it would refuse to start again."""
    key = f"{CHECKPOINTS}/{_SNAPSHOT}"
    if target.exists(key):
        try:
            json.loads(target.read_bytes(key))
        except json.JSONDecodeError:
            say("the list of checkpoints was cut short by a kill: the stage starts again")
            target.delete(CHECKPOINTS)


def train_worker(config: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    job: StageJob = config["job"]
    torch.set_num_threads(job.threads)
    trainer = job.trainer(ray.get(config["rows"][0]))
    resume(trainer)
    with _StageFiles(job.target, trainer.step, ray.train.get_context().get_world_rank() == 0) as files:
        while not trainer.done:
            metrics = trainer.train_step()
            files.write(trainer.step, metrics)
            if trainer.step % job.stage.checkpoint_every_steps == 0 and not trainer.done:
                files.publish()
                report(trainer, metrics)
        files.save(trainer.student)
        size = {
            "activated_parameters": activated_parameters(trainer.student),
            "total_parameters": total_parameters(trainer.student),
        }
        report(trainer, {"steps": trainer.step, **size})


def resume(trainer: StageTrainer) -> None:
    """Continue from the run's last checkpoint, if it has one."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            trainer.load_state_dict(torch.load(Path(folder) / STATE, map_location=trainer.student.device))


def report(trainer: StageTrainer, metrics: dict[str, Any]) -> None:
    """A checkpoint of the first worker, which all workers wait for."""
    if ray.train.get_context().get_world_rank() > 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(trainer.state_dict(), Path(folder) / STATE)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


class _StageFiles:
    """The first worker's metrics and model. On an object store they are kept in a local folder and published."""

    def __init__(self, target: str, step: int, first: bool) -> None:
        self._storage = open_storage(target)
        self._first = first
        self._scratch = tempfile.TemporaryDirectory()
        local = isinstance(self._storage, LocalStorage)
        self._folder = self._storage.root if isinstance(self._storage, LocalStorage) else Path(self._scratch.name)
        if first and not local and self._storage.exists(METRICS):
            (self._folder / METRICS).write_bytes(self._storage.read_bytes(METRICS))
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


def _cause(error: TrainingFailedError) -> BaseException:
    """A worker's own error if it is one that a user can mend."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause: Any = getattr(failure, "cause", failure)
        if isinstance(cause, SparsightError):
            return cause
    return error


@contextmanager
def _followed(target: Storage, name: str, steps: int) -> Generator[None]:
    """A bar on this terminal that follows the metrics file of the first worker."""
    if not sys.stderr.isatty():
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(target, name, steps, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _follow(target: Storage, name: str, steps: int, stop: threading.Event) -> None:
    with progress_bar(name, total=steps, unit="step") as bar:
        while not stop.wait(_POLL_S):
            row = _last_row(target)
            if row is not None and row["step"] != bar.n:
                bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                bar.update(row["step"] - bar.n)


def _last_row(target: Storage) -> dict[str, Any] | None:
    if not target.exists(METRICS):
        return None
    complete = target.read_bytes(METRICS).rpartition(b"\n")[0]
    return json.loads(complete.rpartition(b"\n")[2]) if complete else None
