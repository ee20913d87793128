"""Labelling on Ray Data: every row accounted for, and the same rows after workers and drivers were killed."""

import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from PIL import Image

from pipelines import runtime
from pipelines.label import label
from sparsight.artifacts import MANIFEST, Manifest, RunDirectory
from sparsight.config import ArchitectureConfig, ResourcesConfig, RunConfig, dump
from sparsight.data.samples import write_samples
from sparsight.data.signals import iter_signals, signal_files
from sparsight.errors import ArtifactError, DataError, SparsightError
from sparsight.media.images import encode_png
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.records import Sample, TeacherSignal, Turn
from tests.quarantine import read_quarantine
from tests.ray.processes import DEADLINE_S, children_named, kill_driver, wait_until

pytestmark = pytest.mark.usefixtures("ray_cluster")

WORKER = "ray::MapWorker(MapBatches(TeacherWorker))"
ANSWERED = 20
QUESTIONS = ("what colour is the shape?", "is there a circle?", "how many squares are there?", "which shape is it?")
ARCHITECTURE = ArchitectureConfig(
    picture_pixels=32, tower_width=32, tower_layers=1, tower_heads=2, text_width=64, text_layers=2, text_heads=2
)


def run_config(run_dir: Path, workers: int = 1, **label_settings: Any) -> RunConfig:
    terms = {"cross_entropy": 1.0}
    stage = {"name": "only", "terms": terms, "steps": 1}
    return RunConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "data": {"sources": [{"kind": "scenes"}]},
            "teacher": {"kind": "tiny", "stages": [stage]},
            "distill": {"students": [{"name": "student", "stages": [stage]}]},
            "label": {"batch_samples": 2, "rows_per_file": 8, "max_answer_tokens": 8, **label_settings},
            "resources": {"label_workers": workers},
        }
    )


def new_samples(rows: int, turns: int, answered: bool) -> Iterator[Sample]:
    for number in range(rows):
        noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        asked = [QUESTIONS[(number + turn) % len(QUESTIONS)] for turn in range(turns)]
        answer = "yes" if answered else None
        yield Sample(
            f"row-{number:04d}",
            (encode_png(Image.fromarray(noise)),),
            tuple(Turn(question, answer) for question in asked),
            "noise",
        )


def put_samples(run_dir: Path, samples: list[Sample]) -> None:
    artifact = RunDirectory(str(run_dir)).artifact("samples/student", "samples", 1, [row.id for row in samples])
    artifact.begin()
    write_samples(artifact.storage, samples, rows_per_file=32)
    artifact.commit({"samples": len(samples)})


def put_teacher(run_dir: Path, seed: int = 0) -> None:
    artifact = RunDirectory(str(run_dir)).artifact("teacher", "model", 1, {"seed": seed})
    artifact.begin()
    tokenizer = make_tokenizer([*QUESTIONS, "yes no"], 320)
    make_dense(ARCHITECTURE, tokenizer, seed).save(artifact.storage.fetch() / "model")
    artifact.commit()


def signals_of(run_dir: Path) -> tuple[list[TeacherSignal], Manifest]:
    storage, manifest = RunDirectory(str(run_dir)).finished("signals", "signals")
    return sorted(iter_signals(storage), key=lambda row: row.id), manifest


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """An uninterrupted run over rows whose answers the teacher has to write; others start from copies of its inputs."""
    run_dir = tmp_path_factory.mktemp("whole")
    put_teacher(run_dir)
    put_samples(run_dir, list(new_samples(64, turns=6, answered=False)))
    label(run_config(run_dir, batch_samples=8))
    return run_dir


@pytest.fixture
def fresh_run(whole_run: Path, tmp_path: Path) -> Path:
    """The inputs of the whole run, nothing labelled yet."""
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("signals"))
    return tmp_path


def assert_same_rows(run_dir: Path, whole_run: Path) -> None:
    ours, manifest = signals_of(run_dir)
    theirs, whole_manifest = signals_of(whole_run)
    assert [row.id for row in ours] == [row.id for row in theirs]
    assert manifest.counts == whole_manifest.counts
    for row, whole in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(row.response_ids_n, whole.response_ids_n)
        np.testing.assert_allclose(row.label_logprobs_n, whole.label_logprobs_n, atol=1e-4)
        np.testing.assert_allclose(row.targets.tail_mass_n, whole.targets.tail_mass_n, atol=2e-3)


def written_files(run_dir: Path) -> int:
    return len(list((run_dir / "signals").glob("part-*.parquet")))


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """A finished run over some answered rows, one that cannot be read, and one that asks nothing."""
    run_dir = tmp_path_factory.mktemp("small")
    samples = list(new_samples(ANSWERED, turns=2, answered=True))
    broken = Sample("broken", (b"no picture",), samples[0].turns, "noise")
    silent = Sample("silent", samples[1].frames, (), "noise")
    put_teacher(run_dir)
    put_samples(run_dir, [*samples, broken, silent])
    label(run_config(run_dir, batch_samples=8, rows_per_file=16))
    return run_dir


