"""Verdicts at their edges, and pages that say what the figures say."""

import json
import math
from dataclasses import replace
from io import BytesIO

import pytest
from PIL import Image

from sparsight.data.objects import ObjectVocabulary
from sparsight.evaluate.agreement import Agreement
from sparsight.evaluate.answers import Answer
from sparsight.evaluate.hallucination import hallucination
from sparsight.evaluate.page import headline_table, render
from sparsight.evaluate.plots import accuracy_bars, expert_load, training_curves
from sparsight.evaluate.report import ArtifactRow, Report, Training, verdicts
from sparsight.evaluate.results import Evaluation, ModelResult, baseline_result, figures, paired, set_result, shares
from sparsight.evaluate.scores import Baselines
from sparsight.records import Turn

RIGHT = {"teacher": 95, "student": 93, "sft_student": 80}


def answers(right: int) -> list[Answer]:
    """100 questions on 50 pictures, the first `right` of them answered."""
    references = ["yes" if number % 3 else "no" for number in range(100)]
    return [
        Answer(str(n), str(n // 2), "is it?", reference, reference if n < right else "", "yes_no")
        for n, reference in enumerate(references)
    ]


def seen(right: int) -> list[Answer]:
    """100 descriptions of a red circle, the first `right` of them true, and as many questions of two kinds."""
    said = ["red circle" if number < right else "red circle, blue circle" for number in range(100)]
    described = [Answer(str(n), str(n), "list", "red circle", text, "description") for n, text in enumerate(said)]
    present = [Answer(str(n), str(n), "is it?", "yes", "yes", "pope_present") for n in range(100)]
    return [*described, *present, *(replace(one, reference="no", answer_type="pope_adversarial") for one in present)]


def model(name: str, right: int, activated: int) -> ModelResult:
    agreement = None if name == "teacher" else Agreement(kl_nats=0.25, top1=0.9, positions=200)
    return ModelResult(
        name=name,
        directory=name,
        activated_parameters=activated,
        total_parameters=3000,
        sets={"easy_vqa": set_result(answers(right), agreement), "scenes": set_result(answers(right - 20), agreement)},
        tokens_per_s={1: 50.0, 32: 400.0 if name == "teacher" else 500.0},
        expert_load={"easy_vqa": shares({0: {"text tokens": [10, 30], "answers: yes_no": [1, 1]}})},
        hallucination={name: hallucination(seen(right), ObjectVocabulary.scenes()) for name in ("pope", "coco")},
    )


@pytest.fixture
def report() -> Report:
    blind = Baselines([Turn("is it?", answer, "yes_no") for answer in ("yes", "yes", "no")])
    evaluation = Evaluation(
        headline_set="easy_vqa",
        models={name: model(name, right, 2000 if name == "teacher" else 1500) for name, right in RIGHT.items()},
        baselines={name: baseline_result(blind, answers(0)) for name in ("easy_vqa", "scenes")},
        differences={
            f"student - {other}": paired(answers(RIGHT["student"]), answers(RIGHT[other]))
            for other in ("teacher", "sft_student")
        },
    )
    return Report(
        evaluation=evaluation,
        artifacts=[ArtifactRow(name="signals", kind="signals", counts={"input": 9}, fingerprint="", code_revision="")],
        stage_seconds={"label": 12.5},
        store_figures={
            "signal_bytes_per_token": 99.5,
            "training_questions": 1000.0,
            "ground_truth_questions": 100.0,
        },
        export={"vllm": "not installed"},
        machine="a machine",
        revision="a revision",
    )


def test_figures_have_the_names_that_programs_read(report: Report) -> None:
    found = json.loads(report.to_json())
    assert (found["machine"], found["revision"]) == ("a machine", "a revision")
    figure = found["figures"]
    assert (figure["teacher_accuracy"], figure["student_accuracy"], figure["sft_student_accuracy"]) == (0.95, 0.93, 0.8)
    assert (figure["teacher_activated_parameters"], figure["student_activated_parameters"]) == (2000, 1500)
    assert (figure["majority_accuracy"], figure["student_total_parameters"]) == (0.66, 3000)
    assert (figure["signal_bytes_per_token"], figure["label_wall_s"]) == (99.5, 12.5)
    assert (figure["student_scenes_accuracy"], figure["student_kl_nats"]) == (0.73, 0.25)
    assert (figure["student_speed_vs_teacher_batch_1"], figure["student_speed_vs_teacher_batch_32"]) == (1.0, 1.25)
    assert figure["student_largest_expert_share_layer_0"] == 0.75
    assert figure["student_expert_entropy_layer_0_text_tokens"] == pytest.approx(2 - 0.75 * math.log2(3))
    assert figure["student_expert_entropy_layer_0_answers_yes_no"] == pytest.approx(1.0)
    assert figure["student_minus_teacher"] == pytest.approx(-0.02)
    assert figure["student_minus_teacher_low"] < -0.02 < figure["student_minus_teacher_high"]


def test_hallucination_is_beside_the_teachers(report: Report) -> None:
    figure = report.figures
    assert (figure["teacher_chair_response"], figure["student_chair_response"]) == (0.05, 0.07)
    assert figure["student_chair_object"] == pytest.approx(7 / 107)
    assert (figure["student_chair_recall"], figure["student_chair_mentions_per_answer"]) == (1.0, 1.07)
    assert figure["student_pope_adversarial_f1"] == pytest.approx(2 / 3)
    assert figure["student_coco_chair_response"] == 0.07
    page = render(report)
    for name in ("pope", "coco"):
        section = page.split(f"## Hallucination: {name}\n")[1].split("\n## ")[0]
        rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")]
        assert [row[0] for row in rows[2:5]] == ["| teacher", "| student", "| sft_student"]
        assert [row[1].split()[0] for row in rows[2:5]] == ["5.00%", "7.00%", "20.00%"]
        assert [row[:2] for row in rows[-3:]] == [
            ["| adversarial", "teacher"],
            ["| adversarial", "student"],
            ["| adversarial", "sft_student"],
        ]


def test_figures_about_real_pictures_say_so_where_there_are_no_others(report: Report) -> None:
    models = {
        name: found.model_copy(update={"hallucination": {"coco": found.hallucination["coco"]}})
        for name, found in report.evaluation.models.items()
    }
    figure = figures(report.evaluation.model_copy(update={"models": models}))
    assert figure["student_coco_chair_response"] == 0.07
    assert "student_chair_response" not in figure


def test_a_run_without_such_questions_has_no_such_section(report: Report) -> None:
    models = {name: found.model_copy(update={"hallucination": {}}) for name, found in report.evaluation.models.items()}
    plain = report.model_copy(update={"evaluation": report.evaluation.model_copy(update={"models": models})})
    assert "Hallucination" not in render(plain)


def test_the_page_says_what_the_figures_say(report: Report) -> None:
    page = render(report)
    for text in (
        "93.00%",
        "80.00%",
        "0.2500",
        "99.50",
        "1,500",
        "1.25 × teacher",
        "12.5",
        "not installed",
        "a machine",
    ):
        assert text in page
    assert "93.00%" in headline_table(report.evaluation)


def test_verdicts_follow_the_measured_values(report: Report) -> None:
    assert [verdict.met for verdict in report.verdicts] == [True] * 6
    values = report.figures
    changed = {
        "teacher_accuracy": 0.9299,
        "student_accuracy": 0.80,
        "student_minus_teacher": -0.13,
        "student_activated_parameters": 2000,
        "signal_bytes_per_token": 120.1,
        "ground_truth_questions": 101.0,
    }
    assert [verdict.met for verdict in verdicts(values | changed, Training())] == [False] * 6
    assert "not beyond chance" in verdicts(values | {"student_minus_sft_student_low": -0.001}, Training())[1].measured
    assert [verdict.goal for verdict in verdicts({"student_accuracy": 1.0}, Training())] == []


def section(page: str, title: str) -> str:
    return page.split(f"## {title}\n\n")[1].split("\n\n## ")[0]


def test_the_page_states_no_training_that_the_configuration_does_not_have(report: Report) -> None:
    seen = "What the models have seen"
    assert section(render(report), seen) == (
        "The students' samples hold ground-truth answers to 100 (10.0%) of 1,000 training questions."
    )
    assert report.verdicts[1].goal == "student better than sft_student"
    names = list(Training.model_fields)
    told = [
        section(render(report.model_copy(update={"training": Training.model_validate({name: True})})), seen)
        for name in names
    ]
    assert [name for name, text in zip(names, told, strict=True) if "tower" in text] == ["shared_tower"]
    assert [name for name, text in zip(names, told, strict=True) if "signals" in text] == ["student_sees_signals"]
    assert [name for name, text in zip(names, told, strict=True) if "sft_student" in text] == ["sft_is_twin"]
    whole = report.model_copy(update={"training": Training.model_validate(dict.fromkeys(names, True))})
    assert section(render(whole), seen) == (
        "All models share one vision tower, frozen after it was trained with the answers of all training pictures. "
        "The students' samples hold ground-truth answers to 100 (10.0%) of 1,000 training questions. The first student "
        "learns from the teacher's signals on all training pictures and from those answers. `sft_student` learns from "
        "those answers alone, with as many steps."
    )
    assert whole.verdicts[1].goal == (
        "student better than the same student, on the same frozen tower, trained on the ground-truth answers alone"
    )


def test_a_share_of_nothing_is_no_figure(report: Report) -> None:
    student = report.evaluation.models["student"]
    sets = {name: set_result([], None) if name == "scenes" else found for name, found in student.sets.items()}
    models = report.evaluation.models | {"student": student.model_copy(update={"sets": sets})}
    empty = report.model_copy(update={"evaluation": report.evaluation.model_copy(update={"models": models})})
    found = json.loads(empty.to_json(), parse_constant=pytest.fail)["figures"]
    assert "student_scenes_accuracy" not in found
    assert found["student_accuracy"] == 0.93
    assert Evaluation.model_validate_json(empty.evaluation.model_dump_json()) == empty.evaluation


def test_figures_without_a_teacher(report: Report) -> None:
    students = {name: found for name, found in report.evaluation.models.items() if name != "teacher"}
    alone = report.evaluation.model_copy(update={"models": students, "differences": {}})
    assert not [name for name in figures(alone) if "teacher" in name]
    assert "the teacher" not in render(report.model_copy(update={"evaluation": alone})).splitlines()[2]


def test_plots_are_pictures_wide_enough_to_read(report: Report) -> None:
    load = report.evaluation.models["student"].expert_load["easy_vqa"]
    curves = {"student: dense": {"forward_kl": [(1, 2.0), (2, 1.0)]}, "student: sparse": {"loss": [(1, 0.0)]}}
    drawn = [accuracy_bars(report.evaluation, "scenes"), expert_load(load, "load"), training_curves(curves)]
    for data in drawn:
        with Image.open(BytesIO(data)) as picture:
            assert picture.format == "PNG"
            assert picture.width > 800
            assert len(picture.convert("RGB").getcolors(2**24) or []) > 20


def test_bars_of_many_models_leave_room_for_themselves(report: Report) -> None:
    """A legend wider than the page would leave none, and the plotting library would warn."""
    student = report.evaluation.models["student"]
    many = {f"a_student_of_long_name_{number}": student for number in range(20)}
    drawn = accuracy_bars(report.evaluation.model_copy(update={"models": many}), "scenes")
    with Image.open(BytesIO(drawn)) as picture:
        assert picture.height > 400


def test_answers_about_streams_are_a_table_and_figures(report: Report) -> None:
    assert "Long streams" not in render(report)
    asked = {
        "student/internal": {"past": 0.75, "now": 0.5, "recall": 0.25},
        "student/full": {"past": 0.875, "now": 1.0},
    }
    both = report.model_copy(update={"streams": asked})
    page = render(both)
    assert "| student | internal | 75.0% | 50.0% | 25.0% |" in page
    assert "| student | full | 87.5% | 100.0% | – |" in page
    assert both.figures["streams_student_internal_past"] == 0.75
    assert "streams_student_full_recall" not in both.figures
