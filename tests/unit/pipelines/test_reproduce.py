"""A reproduction: a run a seed, and pages that keep what people wrote into them."""

import json
from pathlib import Path

import pytest

from pipelines.reproduce import Origin, main, seed_configs, write_pages
from pipelines.study_llava_kd import LLAVA_KD
from pipelines.study_llava_mod import LLAVA_MOD
from sparsight.config import RunConfig, StudentRun, load
from sparsight.evaluate.reproduction_page import READING_ENDS, READING_STARTS
from sparsight.model.parameters import activated_parameters, group_of, total_parameters
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel

ORIGIN = Origin(["a machine"], ["abc", "def"])
MOD = Path(__file__).parents[3] / "configs" / "mod.yaml"


SIZES = {"activated_parameters": 10.0, "total_parameters": 20.0}


def seed(shift: float) -> dict[str, dict[str, float]]:
    """Values of one seed, as if three models had been evaluated."""
    chair = {"chair_response": 0.2 + shift, "chair_object": 0.1, "chair_recall": 0.5}
    better = {"chair_response": 0.1 + shift, "chair_object": 0.05, "chair_recall": 0.5}
    return {
        "teacher": {"accuracy": 0.9, **chair, **SIZES},
        "mimic": {"accuracy": 0.8 + shift, **chair, **SIZES},
        "sft": {"accuracy": 0.6, **chair, **SIZES},
        "preference": {"accuracy": 0.79 + shift, **better, **SIZES},
    }


def test_every_seed_has_a_folder_of_its_own() -> None:
    first, second = seed_configs(load(MOD, ["run_dir=out/mod/", "seed=5"]), 2)
    assert (first.seed, first.run_dir) == (5, "out/mod/seed-5")
    assert (second.seed, second.run_dir) == (6, "out/mod/seed-6")
    assert second == load(MOD, ["run_dir=out/mod/seed-6", "seed=6"])


def test_the_figures_are_means_over_seeds_with_intervals(tmp_path: Path) -> None:
    write_pages(LLAVA_MOD, [seed(0.0), seed(0.01), seed(0.02)], [ORIGIN] * 3, tmp_path)
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
    write_pages(LLAVA_MOD, [seed(0.0), seed(0.01)], [ORIGIN] * 2, tmp_path)
    page = tmp_path / "llava-mod.md"
    words = "Mimic is better, because it sees every picture."
    page.write_text(page.read_text().replace(f"{READING_STARTS}\n\n", f"{READING_STARTS}\n{words}\n"))
    assert words in page.read_text()
    write_pages(LLAVA_MOD, [seed(0.0), seed(0.05)], [ORIGIN] * 2, tmp_path)
    assert words in page.read_text().partition(READING_STARTS)[2].partition(READING_ENDS)[0]
    assert "2 seeds" in page.read_text()


def test_the_plan_of_a_dry_run_names_the_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "--study",
                "llava-mod",
                "--config",
                str(MOD),
                "--seeds",
                "2",
                "--out",
                "out",
                "--set",
                "seed=5",
                "--dry-run",
            ]
        )
        == 0
    )
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
    assert main(["--study", "llava-mod", "--config", str(MOD), "--set", override, *place]) == 2
    assert "the configuration lacks: sft" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_seed_at_all_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--study", "llava-mod", "--config", str(MOD), "--seeds", "0", "--out", str(tmp_path)]) == 2
    assert "at least one seed" in capsys.readouterr().err


def test_a_damaged_page_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "llava-mod.md").write_text("# A page without marks\n")
    assert (
        main(
            [
                "--study",
                "llava-mod",
                "--config",
                str(MOD),
                "--set",
                f"run_dir={tmp_path / 'run'}",
                "--out",
                str(tmp_path),
            ]
        )
        == 2
    )
    assert "llava-mod.md" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["llava-mod.md"]


def test_the_dense_students_are_as_large_as_the_sparse_one() -> None:
    """But for the routers, which dense students lack."""
    config = load(MOD)
    sparse = untrained(config, "mimic")
    routers = sum(weight.numel() for name, weight in sparse.model.named_parameters() if group_of(name) == "routers")
    assert activated_parameters(sparse) - routers == total_parameters(untrained(config, "dense_activated"))
    assert total_parameters(sparse) - routers == total_parameters(untrained(config, "dense_total"))


