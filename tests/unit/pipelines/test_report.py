"""What a report may say about training: only what the configuration does."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.report import training_of
from sparsight.config import RunConfig, load

TRUTH: dict[str, Any] = {"cross_entropy": 1.0}
SPARSE: dict[str, Any] = {"name": "sparse", "upcycle": {"experts": 4}, "steps": 5, "terms": TRUTH}
MIMIC: dict[str, Any] = {**SPARSE, "terms": {"forward_kl": 1.0, "cross_entropy": 0.5}}
TINY: dict[str, Any] = {"kind": "tiny", "stages": [{"name": "language", "steps": 5, "terms": TRUTH}]}
TOWER: dict[str, Any] = {"trainable": ["tower", "projector", "text"]}


def facts(
    mimic: dict[str, Any] | None = None,
    sft: dict[str, Any] | None = None,
    teacher: dict[str, Any] | None = None,
    **student: Any,
) -> set[str]:
    """What is true of a run like the demo's with these settings laid over its stages."""
    config = RunConfig.model_validate(
        {
            "run_dir": "run",
            "data": {"sources": [{"kind": "scenes"}]},
            "teacher": teacher or TINY,
            "student": student,
            "distill": {
                "students": [
                    {"name": "student", "stages": [{**MIMIC, **(mimic or {})}]},
                    {"name": "sft_student", "stages": [{**SPARSE, **(sft or {})}]},
                ]
            },
        }
    )
    return true_of(config)


def true_of(config: RunConfig) -> set[str]:
    return {name for name, value in training_of(config).model_dump().items() if value}


ALL = {"shared_tower", "student_sees_signals", "student_sees_answers", "sft_is_twin", "sft_takes_as_many_steps"}


def test_the_demo_is_as_its_report_says() -> None:
    assert true_of(load(Path(__file__).parents[3] / "configs/tiny.yaml")) == ALL
    assert facts() == ALL


@pytest.mark.parametrize(
    ("settings", "untrue"),
    [
        ({"teacher": {"kind": "hugging_face", "path": "x"}}, {"shared_tower"}),
        ({"tower_from_teacher": False}, {"shared_tower"}),
        ({"mimic": TOWER}, {"shared_tower"}),
        ({"sft": TOWER}, {"shared_tower"}),
        ({"teacher": {**TINY, "stages": [{**TINY["stages"][0], **TOWER}]}}, {"shared_tower"}),
        ({"mimic": {"share": 0.5}}, {"student_sees_signals", "student_sees_answers"}),
        ({"mimic": {"rows": "ground_truth"}}, {"student_sees_signals"}),
        ({"mimic": {"terms": {"forward_kl": 1.0}}}, {"student_sees_answers"}),
        ({"sft": {"upcycle": None}}, {"sft_is_twin"}),
        ({"sft": {"terms": MIMIC["terms"]}}, {"sft_is_twin"}),
        ({"sft": {"steps": 6}}, {"sft_takes_as_many_steps"}),
        ({"sft": {"steps": None, "epochs": 1.0}}, {"sft_takes_as_many_steps"}),
        ({"sft": {"name": "other"}}, set()),
    ],
)
def test_another_configuration_says_less(settings: dict[str, Any], untrue: set[str]) -> None:
    assert facts(**settings) == ALL - untrue


def test_epochs_are_no_number_of_steps() -> None:
    epochs = {"steps": None, "epochs": 1.0}
    assert facts(mimic=epochs, sft=epochs) == ALL - {"sft_takes_as_many_steps"}
