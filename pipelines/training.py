"""Training on Ray Train, the driver's side: worker groups around stages, and the bar that follows them.

Starting workers takes longer than many a stage, so stages share one group of them as far as they can (`waits_for`). A
worker that dies is replaced and continues from the last checkpoint; a driver that died and runs again finds the same
checkpoints under the last stage's artefact. The workers' side is `pipelines.train_worker`. Called by the teacher and
distillation pipelines.
"""

import json
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from pipelines import runtime
from pipelines.features import make_features
from pipelines.train_worker import METRICS, StageJob
from sparsight.artifacts import MANIFEST, Artifact
from sparsight.config import ResourcesConfig, RunConfig, StageConfig
from sparsight.distill.batches import steps_of
from sparsight.distill.rows import Row
from sparsight.errors import SparsightError
from sparsight.media.images import DecodeLimits
from sparsight.observe import progress_bar, say
from sparsight.storage import Storage

CHECKPOINTS = "checkpoints"
_SNAPSHOT = "checkpoint_manager_snapshot.json"
_POLL_S = 0.5


def waits_for(stage: StageConfig, before: StageConfig) -> bool:
    """Whether the model of the stage before must be there before the workers of this one start: pairs are made with it,
    or features with the tower that it trained."""
    return stage.rows == "pairs" or "tower" in before.trainable


def stage_job(
    config: RunConfig,
    stage: StageConfig,
    artifact: Artifact,
    rows: Sequence[Row],
    start: Storage,
    samples: Storage,
    tower: Path,
    vocabulary: int | None = None,
    known_pictures: bool = True,
) -> StageJob:
    """The stage as a worker sees it; computes the tower's features first, where they are wanted and may be used.

    `start` and `tower` are model directories: the one that the stage starts from, which may not be there yet, and one
    that is there and has the same tower. `known_pictures`: whether the samples show the pictures of the student's
    samples, of which alone there are features.
    """
    uses_features = config.distill.precompute_features and "tower" not in stage.trainable and known_pictures
    return StageJob(
        artifact=artifact,
        stage=stage,
        rows=rows,
        start=start.uri,
        samples=samples.uri,
        features=make_features(config, tower).uri if uses_features else None,
        seed=config.seed,
        vocabulary=vocabulary,
        limits=DecodeLimits.of(config.data),
        threads=config.resources.threads_per_worker,
        gpu=config.resources.train_gpus,
    )


def train(jobs: Sequence[StageJob], resources: ResourcesConfig) -> None:
    """Train stages in turn with one group of workers; each becomes a finished artefact with its last step.

    Raises `SparsightError` where the cluster lacks what the workers ask for, and a worker's own `SparsightError`.
    """
    runtime.connect(resources)
    gpus = float(resources.train_gpus)
    workers = resources.train_workers
    runtime.require(
        workers * resources.threads_per_worker,
        workers * gpus,
        resources.start_timeout_s,
        f"stage '{jobs[0].stage.name}'",
    )
    target = jobs[-1].artifact.storage
    _drop_damaged(target)
    filesystem, path = target.arrow()
    trainer = TorchTrainer(
        _worker_entry(),
        train_loop_config={"jobs": [ray.put(list(jobs))]},  # in a list: only workers look inside
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
    with _followed(jobs):
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _cause(error) from error
    target.delete(CHECKPOINTS)


def _worker_entry() -> Any:
    """What every worker runs. A nested function travels by value, so Ray Train's controller, which reads it too, need
    not import the models: seconds at every start."""

    def enter(config: dict[str, Any]) -> None:
        import ray

        from pipelines.train_worker import train_stages

        train_stages(ray.get(config["jobs"][0]))

    return enter


def _drop_damaged(target: Storage) -> None:
    """Ray Train's list of checkpoints is not written at once: cut short by a kill, it would refuse to start again."""
    key = f"{CHECKPOINTS}/{_SNAPSHOT}"
    if target.exists(key):
        try:
            json.loads(target.read_bytes(key))
        except json.JSONDecodeError:
            say("the list of checkpoints was cut short by a kill: the stage starts again")
            target.delete(CHECKPOINTS)


def _cause(error: TrainingFailedError) -> BaseException:
    """A worker's own error if it is one that a user can mend."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause: Any = getattr(failure, "cause", failure)
        if isinstance(cause, SparsightError):
            return cause
    return error


@contextmanager
def _followed(jobs: Sequence[StageJob]) -> Generator[None]:
    """Bars on this terminal that follow the metrics files of the first worker."""
    if not sys.stderr.isatty():
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(jobs, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _follow(jobs: Sequence[StageJob], stop: threading.Event) -> None:
    for job in jobs:
        steps = steps_of(len(job.rows), job.stage.batch_samples, job.stage.epochs, job.stage.steps)
        with progress_bar(job.stage.name, total=steps, unit="step") as bar:
            while True:
                ended = stop.wait(_POLL_S) or job.artifact.storage.exists(MANIFEST)
                row = _last_row(job.artifact.storage)
                if row is not None and row["step"] != bar.n:
                    bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                    bar.update(row["step"] - bar.n)
                if ended:
                    break
        if stop.is_set():
            return


def _last_row(target: Storage) -> dict[str, Any] | None:
    if not target.exists(METRICS):
        return None
    complete = target.read_bytes(METRICS).rpartition(b"\n")[0]
    return json.loads(complete.rpartition(b"\n")[2]) if complete else None
