"""The whole path with one command, as small as it goes: all stages, then a second run that finds everything there."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsight.evaluate.stream_scores import from_parquet

FIGURES = {
    "teacher_accuracy",
    "student_accuracy",
    "sft_student_accuracy",
    "majority_accuracy",
    "teacher_activated_parameters",
    "student_activated_parameters",
    "student_total_parameters",
    "signal_bytes_per_token",
}
SIZES: dict[str, Any] = {
    "tower_width": 32,
    "tower_layers": 1,
    "tower_heads": 1,
    "text_width": 32,
    "text_layers": 2,
    "text_heads": 1,
    "text_key_value_heads": 1,
    "text_intermediate": 48,
}
LENGTH: dict[str, Any] = {"steps": 2, "batch_samples": 4}
TRUTH, SIGNALS = {"cross_entropy": 1.0}, {"forward_kl": 1.0, "cross_entropy": 0.5, "balance": 0.01}
STREAMS: dict[str, Any] = {
    "kind": "streams",
    "clips": 4,
    "test_clips": 2,
    "clip_frames": [2, 8],
    "streams": 1,
    "lengths_s": [20.0, 40.0],
    "questions": 6,
}
TRIALS: dict[str, Any] = {
    "models": ["student", "teacher"],
    "window_tokens": 100,
    "methods": [{"name": "internal", "frames": 4, "recent": 1}, {"name": "recent", "kind": "recent", "frames": 2}],
    "ablations": [{"name": "full", "kind": "full"}, {"name": "external", "kind": "external", "frames": 4, "recent": 1}],
    "max_answer_tokens": 2,
}
UPCYCLE = {"experts": 4, "active_experts": 2, "layers": [1]}


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`pipelines.run` on twenty pictures, with two steps wherever something is trained."""
    folder = tmp_path_factory.mktemp("demo")
    sparse = {"name": "sparse", "upcycle": UPCYCLE, **LENGTH}
    values = {
        "run_dir": str(folder / "run"),
        "resources": {"num_cpus": 2, "label_workers": 1, "train_workers": 1},
        "data": {
            "sources": [{"kind": "easy_vqa", "limit": 20}, STREAMS],
            "turns_per_sample": 12,
            "ground_truth_fraction": 0.1,
        },
        "teacher": {
            "kind": "tiny",
            "architecture": {**SIZES, "text_width": 64},
            "tower": {"steps": 2, "batch_pictures": 8, "drawn_pictures": 20},
            "stages": [{"name": "language", "terms": TRUTH, **LENGTH}],
        },
        "student": {"architecture": SIZES},
        "distill": {
            "students": [
                {"name": "sparse_student", "stages": [{**sparse, "terms": SIGNALS}]},
                {"name": "sft_student", "stages": [{**sparse, "terms": TRUTH, "rows": "ground_truth"}]},
            ]
        },
        "label": {"max_answer_tokens": 2},
        "evaluate": {"batch_samples": 32, "max_answer_tokens": 2, "limit": 32, "streams": TRIALS},
    }
    (folder / "micro.yaml").write_text(yaml.safe_dump(values))
    return [sys.executable, "-m", "pipelines.run", "--config", str(folder / "micro.yaml")]


@pytest.fixture(scope="module")
def run_dir(command: list[str]) -> Path:
    """The path that the command prints last, in a process and on a cluster of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


def files(folder: Path) -> Iterator[tuple[str, int]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder)), path.stat().st_mtime_ns


def test_one_command_leaves_a_report_with_the_figures_that_programs_read(command: list[str], run_dir: Path) -> None:
    assert run_dir == Path(command[-1]).parent / "run"
    report = json.loads((run_dir / "report/report.json").read_text(), parse_constant=pytest.fail)
    assert report["figures"].keys() >= FIGURES
    assert all(math.isfinite(report["figures"][name]) for name in FIGURES)
    assert report["figures"]["student_activated_parameters"] < report["figures"]["teacher_activated_parameters"]
    assert report["figures"].keys() >= {"streams_student_internal_past", "streams_teacher_recent_recall"}
    assert len(report["verdicts"]) == 6
    for name in ("teacher", "signals", "students/sparse_student/sparse", "students/sft_student/sparse", "export"):
        assert (run_dir / name / "manifest.json").exists()
    assert not list(run_dir.rglob("draft.json"))
    assert not list(run_dir.rglob("*.partial"))


def test_models_are_asked_about_every_stream_by_every_method(run_dir: Path) -> None:
    rows = from_parquet((run_dir / "stream_evaluation/answers.parquet").read_bytes())
    asked = [row for row in rows if (row.model, row.method) == ("student", "internal")]
    assert {row.seconds for row in asked} == {20.0, 40.0}
    by = Counter((row.model, row.method) for row in rows)
    ways = [
        ("student", "internal"),
        ("student", "recent"),
        ("student", "full"),
        ("student", "external"),
        ("teacher", "internal"),
    ]
    assert by == dict.fromkeys([*ways, ("teacher", "recent")], len(asked))


def test_a_second_run_does_nothing_and_needs_no_cluster(command: list[str], run_dir: Path) -> None:
    before = list(files(run_dir))
    nowhere = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    done = subprocess.run(command, env=nowhere, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]) == run_dir
    assert list(files(run_dir)) == before
