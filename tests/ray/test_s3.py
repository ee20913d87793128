"""Labelling and distillation of a run that lies in a bucket: workers reach it on their own, nothing is left behind."""

from collections.abc import Callable

import pytest
import torch

from pipelines.distill import distill
from pipelines.label import label
from sparsight.artifacts import RunDirectory
from sparsight.config import RunConfig
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.observe import read_metrics
from tests.labelled_run import ROWS, configuration, write_student_samples, write_teacher

STEPS = 4
STAGE = {
    "name": "dense",
    "terms": {"cross_entropy": 0.5, "forward_kl": 1.0},
    "steps": STEPS,
    "batch_samples": 8,
    "checkpoint_every_steps": 2,
}


@pytest.fixture(scope="module")
def config(new_bucket: Callable[[], str], ray_cluster: None) -> RunConfig:
    """Of a run in a bucket that was labelled and distilled, by one worker each."""
    run_dir = f"s3://{new_bucket()}/runs/one"
    settings = configuration(run_dir, STAGE)
    alone = settings.resources.model_copy(update={"label_workers": 1, "train_workers": 1})
    settings = settings.model_copy(update={"resources": alone})
    write_teacher(run_dir)
    write_student_samples(run_dir)
    label(settings)
    distill(settings)
    return settings


def test_the_bucket_holds_finished_artefacts_and_no_leftovers(config: RunConfig) -> None:
    run = RunDirectory(config.run_dir)
    _, signals = run.finished("signals", "signals")
    assert (signals.counts["input"], signals.counts["labelled"]) == (ROWS, ROWS)
    stage, manifest = run.finished("students/student/dense", "model")
    assert manifest.counts["steps"] == STEPS
    folders = {key.split("/")[0] for key in stage.keys("")}
    assert folders == {"manifest.json", "metrics.jsonl", "model", "tensorboard"}
    assert [row["step"] for row in read_metrics(stage.fetch("metrics.jsonl"))] == list(range(1, STEPS + 1))


def test_the_student_in_the_bucket_has_learned(config: RunConfig) -> None:
    run = RunDirectory(config.run_dir)
    teacher, student = (
        VisionLanguageModel.load(run.storage.fetch(f"{name}/model")) for name in ("teacher", "students/student/dense")
    )
    assert student.chat.tokenizer_fingerprint == teacher.chat.tokenizer_fingerprint
    assert not torch.equal(student.head_VD, teacher.head_VD)


def test_finished_stages_are_left_alone(config: RunConfig) -> None:
    run = RunDirectory(config.run_dir).storage
    before = {key: run.read_bytes(key) for key in run.keys("") if key.endswith(".json")}
    label(config)
    distill(config)
    assert {key: run.read_bytes(key) for key in run.keys("") if key.endswith(".json")} == before
