"""Pair making on Ray Data: every question accounted for, the same pairs after kills, none about a picture of a test."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.pairs import FinishedStage, main, make_pairs, pairs, pictures_of_pairs
from pipelines.prepare import prepare
from sparsight.artifacts import MANIFEST, Manifest, RunDirectory
from sparsight.config import ArchitectureConfig, RunConfig, UpcycleConfig, dump
from sparsight.data.pairs import DROPPED_SCHEMA, read_pairs
from sparsight.data.prompts import iter_prompts
from sparsight.data.samples import read_samples, write_samples
from sparsight.errors import ArtifactError, ConfigError
from sparsight.media.images import decode
from sparsight.media.pixels import to_pixels
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import PreferencePair, Sample, Turn
from tests.quarantine import read_quarantine
from tests.ray.processes import kill_driver

pytestmark = pytest.mark.usefixtures("ray_cluster")

WORDS = "is there a red blue green circle rectangle triangle in the image what how many shapes are yes no one two three"
ARCHITECTURE = ArchitectureConfig(
    picture_pixels=32,
    tower_width=32,
    tower_layers=1,
    tower_heads=2,
    text_width=64,
    text_layers=2,
    text_heads=2,
    initializer_range=0.2,
)
PAIRS: dict[str, Any] = {
    "judge": "likelihood",
    "student_candidates": 2,
    "teacher_candidates": 1,
    "temperature": 1.5,
    "max_answer_tokens": 4,
    "min_margin": 1.0,
    "answer_types": ["existence", "count"],
    "rows_per_file": 4,
}
PLACE = "pairs/student/d2s"


def run_config(run_dir: Path, workers: int = 1, **settings: Any) -> RunConfig:
    stage = {"name": "d2s", "terms": {"cross_entropy": 1.0}, "steps": 1}
    preference = {"name": "preference", "rows": "pairs", "terms": {"preference": 1.0}, "preference": {}, "steps": 1}
    return RunConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "data": {
                "sources": [
                    {"kind": "scenes", "pictures": 44, "test_pictures": 4, "pair_pictures": 5, "size_pixels": 32}
                ],
                "validation_fraction": 0.2,
            },
            "teacher": {"kind": "tiny", "stages": [stage]},
            "distill": {"students": [{"name": "student", "stages": [stage, preference]}]},
            "pairs": {**PAIRS, **settings},
            "resources": {"label_workers": workers},
        }
    )


def put_model(run_dir: Path, name: str, model: VisionLanguageModel) -> None:
    artifact = RunDirectory(str(run_dir)).artifact(name, "model", 1, {})
    artifact.begin()
    model.save(artifact.storage.fetch() / "model")
    artifact.commit()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared samples, of which one has a broken picture and one a test's, a random teacher and a random sparse
    student."""
    run_dir = tmp_path_factory.mktemp("inputs")
    prepare(run_config(run_dir))
    run = RunDirectory(str(run_dir))
    samples = read_samples(run.finished("samples/student")[0])
    broken = Sample("broken", (b"no picture",), (Turn("is there a red circle?", "no", "existence"),), "scenes")
    artifact = run.artifact("samples/student", "samples", 1, {})
    artifact.begin()
    tested = replace(read_samples(run.finished("samples/test_scenes")[0])[0], id="tested", turns=broken.turns)
    write_samples(artifact.storage, [*samples, broken, tested])
    artifact.commit()
    teacher = make_dense(ARCHITECTURE, make_tokenizer([WORDS] * 4, 320), seed=0)
    put_model(run_dir, "teacher", teacher)
    dense = make_dense(ARCHITECTURE, teacher.chat.tokenizer, seed=1)
    put_model(run_dir, "students/student/d2s", upcycle(dense, UpcycleConfig(), seed=2))
    return run_dir


