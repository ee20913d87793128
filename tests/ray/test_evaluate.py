"""Evaluation and export over a run's artefacts: the same numbers as in one process, and pages that agree."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipelines.evaluate import evaluate
from pipelines.export import export
from pipelines.prepare import prepare
from sparsight import layout
from sparsight.artifacts import RunDirectory, read_manifest
from sparsight.config import ArchitectureConfig, RunConfig, UpcycleConfig
from sparsight.data.samples import read_samples
from sparsight.distill.telemetry import routing_metrics
from sparsight.errors import ArtifactError
from sparsight.evaluate.answers import Examiner
from sparsight.evaluate.scores import score
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.observe import MetricsWriter

SMALL = ArchitectureConfig(
    tower_layers=1,
    tower_width=32,
    tower_heads=1,
    text_layers=2,
    text_width=64,
    text_heads=2,
    text_key_value_heads=1,
    text_intermediate=96,
)
STAGE = {"name": "only", "terms": {"cross_entropy": 1.0}, "steps": 1}
PAIRS_LEE = torch.eye(4)[None] * 2 + 1  # six tokens, a pair of experts each


def annotated_pictures(folder: Path) -> dict[str, str]:
    """Three pictures with COCO-style annotations, as a source."""
    for number in range(3):
        Image.new("RGB", (48, 32), (40 * number, 90, 90)).save(folder / f"{number}.png")
    content = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(3)],
        "annotations": [{"image_id": number, "category_id": number} for number in range(3)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(("dog", "hot dog", "apple"))],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    return {"kind": "coco", "annotations": str(folder / "instances.json"), "pictures": str(folder)}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    scenes = {"kind": "scenes", "pictures": 10, "test_pictures": 6}
    coco = annotated_pictures(tmp_path_factory.mktemp("coco"))
    students = [{"name": "small", "stages": [STAGE]}, {"name": "sft_student", "stages": [STAGE]}]
    return RunConfig.model_validate(
        {
            "run_dir": str(tmp_path_factory.mktemp("run")),
            "data": {
                "sources": [{"kind": "easy_vqa", "limit": 12}, scenes, coco],
                "hallucination": {"questions": 1},
                "validation_fraction": 0.3,
            },
            "teacher": {"kind": "tiny", "stages": [STAGE]},
            "distill": {"students": students},
            "evaluate": {"batch_samples": 32, "max_answer_tokens": 3},
        }
    )


@pytest.fixture(scope="module")
def models(config: RunConfig) -> dict[str, VisionLanguageModel]:
    """A run with samples and untrained models in place of trained ones."""
    prepare(config)
    run = RunDirectory(config.run_dir)
    samples = read_samples(run.storage.child("samples/teacher"))
    tokenizer = make_tokenizer([f"{turn.question} {turn.answer}" for row in samples for turn in row.turns], 400)
    teacher = make_dense(SMALL, tokenizer, seed=0)
    found = {
        "teacher": teacher,
        "students/small/only": upcycle(make_dense(SMALL, tokenizer, seed=1), UpcycleConfig(layers=[1]), seed=2),
        "students/sft_student/only": teacher,
    }
    for name, model in found.items():
        artifact = run.artifact(name, "model", 1, {"name": name})
        artifact.begin()
        model.save(Path(artifact.storage.uri) / layout.MODEL)
        with MetricsWriter(Path(artifact.storage.uri), tensorboard=False) as writer:
            routing = routing_metrics(PAIRS_LEE, [1], pairs=True) if "small" in name else {}
            for step in range(1, 30):
                writer.write(step, {"loss": 4.0 / step, "cross_entropy": 3.0 / step, **routing})
        artifact.commit()
    return found


@pytest.fixture(scope="module")
def report(config: RunConfig, models: dict[str, VisionLanguageModel], ray_cluster: None) -> Path:
    export(config)
    evaluate(config)
    return Path(config.run_dir) / "report"


def figures_of(report: Path) -> dict[str, float]:
    return json.loads((report / "report.json").read_text())["figures"]


def test_predictions_equal_those_of_one_process(
    config: RunConfig, models: dict[str, VisionLanguageModel], report: Path
) -> None:
    table = pq.read_table(Path(config.run_dir) / "evaluation" / "predictions.parquet").to_pylist()
    roles = {"teacher": "teacher", "student": "students/small/only", "sft_student": "students/sft_student/only"}
    for test_set in ("easy_vqa", "scenes", "pope", "coco"):
        samples = read_samples(RunDirectory(config.run_dir).storage.child(f"samples/test_{test_set}"))
        for role, name in roles.items():
            expected = Examiner(models[name], 32, 3).examine(samples).answers
            rows = [row for row in table if (row["model"], row["test_set"]) == (role, test_set)]
            told = [(row["id"], row["answer"], row["correct"]) for row in rows]
            assert told == [(answer.id, answer.answer, answer.correct) for answer in expected]


def test_the_report_has_the_figures_that_programs_read(report: Path) -> None:
    figures = figures_of(report)
    assert figures.keys() >= {
        "teacher_accuracy",
        "student_accuracy",
        "sft_student_accuracy",
        "majority_accuracy",
        "question_only_accuracy",
        "teacher_activated_parameters",
        "student_activated_parameters",
        "student_total_parameters",
        "student_scenes_accuracy",
        "student_kl_nats",
        "student_tokens_per_s_batch_32",
        "student_speed_vs_teacher_batch_1",
        "student_largest_expert_share_layer_1",
        "teacher_chair_response",
        "student_chair_recall",
        "sft_student_pope_adversarial_f1",
        "student_coco_chair_response",
    }
    assert not any("pope_accuracy" in name or "coco_accuracy" in name for name in figures)  # nothing to be right about
    assert figures["student_activated_parameters"] < figures["student_total_parameters"]
    assert 0.0 < figures["majority_accuracy"] <= figures["question_only_accuracy"] <= 1.0
    assert json.loads((report / "report.json").read_text()).keys() >= {"figures", "machine", "revision"}


def test_a_student_equal_to_the_teacher_agrees_with_it(report: Path) -> None:
    figures = figures_of(report)
    assert figures["sft_student_top1_agreement"] == 1.0
    assert abs(figures["sft_student_kl_nats"]) < 1e-6 < figures["student_kl_nats"]
    assert figures["sft_student_accuracy"] == figures["teacher_accuracy"]


def test_page_figures_and_pictures_agree(config: RunConfig, report: Path) -> None:
    page, figures = (report / "report.md").read_text(), figures_of(report)
    assert f"{figures['majority_accuracy']:.2%}" in page
    assert f"{figures['student_total_parameters']:,.0f}" in page
    assert "`samples/student`" in page
    assert page.index("## Hallucination: pope") < page.index("## Hallucination: coco")
    assert "equal, largest log-prob difference" in page
    shown = [line.split("(")[1].rstrip(")") for line in page.splitlines() if line.startswith("![")]
    routing = {"experts_student.png", "routing_small.png", "together_small.png"}
    assert {"accuracy_easy_vqa.png", "accuracy_scenes.png", "training.png", *routing} == set(shown)
    for name in shown:
        with Image.open(report / name) as picture:
            assert picture.width > 600
            assert len(picture.convert("RGB").getcolors(2**24) or []) > 20
    assert read_manifest(RunDirectory(config.run_dir).storage.child("report"), "report").figures == figures


def test_accuracies_are_the_scores_of_the_predictions(
    config: RunConfig, models: dict[str, VisionLanguageModel], report: Path
) -> None:
    samples = read_samples(RunDirectory(config.run_dir).storage.child("samples/test_easy_vqa"))
    whole, kinds = score(Examiner(models["teacher"], 16, 3).examine(samples).answers)
    figures = figures_of(report)
    assert figures["teacher_accuracy"] == whole.value
    assert {kind: figures[f"teacher_{kind}_accuracy"] for kind in kinds} == {
        kind: share.value for kind, share in kinds.items()
    }


def test_finished_artefacts_are_left_alone(config: RunConfig, report: Path) -> None:
    run = Path(config.run_dir)
    stages = ("evaluation", "report", "export")
    before = {name: (run / name / "manifest.json").stat().st_mtime_ns for name in stages}
    export(config)
    evaluate(config)
    assert {name: (run / name / "manifest.json").stat().st_mtime_ns for name in stages} == before


def test_the_report_is_written_again_when_a_stage_took_another_time(config: RunConfig, report: Path) -> None:
    evaluation = (report.parent / "evaluation/manifest.json").stat().st_mtime_ns
    for seconds in (12.5, 37.25):
        (report.parent / "times.json").write_text(json.dumps({"label": seconds}))
        evaluate(config)
        assert figures_of(report)["label_wall_s"] == seconds
        assert f"| label | {seconds:,.1f} |" in (report / "report.md").read_text()
    assert (report.parent / "evaluation/manifest.json").stat().st_mtime_ns == evaluation


def test_validation_pictures_are_scored_into_artefacts_of_their_own(
    config: RunConfig, models: dict[str, VisionLanguageModel], report: Path
) -> None:
    run = Path(config.run_dir)
    evaluate(config)
    manifests = [run / name / "manifest.json" for name in ("evaluation", "report")]
    before = [path.stat().st_mtime_ns for path in manifests]
    evaluate(config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"sets": "validation"})}))
    evaluate(config)
    assert [path.stat().st_mtime_ns for path in manifests] == before
    samples = read_samples(RunDirectory(config.run_dir).storage.child("samples/validation"))
    figures = figures_of(run / "validation/report")
    for name, figure in (("easy_vqa", "student_accuracy"), ("scenes", "student_validation_scenes_accuracy")):
        own = [sample for sample in samples if sample.source == name]
        whole, _ = score(Examiner(models["students/small/only"], 16, 3).examine(own).answers)
        assert figures[figure] == whole.value
    page = (run / "validation/report/report.md").read_text()
    assert "## Result on validation_easy_vqa" in page
    assert "Hallucination" not in page


def test_the_export_is_a_model_that_serving_can_load(config: RunConfig, report: Path) -> None:
    storage, manifest = RunDirectory(config.run_dir).finished("export", "export")
    model = VisionLanguageModel.load(storage.fetch(layout.MODEL))
    assert model.model.config.text_config.model_type == "qwen3_moe"
    assert set(manifest.details["verified"]) == {"transformers", "vllm"}


def test_a_run_without_models_is_refused(tmp_path: Path, config: RunConfig) -> None:
    empty = config.model_copy(update={"run_dir": str(tmp_path)})
    for stage in (evaluate, export):
        with pytest.raises(ArtifactError, match="run its stage first"):
            stage(empty)
    assert not list(tmp_path.rglob("manifest.json"))
