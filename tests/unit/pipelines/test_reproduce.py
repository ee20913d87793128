"""A reproduction: a run a seed, and pages that keep what people wrote into them."""

import json
from pathlib import Path

import pytest

from pipelines.reproduce import Origin, main, seed_configs, write_pages
from sparsight.config import RunConfig, load
from sparsight.evaluate.reproduction_page import READING_ENDS, READING_STARTS
from sparsight.model.parameters import activated_parameters, group_of, total_parameters
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel

ORIGIN = Origin(["a machine"], ["abc", "def"])
MOD = Path(__file__).parents[3] / "configs" / "mod.yaml"


def seed(shift: float) -> dict[str, dict[str, float]]:
    """Values of one seed, as if three models had been evaluated."""
    sizes = {"activated_parameters": 10.0, "total_parameters": 20.0}
    chair = {"chair_response": 0.2 + shift, "chair_object": 0.1, "chair_recall": 0.5}
    better = {"chair_response": 0.1 + shift, "chair_object": 0.05, "chair_recall": 0.5}
    return {
        "teacher": {"accuracy": 0.9, **chair, **sizes},
        "mimic": {"accuracy": 0.8 + shift, **chair, **sizes},
        "sft": {"accuracy": 0.6, **chair, **sizes},
        "preference": {"accuracy": 0.79 + shift, **better, **sizes},
    }


def test_every_seed_has_a_folder_of_its_own() -> None:
    first, second = seed_configs(load(MOD, ["run_dir=out/mod/", "seed=5"]), 2)
    assert (first.seed, first.run_dir) == (5, "out/mod/seed-5")
    assert (second.seed, second.run_dir) == (6, "out/mod/seed-6")
    assert second == load(MOD, ["run_dir=out/mod/seed-6", "seed=6"])


def test_the_figures_are_means_over_seeds_with_intervals(tmp_path: Path) -> None:
    write_pages([seed(0.0), seed(0.01), seed(0.02)], [ORIGIN] * 3, tmp_path)
    written = json.loads((tmp_path / "llava-mod.json").read_text())
    assert (written["machine"], written["revision"]) == ("a machine", "abc, def")
    figures = written["figures"]
    assert figures["seeds"] == 3
    assert figures["mimic_minus_sft"] == pytest.approx(0.21)
    half = 4.303 * 0.01 / 3**0.5
    assert figures["mimic_minus_sft_ci_low"] == pytest.approx(0.21 - half)
    assert figures["chair_response_teacher"] == pytest.approx(0.21)
    assert figures["chair_response_before"] == pytest.approx(0.21)
    assert figures["chair_response_after"] == pytest.approx(0.11)
    assert figures["chair_object_after"] == pytest.approx(0.05)
    assert figures["accuracy_before"] - figures["accuracy_after"] == pytest.approx(0.01)
    assert "d2d_d2s_minus_d2s" not in figures  # no seed has that model


def test_what_people_wrote_stays_when_the_page_is_written_again(tmp_path: Path) -> None:
    write_pages([seed(0.0), seed(0.01)], [ORIGIN] * 2, tmp_path)
    page = tmp_path / "llava-mod.md"
    words = "Mimic is better, because it sees every picture."
    page.write_text(page.read_text().replace(f"{READING_STARTS}\n\n", f"{READING_STARTS}\n{words}\n"))
    assert words in page.read_text()
    write_pages([seed(0.0), seed(0.05)], [ORIGIN] * 2, tmp_path)
    assert words in page.read_text().partition(READING_STARTS)[2].partition(READING_ENDS)[0]
    assert "2 seeds" in page.read_text()


def test_the_plan_of_a_dry_run_names_the_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(MOD), "--seeds", "2", "--out", "out", "--set", "seed=5", "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith(
        "# run seed 5 in 'runs/reproduce-mod/seed-5'\n# run seed 6 in 'runs/reproduce-mod/seed-6'\n"
    )


def test_a_configuration_without_a_compared_student_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    students = load(MOD).distill.students
    kept = [student.model_dump(mode="json") for student in students if student.name != "sft"]
    override = f"distill.students={json.dumps(kept)}"
    place = ["--set", f"run_dir={tmp_path / 'run'}", "--out", str(tmp_path / "out")]
    assert main(["--config", str(MOD), "--set", override, *place]) == 2
    assert "distill.students lacks: sft" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_seed_at_all_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--config", str(MOD), "--seeds", "0", "--out", str(tmp_path)]) == 2
    assert "at least one seed" in capsys.readouterr().err


def test_a_damaged_page_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "llava-mod.md").write_text("# A page without marks\n")
    assert main(["--config", str(MOD), "--set", f"run_dir={tmp_path / 'run'}", "--out", str(tmp_path)]) == 2
    assert "llava-mod.md" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["llava-mod.md"]


def test_the_dense_students_are_as_large_as_the_sparse_one() -> None:
    """But for the routers, which dense students lack."""
    config = load(MOD)
    sparse = untrained(config, "mimic")
    routers = sum(weight.numel() for name, weight in sparse.model.named_parameters() if group_of(name) == "routers")
    assert activated_parameters(sparse) - routers == total_parameters(untrained(config, "dense_activated"))
    assert total_parameters(sparse) - routers == total_parameters(untrained(config, "dense_total"))


def untrained(config: RunConfig, name: str) -> VisionLanguageModel:
    """An untrained student in the shape that it has at the end."""
    student = next(it for it in config.distill.students if it.name == name)
    architecture = config.student.architecture
    if student.text_intermediate is not None:
        architecture = architecture.model_copy(update={"text_intermediate": student.text_intermediate})
    model = make_dense(architecture, make_tokenizer(["is there a red circle?"] * 20, 300), config.seed)
    for stage in student.stages:
        if stage.upcycle is not None:
            model = upcycle(model, stage.upcycle, config.seed)
    return model
