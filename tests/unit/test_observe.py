"""Metrics files that survive a kill, and bars that stay quiet where nobody looks."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparsight.observe import MetricsWriter, progress, progress_bar, read_metrics, say


def test_records_come_back_with_step_and_time(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "deep" / "run", tensorboard=False) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": 1.0 / step})
    rows = read_metrics(tmp_path / "deep" / "run" / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5)]
    assert 0.0 <= rows[0]["time_s"] <= rows[1]["time_s"]


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the kill came in the middle of a line
    with MetricsWriter(tmp_path, resume_step=3, tensorboard=False) as writer:
        for step in range(4, 6):
            writer.write(step, {"loss": 2.0})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]
    times = [row["time_s"] for row in rows]
    assert times == sorted(times)


def test_a_fresh_writer_starts_an_empty_file(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with MetricsWriter(tmp_path, tensorboard=False) as writer:
            writer.write(1, {"loss": value})
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2.0]


def test_no_file_means_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "absent.jsonl") == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_the_same_numbers(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.5, "rate": 2.0})
        writer.write(2, {"loss": 0.25})
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert [(event.step, event.value) for event in board.Scalars("rate")] == [(1, 2.0)]


def test_bars_are_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), "rows", total=3)) == [0, 1, 2]
    with progress_bar("rows", total=3) as bar:
        bar.update(3)
    assert capsys.readouterr() == ("", "")
    say("one line")
    assert capsys.readouterr() == ("", "one line\n")