def test_llava_kds_figures_hold_the_combined_preset_against_the_better_paper(tmp_path: Path) -> None:
    values = {"llava_mod": 0.6, "dpt_sft_dft": 0.7, "sparsight": 0.75, "pt_sft": 0.5, "dft_full": 0.705}
    seeds = [
        {name: {"accuracy": value + shift, **SIZES} for name, value in values.items()}
        | {"teacher": {"accuracy": 0.9, "signal_bytes_per_token": 45.0, **SIZES}}
        for shift in (0.0, 0.02)
    ]
    write_pages(LLAVA_KD, seeds, [ORIGIN] * 2, tmp_path)
    figures = json.loads((tmp_path / "llava-kd.json").read_text())["figures"]
    assert figures["seeds"] == 2
    assert figures["dpt_sft_dft_minus_pt_sft"] == pytest.approx(0.2)
    assert figures["dpt_sft_dft_minus_pt_sft_ci_low"] == pytest.approx(0.2)
    assert figures["combined_minus_best_preset"] == pytest.approx(0.05)
    assert figures["unbiased_bytes_per_token"] == 45.0
    assert figures["unbiased_accuracy_drop"] == pytest.approx(0.005)


def test_the_configurations_have_every_model_that_is_compared() -> None:
    for study, name in ((LLAVA_MOD, "mod"), (LLAVA_KD, "kd")):
        students = {student.name for student in load(MOD.with_name(f"{name}.yaml")).distill.students}
        assert study.models <= students | {"teacher"}


def test_llava_kds_students_activate_as_many_weights_and_take_as_many_steps() -> None:
    config = load(MOD.with_name("kd.yaml"))
    dense, sparse = untrained(config, "base"), untrained(config, "llava_mod")
    routers = sum(weight.numel() for name, weight in sparse.model.named_parameters() if group_of(name) == "routers")
    assert activated_parameters(sparse) - routers == total_parameters(dense)
    taken = {
        name: steps_of(config, name)
        for name in ("dpt_sft_dft", "dpt_dft", "pt_sft_sft", "few", "llava_mod", "sparsight")
    }
    assert len(set(taken.values())) == 1


def test_llava_kds_students_are_the_presets_that_they_are_called_after() -> None:
    """Trainable sets, terms and up-cycling, without a preference stage and the first, which no preset has."""
    config = load(MOD.with_name("kd.yaml"))
    for name, preset in (("dpt_sft_dft", "llava_kd"), ("llava_mod", "llava_mod"), ("sparsight", "sparsight")):
        ours = next(it for it in config.distill.students if it.name == name).stages
        theirs = StudentRun.model_validate({"name": name, "preset": preset}).stages[: len(ours)]
        for one, other in zip(ours, theirs, strict=True):
            assert (one.name, one.terms, one.upcycle) == (other.name, other.terms, other.upcycle)
            assert set(one.trainable) == set(other.trainable)


def steps_of(config: RunConfig, name: str) -> int:
    """Steps of a student, with those of the students that it starts from."""
    student = next(it for it in config.distill.students if it.name == name)
    own = sum(stage.steps or 0 for stage in student.stages)
    if student.start is None:
        return own
    before, last = student.start.split("/")
    earlier = next(it for it in config.distill.students if it.name == before)
    names = [stage.name for stage in earlier.stages]
    later = sum(stage.steps or 0 for stage in earlier.stages[names.index(last) + 1 :])
    return own + steps_of(config, before) - later


def untrained(config: RunConfig, name: str) -> VisionLanguageModel:
    """An untrained student in the shape that it has at the end."""
    student = next(it for it in config.distill.students if it.name == name)
    first = student
    while first.start is not None:
        first = next(it for it in config.distill.students if it.name == first.start.split("/")[0])
    architecture = config.student.architecture
    if first.text_intermediate is not None:
        architecture = architecture.model_copy(update={"text_intermediate": first.text_intermediate})
    model = make_dense(architecture, make_tokenizer(["is there a red circle?"] * 20, 300), config.seed)
    for stage in student.stages:
        if stage.upcycle is not None:
            model = upcycle(model, stage.upcycle, config.seed)
    return model