@pytest.fixture(scope="module")
def whole_run(inputs: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one worker with large batches."""
    run_dir = tmp_path_factory.mktemp("whole")
    shutil.copytree(inputs, run_dir, dirs_exist_ok=True)
    pairs(run_config(run_dir, batch_prompts=16))
    return run_dir


def pairs_of(run_dir: Path, place: str = PLACE) -> tuple[list[PreferencePair], Manifest]:
    storage, manifest = RunDirectory(str(run_dir)).finished(place, "pairs")
    return read_pairs(storage), manifest


def dropped_of(run_dir: Path) -> list[dict[str, Any]]:
    return pq.read_table(run_dir / PLACE / "dropped.parquet", schema=DROPPED_SCHEMA).to_pylist()


def test_every_question_is_accounted_for(whole_run: Path) -> None:
    rows, manifest = pairs_of(whole_run)
    storage, _ = RunDirectory(str(whole_run)).finished("samples/student")
    prompts = list(iter_prompts(storage))
    asked = [prompt.id for prompt in prompts if prompt.answer_type in PAIRS["answer_types"] and prompt.id != "tested#0"]
    counts, dropped = manifest.counts, dropped_of(whole_run)
    assert counts["input"] == len(prompts)
    assert counts["skipped"] == len(prompts) - len(asked)
    assert len(asked) == counts["pairs"] + counts["dropped"] + counts["quarantined"]
    assert counts["pairs"] == len(rows) > 20
    assert counts["dropped"] == len(dropped) == counts["dropped_margin"] + counts["dropped_alike"] > 0
    assert counts["dropped_unrated"] == counts["unrated_candidates"] == 0
    refused = read_quarantine(RunDirectory(str(whole_run)).finished(PLACE)[0])
    assert [(row.id, row.source) for row in refused] == [("broken#0", "scenes")]
    assert sorted([*(row.id for row in rows), *(row["id"] for row in dropped), "broken#0"]) == sorted(asked)
    assert {pair.judge for pair in rows} == {manifest.details["judge"]} == {"likelihood"}
    assert all(pair.margin >= PAIRS["min_margin"] for pair in rows)
    assert manifest.details["samples"] == pictures_of_pairs(run_config(whole_run)) == "samples/student"
    assert {"tokenizer_fingerprint", "teacher_fingerprint", "vocabulary"} <= set(manifest.details)


def test_no_pair_shows_a_picture_of_validation_or_tests(whole_run: Path) -> None:
    run = RunDirectory(str(whole_run))
    shown = {pair.content_hash for pair in pairs_of(whole_run)[0]}
    held_out = {
        sample.content_hash
        for name in ("validation", "test_scenes")
        for sample in read_samples(run.finished(f"samples/{name}")[0])
    }
    assert len(held_out) > 8
    assert shown
    assert not shown & held_out
    assert shown <= {sample.content_hash for sample in read_samples(run.finished("samples/student")[0])}


def test_pairs_about_kept_pictures_show_nothing_else(inputs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(inputs, run_dir)
    config = run_config(run_dir, samples="kept", judge="truth", include_truth=True)
    pairs(config)
    rows, manifest = pairs_of(run_dir)
    kept = read_samples(RunDirectory(str(run_dir)).finished("samples/kept")[0])
    assert rows
    assert {pair.content_hash for pair in rows} <= {sample.content_hash for sample in kept}
    assert manifest.counts["input"] == sum(len(sample.turns) for sample in kept)
    assert manifest.details["samples"] == pictures_of_pairs(config) == "samples/kept"


def test_stored_log_probs_are_the_live_teachers(whole_run: Path) -> None:
    run = RunDirectory(str(whole_run))
    samples = {sample.content_hash: sample for sample in read_samples(run.finished("samples/student")[0])}
    teacher = VisionLanguageModel.load(whole_run / "teacher" / "model")
    for pair in pairs_of(whole_run)[0][::5]:
        pixels = to_pixels([decode(samples[pair.content_hash].frames[0])], teacher.pixels)[None]
        for answer, stored in (
            (pair.chosen, pair.teacher_chosen_logprob),
            (pair.rejected, pair.teacher_rejected_logprob),
        ):
            chat = teacher.chat.encode([Turn(pair.question, answer)], pair.visual_tokens)
            with torch.inference_mode():
                logits = teacher.model(input_ids=torch.tensor([chat.input_ids]), pixel_values_videos=pixels).logits[0]
            logprobs_TV = logits.double().log_softmax(dim=-1)
            live = sum(float(logprobs_TV[at - 1, chat.input_ids[at]]) for at in chat.response_positions_n)
            assert stored == pytest.approx(live, abs=1e-4)


def assert_same_pairs(run_dir: Path, whole_run: Path) -> None:
    """The same rows, up to rounding: batches differ in size and padding."""
    ours, manifest = pairs_of(run_dir)
    theirs, whole_manifest = pairs_of(whole_run)
    assert manifest.counts == whole_manifest.counts
    assert dropped_of(run_dir) == dropped_of(whole_run)
    assert [without_numbers(pair) for pair in ours] == [without_numbers(pair) for pair in theirs]
    for pair, whole in zip(ours, theirs, strict=True):
        for name in ("margin", "teacher_chosen_logprob", "teacher_rejected_logprob"):
            assert getattr(pair, name) == pytest.approx(getattr(whole, name), abs=1e-4)


def without_numbers(pair: PreferencePair) -> PreferencePair:
    candidates = tuple(replace(candidate, score=0.0) for candidate in pair.candidates)
    return replace(pair, candidates=candidates, margin=0.0, teacher_chosen_logprob=0.0, teacher_rejected_logprob=0.0)


def test_a_killed_driver_changes_nothing(inputs: Path, whole_run: Path, tmp_path: Path) -> None:
    """The driver is killed with its cluster; the same command continues, with other workers and batches."""
    run_dir = tmp_path / "run"
    shutil.copytree(inputs, run_dir)
    config = run_config(run_dir, workers=2, batch_prompts=2)
    (tmp_path / "config.yaml").write_text(dump(run_config(run_dir, batch_prompts=2)))
    kill_driver("pipelines.pairs", tmp_path / "config.yaml", lambda: files_of(run_dir), "the first file")
    assert not (run_dir / PLACE / MANIFEST).exists()
    left = {path: path.stat().st_mtime_ns for path in files_of(run_dir)}
    assert 0 < len(left) < len(files_of(whole_run)), "pair making was over before the kill"
    pairs(config)
    assert all(path.stat().st_mtime_ns == made for path, made in left.items()), "pairs that were there were made again"
    assert_same_pairs(run_dir, whole_run)


def files_of(run_dir: Path) -> list[Path]:
    return sorted((run_dir / PLACE).glob("part-*.parquet"))


def test_finished_pairs_are_left_alone_and_shared(whole_run: Path) -> None:
    config = run_config(whole_run, batch_prompts=16)
    before = (whole_run / PLACE / MANIFEST).stat().st_mtime_ns
    storage, manifest = RunDirectory(str(whole_run)).finished("students/student/d2s")
    other = config.distill.students[0].model_copy(update={"name": "other"})
    _, found = make_pairs(config, other, FinishedStage(storage, manifest.fingerprint))
    assert found.kind == "pairs"
    assert (whole_run / PLACE / MANIFEST).stat().st_mtime_ns == before


def imported_rows(samples: list[Sample], taken: Sample) -> Iterator[dict[str, Any]]:
    for sample in [*samples[:12], taken]:
        question = sample.turns[0].question
        image = {"bytes": sample.frames[0], "path": "x.png"}
        yield {"question": question, "chosen": "one red circle", "rejected": "no shapes", "image": image}
    yield {"question": "what?", "chosen": "red", "rejected": "blue", "image": {"bytes": b"no picture", "path": None}}


def test_imported_pairs_are_scored_and_none_is_about_a_held_out_picture(
    inputs: Path, ray_cluster: None, tmp_path: Path
) -> None:
    shutil.copytree(inputs, tmp_path / "run")
    run = RunDirectory(str(tmp_path / "run"))
    samples = read_samples(run.finished("samples/student")[0])
    (taken, *_) = read_samples(run.finished("samples/test_scenes")[0])
    rows = list(imported_rows(samples, taken))
    (tmp_path / "parts").mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:8]), tmp_path / "parts" / "part_0.parquet")
    pq.write_table(pa.Table.from_pylist(rows[8:]), tmp_path / "parts" / "part_1.parquet")
    config = run_config(tmp_path / "run", import_path=str(tmp_path / "parts"))
    pairs(config)
    made, manifest = pairs_of(tmp_path / "run", "pairs/imported")
    counts = manifest.counts
    assert (counts["input"], counts["pairs"], counts["dropped"], counts["quarantined"]) == (14, 12, 0, 2)
    refused = read_quarantine(run.finished("pairs/imported")[0])
    assert [row.id for row in refused] == ["rlaif_v/part_1.parquet/4", "rlaif_v/part_1.parquet/5"]
    assert "evaluation set" in refused[0].reason
    pictures = read_samples(run.finished(pictures_of_pairs(config))[0])
    assert {pair.content_hash for pair in made} == {sample.content_hash for sample in pictures}
    assert taken.content_hash not in {pair.content_hash for pair in made}
    assert all((pair.chosen, pair.judge) == ("one red circle", "imported") for pair in made)
    assert all(pair.teacher_chosen_logprob < 0.0 for pair in made)


def test_faults_are_one_clear_error(inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ArtifactError, match="students/student/d2s"):
        pairs(run_config(tmp_path))
    with pytest.raises(ConfigError, match="can be asked"):
        pairs(run_config(inputs, answer_types=["nothing of this kind"]))
    assert not (inputs / "pairs").exists()
    (tmp_path / "config.yaml").write_text(dump(run_config(inputs)))
    assert main(["--config", str(tmp_path / "config.yaml"), "--dry-run"]) == 0
    assert "# pairs of student after 'students/student/d2s': judge 'likelihood'" in capfd.readouterr().out
