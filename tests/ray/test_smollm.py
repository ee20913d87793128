"""The shipped `configs/smollm.yaml`, a few steps of every stage: real language weights from file to export.

Only sizes are cut: few layers, few pictures, few steps. Weights are loaded, dropped, up-cycled and saved as ever.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.run import STAGES
from sparsight.artifacts import RunDirectory
from sparsight.config import RunConfig, TinyTeacherConfig, load
from sparsight.model.routing import routers
from sparsight.model.text_base import load_text_base
from sparsight.model.vision_language import VisionLanguageModel

pytestmark = pytest.mark.usefixtures("ray_cluster")

SMOLLM = Path(__file__).parents[2] / "configs" / "smollm.yaml"
CUTS = {
    "data.sources.0.limit": 6,
    "data.sources.1.pictures": 8,
    "data.sources.1.test_pictures": 2,
    "data.ground_truth_fraction": 0.5,
    "teacher.architecture.text_base.layers": [0, 29],
    "teacher.tower.steps": 2,
    "teacher.tower.drawn_pictures": 40,
    "student.architecture.text_base.layers": [0],
    "pairs.student_candidates": 2,
    "pairs.teacher_candidates": 1,
    "pairs.include_truth": True,  # after a few steps nobody else describes a scene
    "pairs.max_answer_tokens": 4,
}
STEPS = 2


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    shipped = load(SMOLLM)
    assert isinstance(shipped.teacher, TinyTeacherConfig)
    cuts: dict[str, Any] = {"run_dir": str(tmp_path_factory.mktemp("smollm")), **CUTS}
    for index in range(len(shipped.teacher.stages)):
        cuts |= {f"teacher.stages.{index}.steps": STEPS, f"teacher.stages.{index}.batch_samples": 2}
    for index in range(len(shipped.distill.students[0].stages)):
        place = f"distill.students.0.stages.{index}"
        cuts |= {f"{place}.steps": STEPS, f"{place}.batch_samples": 2}
    return load(SMOLLM, [f"{key}={json.dumps(value)}" for key, value in cuts.items()])


@pytest.fixture(scope="module")
def finished(config: RunConfig, ray_cluster: None) -> RunDirectory:
    for stage in STAGES:
        if stage.name != "evaluate":  # the one that trains nothing; other runs' tests have it
            stage.work(config)
    return RunDirectory(config.run_dir)


def model_of(finished: RunDirectory, name: str) -> VisionLanguageModel:
    storage, _ = finished.finished(name, "model")
    return VisionLanguageModel.load(storage.fetch("model"))


def test_the_teacher_is_the_language_model_with_eyes(config: RunConfig, finished: RunDirectory) -> None:
    teacher = model_of(finished, "teacher")
    text = teacher.model.config.text_config
    assert (text.model_type, text.num_hidden_layers, text.hidden_size) == ("llama", 2, 576)
    assert text.vocab_size == len(teacher.chat.tokenizer) == 49_154


def test_the_student_starts_from_the_same_weights(config: RunConfig, finished: RunDirectory) -> None:
    assert config.student.architecture.text_base is not None
    base = load_text_base(config.student.architecture.text_base)
    first = config.distill.students[0].stages[0]
    assert first.trainable == ["projector"]
    student = model_of(finished, f"students/student/{first.name}")
    for name, weight in student.text_model.state_dict().items():
        assert torch.equal(weight, base.weights[f"model.{name}"]), name
    teacher = model_of(finished, "teacher")
    assert student.chat.tokenizer_fingerprint == teacher.chat.tokenizer_fingerprint
    for name, weight in teacher.model.model.vision_tower.state_dict().items():
        assert torch.equal(weight, student.model.model.vision_tower.state_dict()[name]), name


def test_the_last_stage_is_a_mixtral_that_was_exported_and_verified(config: RunConfig, finished: RunDirectory) -> None:
    student = model_of(finished, f"students/student/{config.distill.students[0].stages[-1].name}")
    assert student.model.config.text_config.model_type == "mixtral"
    assert list(routers(student)) == [0]
    _, manifest = finished.finished("export", "export")
    assert manifest.details["verified"]["transformers"].startswith("equal")
