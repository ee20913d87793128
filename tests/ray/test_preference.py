"""A sparse student and its preference stage, whose pairs are made on the way."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.distill import StageData, distill, stage_artifact
from pipelines.pairs import pairs_artifact
from sparsight.artifacts import Artifact, RunDirectory
from sparsight.config import RunConfig, UpcycleConfig
from sparsight.distill.start import first_student
from sparsight.model.export import verify_transformers
from sparsight.model.routing import routers
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.observe import read_metrics
from tests.labelled_run import configuration, write_inputs

pytestmark = pytest.mark.usefixtures("ray_cluster")

STEPS = 4
MIMIC = {
    "name": "sparse",
    "upcycle": {"experts": 4, "active_experts": 2},
    "terms": {"forward_kl": 1.0, "balance": 0.01},
    "steps": STEPS,
    "batch_samples": 6,
}
PREFERENCE = {
    "name": "preference",
    "rows": "pairs",
    "trainable": ["projector", "experts", "routers"],
    "terms": {"preference": 1.0, "balance": 0.01},
    "preference": {"loss": "kto_pair"},
    "steps": STEPS,
    "batch_samples": 6,
}


def config_of(folder: Path, **pairs: Any) -> RunConfig:
    """The truth competes, so that random models have something to prefer."""
    settings = configuration(str(folder), MIMIC).model_dump()
    drawn = {"student_candidates": 2, "teacher_candidates": 1, "include_truth": True, "max_answer_tokens": 6}
    settings["pairs"] = {**drawn, **pairs}
    settings["resources"] = {"train_workers": 1, "label_workers": 1}
    settings["distill"]["students"] = [{"name": "student", "stages": [MIMIC, PREFERENCE]}]
    return RunConfig.model_validate(settings)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that a random model stands for, up to its preference stage, and that stage."""
    folder = tmp_path_factory.mktemp("preference")
    write_inputs(str(folder))
    config = config_of(folder)
    [student] = config.distill.students
    mimic = stage_artifact(StageData(config), student, student.stages[0], None)
    mimic.begin()
    dense = first_student(config.student, folder / "teacher/model", seed=1)
    upcycle(dense, UpcycleConfig(experts=4, active_experts=2), seed=2).save(mimic.storage.fetch() / "model")
    mimic.commit()
    distill(config)
    return folder


def manifest_of(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / "students/student" / stage / "manifest.json").read_text())


def test_the_preference_stage_learns_from_pairs_of_the_student_before_it(run_folder: Path) -> None:
    made = json.loads((run_folder / "pairs/student/sparse/manifest.json").read_text())
    learned = manifest_of(run_folder, "preference")
    assert made["inputs"]["student"] == manifest_of(run_folder, "sparse")["fingerprint"]
    assert learned["inputs"]["pairs"] == made["fingerprint"]
    assert learned["counts"]["rows"] == made["counts"]["pairs"] > 0
    rows = read_metrics(run_folder / "students/student/preference/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {"preference", "reward_margin", "reward_accuracy", "chosen_below_teacher", "balance"} <= rows[0].keys()


def test_the_preferring_student_loads_in_plain_transformers(run_folder: Path) -> None:
    directory = run_folder / "students/student/preference/model"
    model = VisionLanguageModel.load(directory)
    assert verify_transformers(model, directory) <= 1e-5
    assert list(routers(model)) == [0]


def test_a_finished_student_is_left_alone_and_other_pairs_would_teach_it_anew(run_folder: Path) -> None:
    stages = ("sparse", "preference")
    weights = [run_folder / "students/student" / stage / "model/model.safetensors" for stage in stages]
    written = [path.stat().st_mtime_ns for path in weights]
    distill(config_of(run_folder))
    assert [path.stat().st_mtime_ns for path in weights] == written
    assert pairs_of(config_of(run_folder)) == manifest_of(run_folder, "preference")["inputs"]["pairs"]
    assert pairs_of(config_of(run_folder, min_margin=0.2)) != pairs_of(config_of(run_folder))


def pairs_of(config: RunConfig) -> str:
    """The fingerprint of the pairs that the finished sparse student answers for."""
    sparse = Artifact(RunDirectory(config.run_dir).storage.child("students/student/sparse"), "model", 1, {}, {})
    finished = sparse.storage.read_bytes("manifest.json")
    sparse.fingerprint = json.loads(finished)["fingerprint"]
    return pairs_artifact(config, config.distill.students[0], sparse).fingerprint
