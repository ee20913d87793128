"""Distillation on Ray Train: killed workers and killed drivers end with the weights of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.distill import distill
from sparsight.artifacts import RunDirectory
from sparsight.config import RunConfig, dump
from sparsight.data.samples import write_samples
from sparsight.data.signals import encode_signals, labelled_table, signal_rows
from sparsight.errors import AlignmentError
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.observe import read_metrics
from sparsight.records import SAMPLES_VERSION, SIGNALS_VERSION, Sample, TeacherSignal, hash_response
from tests.parity.training_case import SMALL, WORDS, random_targets, samples
from tests.ray.processes import alive, children_named

pytestmark = pytest.mark.usefixtures("ray_cluster")

STEPS = 150
STAGE = {
    "name": "sparse",
    "upcycle": {"experts": 4, "active_experts": 2},
    "terms": {"cross_entropy": 0.5, "forward_kl": 1.0, "balance": 0.01},
    "steps": STEPS,
    "batch_samples": 8,
    "learning_rate": 2e-3,
    "checkpoint_every_steps": 10,
}


def configuration(folder: Path) -> RunConfig:
    architecture = SMALL.model_dump()
    return RunConfig.model_validate(
        {
            "run_dir": str(folder),
            "data": {"sources": [{"kind": "scenes", "size_pixels": 32}]},
            "teacher": {"kind": "tiny", "architecture": architecture, "stages": [{**STAGE, "upcycle": None}]},
            "student": {"architecture": architecture},
            "distill": {"students": [{"name": "student", "stages": [STAGE]}]},
        }
    )


def write_inputs(folder: Path) -> None:
    """Samples, a teacher and its signals, as the earlier stages would leave them."""
    run = RunDirectory(str(folder))
    rows = samples(24)
    artifact = run.artifact("samples/student", "samples", SAMPLES_VERSION, {})
    artifact.begin()
    write_samples(artifact.storage, rows)
    artifact.commit()
    teacher = make_dense(SMALL, make_tokenizer([*WORDS, "what is in the image?"] * 20, 300), seed=0)
    artifact = run.artifact("teacher", "model", 1, {})
    artifact.begin()
    teacher.save(folder / "teacher" / "model")
    artifact.commit()
    artifact = run.artifact("signals", "signals", SIGNALS_VERSION, {})
    artifact.begin()
    signals = [signal_of(teacher, row, seed) for seed, row in enumerate(rows)]
    artifact.storage.write_bytes("part-0.parquet", encode_signals(signal_rows(labelled_table(signals))))
    fingerprint = teacher.chat.tokenizer_fingerprint
    artifact.commit(details={"tokenizer_fingerprint": fingerprint, "vocabulary": 300, "tail_samples": 3})


def signal_of(teacher: VisionLanguageModel, sample: Sample, seed: int) -> TeacherSignal:
    encoded = teacher.chat.encode(sample.turns, teacher.visual_tokens())
    ids_n = encoded.response_ids_n
    return TeacherSignal(
        id=sample.id,
        content_hash=sample.content_hash,
        response_ids_n=ids_n,
        answer_lengths=tuple(end - start for start, end in encoded.answer_spans),
        answered_by_teacher=(False,) * len(sample.turns),
        label_logprobs_n=torch.zeros(len(ids_n)).numpy(),
        targets=random_targets(np.random.default_rng(seed), len(ids_n), 300),
        visual_tokens=encoded.visual_tokens,
        response_hash=hash_response(ids_n),
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to; its stage's folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_inputs(folder)
    distill(configuration(folder))
    return folder / "students/student/sparse"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    write_inputs(tmp_path)
    return tmp_path


def weights_of(stage: Path) -> dict[str, torch.Tensor]:
    return VisionLanguageModel.load(stage / "model").model.state_dict()


def assert_same_weights(stage: Path, other: Path) -> None:
    ours, theirs = weights_of(stage), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def has_checkpoint(stage: Path) -> bool:
    """Whether Ray Train has taken a checkpoint down as the one to continue from."""
    try:
        taken = json.loads((stage / "checkpoints/checkpoint_manager_snapshot.json").read_text())
    except (OSError, json.JSONDecodeError):  # not there, or being written
        return False
    return bool(taken["latest_checkpoint_result"])


def wait_for(condition: Callable[[], object], working: Callable[[], bool]) -> None:
    """Returns once the condition holds; fails if what should bring it about ends before."""
    tick = threading.Event()
    while not condition():
        assert working(), "ended before it could be killed"
        tick.wait(0.01)


def test_a_stage_leaves_a_stock_model_its_metrics_and_its_figures(undisturbed: Path) -> None:
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["counts"]["rows"] == 24
    assert manifest["figures"]["total_parameters"] > manifest["figures"]["activated_parameters"]
    assert [row["step"] for row in read_metrics(undisturbed / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert not (undisturbed / "checkpoints").exists()
    assert not (undisturbed / "start").exists()
    losses = [row["loss"] for row in read_metrics(undisturbed / "metrics.jsonl")]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_a_finished_stage_is_left_alone(undisturbed: Path) -> None:
    before = (undisturbed / "model/model.safetensors").stat().st_mtime_ns
    distill(configuration(undisturbed.parents[2]))
    assert (undisturbed / "model/model.safetensors").stat().st_mtime_ns == before


def test_a_killed_worker_costs_nothing_but_time(undisturbed: Path, run_folder: Path) -> None:
    stage = run_folder / "students/student/sparse"
    work = threading.Thread(target=distill, args=(configuration(run_folder),))
    work.start()
    wait_for(lambda: has_checkpoint(stage), work.is_alive)
    killed = children_named("ray::RayTrainWorker")
    assert len(killed) == 2
    os.kill(killed[-1], signal.SIGKILL)
    work.join()
    assert (stage / "manifest.json").exists()
    assert [row["step"] for row in read_metrics(stage / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert_same_weights(stage, undisturbed)


def test_a_killed_driver_continues_from_its_last_checkpoint(undisturbed: Path, run_folder: Path) -> None:
    stage = run_folder / "students/student/sparse"
    config = configuration(run_folder)
    (run_folder / "config.yaml").write_text(dump(config))
    command = [sys.executable, "-m", "pipelines.distill", "--config", str(run_folder / "config.yaml")]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: has_checkpoint(stage), lambda: driver.poll() is None)
    family = children_named("ray::", driver.pid)
    driver.kill()
    driver.wait()
    wait_for(lambda: not any(map(alive, family)), lambda: True)
    assert not (stage / "manifest.json").exists()
    early = read_metrics(stage / "metrics.jsonl")[:10]
    distill(config)
    rows = read_metrics(stage / "metrics.jsonl")
    assert rows[:10] == early  # with the times at which they were written: these steps were not taken again
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert_same_weights(stage, undisturbed)


def test_a_store_that_does_not_fit_is_refused_before_training(run_folder: Path) -> None:
    part = run_folder / "signals/part-0.parquet"
    table = pq.read_table(part)
    index = table.schema.get_field_index("visual_tokens")
    field = table.schema.field(index)
    shifted = table.set_column(index, field, pa.array([99] * table.num_rows, field.type))
    pq.write_table(shifted, part)
    with pytest.raises(AlignmentError, match="row/0"):
        distill(configuration(run_folder))
    assert not (run_folder / "students/student/sparse/manifest.json").exists()
    assert not (run_folder / "students/student/sparse/model").exists()