def test_every_row_is_accounted_for(small_run: Path) -> None:
    samples = list(new_samples(ANSWERED, turns=2, answered=True))
    rows, manifest = signals_of(small_run)
    tokens = sum(len(row.response_ids_n) for row in rows)
    assert manifest.counts == {
        "input": ANSWERED + 2, "labelled": ANSWERED, "quarantined": 1, "skipped": 1, "response_tokens": tokens
    }  # fmt: skip
    assert [row.id for row in rows] == [sample.id for sample in samples]
    assert [row.content_hash for row in rows] == [sample.content_hash for sample in samples]
    storage, _ = RunDirectory(str(small_run)).finished("signals")
    (refused,) = read_quarantine(storage)
    assert (refused.id, refused.source) == ("broken", "noise")
    size = sum((small_run / "signals" / key).stat().st_size for key in signal_files(storage))
    assert manifest.figures["signal_bytes_per_token"] == pytest.approx(size / tokens)
    assert set(manifest.details) >= {"tokenizer_fingerprint", "prompt_fingerprint", "teacher_fingerprint"}


def test_a_finished_store_is_left_alone_and_another_teacher_starts_anew(small_run: Path, tmp_path: Path) -> None:
    shutil.copytree(small_run, tmp_path, dirs_exist_ok=True)
    config = run_config(tmp_path, batch_samples=8, rows_per_file=16)
    before = (tmp_path / "signals" / MANIFEST).stat().st_mtime_ns
    label(config)
    assert (tmp_path / "signals" / MANIFEST).stat().st_mtime_ns == before
    first, _ = signals_of(tmp_path)
    put_teacher(tmp_path, seed=1)
    label(config)
    second, _ = signals_of(tmp_path)
    assert [row.id for row in first] == [row.id for row in second]
    assert all(
        not np.allclose(row.label_logprobs_n, other.label_logprobs_n) for row, other in zip(first, second, strict=True)
    )


def test_a_killed_driver_and_a_killed_worker_leave_the_same_rows(
    whole_run: Path, fresh_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """First the driver is killed; then the same command continues, without a damaged file, and loses a worker."""
    config_file = tmp_path_factory.mktemp("config") / "run.yaml"
    config_file.write_text(dump(run_config(fresh_run, workers=1)))
    kill_driver("pipelines.label", config_file, lambda: written_files(fresh_run) > 1, "the second file")
    folder = fresh_run / "signals"
    assert not (folder / MANIFEST).exists()
    damaged, *good = sorted(folder.glob("part-*.parquet"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    for late in good[1:]:  # written before the kill arrived; without them there is work left for the next one
        late.unlink()
    good = good[:1]
    kept = {path: path.stat().st_mtime_ns for path in good}
    kill_worker(run_config(fresh_run, workers=2), fresh_run, written_files(whole_run))
    assert {path: path.stat().st_mtime_ns for path in good} == kept, "rows that were there were labelled again"
    assert_same_rows(fresh_run, whole_run)


def kill_worker(config: RunConfig, run_dir: Path, files: int) -> None:
    """Continue labelling to its end, and kill one of its workers as soon as there is another file."""
    before = written_files(run_dir)
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(label, config)
        victims = wait_until(lambda: children_named(WORKER), "a worker at work", lambda: not work.done())
        wait_until(lambda: written_files(run_dir) > before, "a new file", lambda: not work.done())
        assert written_files(run_dir) < files, "labelling was over before the worker was killed"
        os.kill(victims[0], signal.SIGKILL)
        work.result(DEADLINE_S)


def test_missing_inputs_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="samples/student"):
        label(run_config(tmp_path))
    put_samples(tmp_path, list(new_samples(2, turns=1, answered=True)))
    with pytest.raises(ArtifactError, match="teacher"):
        label(run_config(tmp_path))
    assert not (tmp_path / "signals").exists()


def test_an_id_that_comes_twice_is_refused(tmp_path: Path) -> None:
    put_teacher(tmp_path)
    (sample,) = new_samples(1, turns=1, answered=True)
    put_samples(tmp_path, [sample, sample])
    with pytest.raises(DataError, match="row-0000"):
        label(run_config(tmp_path))


def test_what_the_cluster_lacks_is_named() -> None:
    runtime.connect(ResourcesConfig())
    runtime.require(cpus=1.0, timeout_s=0.0)
    has = ray.cluster_resources()["CPU"]
    with pytest.raises(SparsightError, match=rf"{has + 1:g} CPU.*has {has:g}.*3 GPU"):
        runtime.require(cpus=has + 1, gpus=3, timeout_s=0.0)
