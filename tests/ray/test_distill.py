"""Distillation on Ray Train: killed workers and killed drivers end with the weights of an undisturbed run."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from pipelines.distill import distill
from sparsight.config import RunConfig, dump
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.observe import read_metrics
from tests.labelled_run import ROWS, configuration, write_inputs
from tests.ray.processes import DEADLINE_S, children_named, kill_driver, wait_until

pytestmark = pytest.mark.usefixtures("ray_cluster")

STEPS, EVERY = 60, 10
LENGTH = {"steps": STEPS, "batch_samples": 8, "learning_rate": 2e-3, "checkpoint_every_steps": EVERY}
DENSE = {"name": "dense", "terms": {"forward_kl": 1.0}, **LENGTH}
SPARSE = {
    "name": "sparse",
    "upcycle": {"experts": 4, "active_experts": 2},
    "terms": {"cross_entropy": 0.5, "forward_kl": 1.0, "balance": 0.01},
    **LENGTH,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to; its last stage's folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_inputs(str(folder))
    distill(configuration(str(folder), DENSE, SPARSE))
    return folder / "students/student/sparse"


def weights_of(stage: Path) -> dict[str, torch.Tensor]:
    return VisionLanguageModel.load(stage / "model").model.state_dict()


def assert_same_weights(stage: Path, other: Path) -> None:
    ours, theirs = weights_of(stage), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def last_checkpoint(stage: Path) -> str | None:
    """The name of the checkpoint that Ray Train has taken down as the one to continue from."""
    try:
        taken = json.loads((stage / "checkpoints/checkpoint_manager_snapshot.json").read_text())
    except (OSError, json.JSONDecodeError):  # not there, or being written
        return None
    latest = taken["latest_checkpoint_result"]
    return latest and latest["checkpoint_dir_name"]


def test_a_stage_leaves_a_stock_model_its_metrics_and_its_figures(undisturbed: Path) -> None:
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["counts"]["rows"] == ROWS
    assert manifest["figures"]["total_parameters"] > manifest["figures"]["activated_parameters"]
    assert [row["step"] for row in read_metrics(undisturbed / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert not (undisturbed / "checkpoints").exists()
    assert not (undisturbed / "start").exists()
    losses = [row["loss"] for row in read_metrics(undisturbed.parent / "dense/metrics.jsonl")]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


def test_a_finished_stage_is_left_alone(undisturbed: Path) -> None:
    before = (undisturbed / "model/model.safetensors").stat().st_mtime_ns
    distill(configuration(str(undisturbed.parents[2]), DENSE, SPARSE))
    assert (undisturbed / "model/model.safetensors").stat().st_mtime_ns == before


def test_a_killed_driver_and_a_killed_worker_cost_nothing_but_time(undisturbed: Path, tmp_path: Path) -> None:
    """First the driver is killed in the first stage, with its cluster; then the same command continues, and one of its
    workers is killed in the second stage."""
    write_inputs(str(tmp_path))
    config = configuration(str(tmp_path), DENSE, SPARSE)
    (tmp_path / "config.yaml").write_text(dump(config))
    dense, sparse = (tmp_path / "students/student" / name for name in ("dense", "sparse"))
    kill_driver("pipelines.distill", tmp_path / "config.yaml", lambda: last_checkpoint(sparse), "the first checkpoint")
    assert not (sparse / "manifest.json").exists()
    early = read_metrics(dense / "metrics.jsonl")[:EVERY]
    kill_worker(config, sparse)
    for stage in (dense, sparse):
        rows = read_metrics(stage / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        assert (stage / "manifest.json").exists()
        assert_same_weights(stage, undisturbed.parent / stage.name)
    again = read_metrics(dense / "metrics.jsonl")[:EVERY]
    assert again == early  # with the times at which they were written: these steps were not taken again


def kill_worker(config: RunConfig, stage: Path) -> None:
    """Continue to the end, and kill one of the two workers in the midst of this stage."""
    work = threading.Thread(target=distill, args=(config,))
    work.start()
    try:
        wait_until(lambda: steps_taken(stage) > EVERY, "a step after a checkpoint", work.is_alive)
        workers = wait_until(lambda: children_named("ray::RayTrainWorker"), "a worker at work", work.is_alive)
        assert steps_taken(stage) < STEPS, "the stage was over before a worker was killed"
        os.kill(workers[-1], signal.SIGKILL)
    finally:
        work.join(DEADLINE_S)
    assert not work.is_alive()


def steps_taken(stage: Path) -> int:
    metrics = stage / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def test_a_checkpoint_belongs_to_what_it_was_made_from(tmp_path: Path) -> None:
    """The driver is killed; then the student that it was training gets other settings, and another one stays."""
    write_inputs(str(tmp_path))
    config = two_students(tmp_path, learning_rate=2e-3)
    (tmp_path / "config.yaml").write_text(dump(config))
    first, last = (tmp_path / "students" / name / "dense" for name in ("student", "other"))
    kill_driver("pipelines.distill", tmp_path / "config.yaml", lambda: last_checkpoint(last), "the first checkpoint")
    assert not (first / "manifest.json").exists(), "its stage was over before the kill"
    distill(two_students(tmp_path, learning_rate=1e-3))
    for stage in (first, last):
        assert (stage / "manifest.json").exists()
        assert [row["step"] for row in read_metrics(stage / "metrics.jsonl")] == list(range(1, STEPS + 1))


def two_students(run_dir: Path, learning_rate: float) -> RunConfig:
    """`student` with this rate, and `other`, whose settings are always the same."""
    (student,) = configuration(str(run_dir), DENSE | {"learning_rate": learning_rate}).distill.students
    config = configuration(str(run_dir), DENSE)
    other = config.distill.students[0].model_copy(update={"name": "other"})
    return config.model_copy(update={"distill": config.distill.model_copy(update={"students": [student, other]})})
