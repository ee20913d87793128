"""The command line: what a user can mend is one line and status 2, our own faults keep their traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.command import run_command
from pipelines.prepare import main
from sparsight.config import RunConfig, load
from sparsight.errors import DataError, PictureError

STAGE = {"name": "mimic", "terms": {"forward_kl": 1.0}, "steps": 10}


@pytest.fixture
def path(tmp_path: Path) -> str:
    values = {
        "run_dir": str(tmp_path / "run"),
        "data": {"sources": [{"kind": "scenes", "pictures": 5, "test_pictures": 2}]},
        "teacher": {"kind": "tiny", "stages": [STAGE]},
        "distill": {"students": [{"name": "sparse", "stages": [STAGE]}]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "run.yaml")


def test_the_action_gets_the_resolved_config(path: str) -> None:
    seen: list[RunConfig] = []
    status = run_command("test", seen.append, ["--config", path, "--set", "seed=3", "--set", "label.head=4"])
    assert status == 0
    assert seen == [load(path, ["seed=3", "label.head=4"])]


def test_a_dry_run_prints_and_does_nothing(path: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    seen: list[RunConfig] = []
    arguments = ["--config", path, "--set", "seed=3", "--dry-run"]
    assert run_command("test", seen.append, arguments, plan=lambda config: [f"would use seed {config.seed}"]) == 0
    assert seen == []
    printed = capsys.readouterr().out
    assert "# would use seed 3" in printed
    (tmp_path / "printed.yaml").write_text(printed)
    assert load(tmp_path / "printed.yaml") == load(path, ["seed=3"])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--set", "label.heads=3", "--set", "sed=1"], "label.heads"),
        (["--set", "label"], "must look like a.b=value"),
        (["--config", "/absent.yaml"], "cannot read config '/absent.yaml'"),
        (["--set", "data.sources=[{kind: easy_vqa, path: /absent}]"], "'/absent' holds no easy-VQA data"),
        (["--set", "data.sources=[{kind: easy_vqa, path: /absent}]", "--dry-run"], "'/absent' holds no easy-VQA data"),
        (["--set", "run_dir=gs://bucket/run"], "storage kind 'gs' is not known"),
    ],
)
def test_user_errors_are_one_line(
    path: str, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    assert main(["--config", path, *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert part in lines[0]


def test_the_program_exits_with_the_status(path: str) -> None:
    command = [sys.executable, "-m", "pipelines.prepare", "--config", path]
    run = subprocess.run([*command, "--set", "data.surces=[]"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.count("\n") == 1
    assert "Traceback" not in run.stderr
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_our_own_faults_are_not_hidden(path: str) -> None:
    def fail(config: RunConfig) -> None:
        raise ZeroDivisionError(config.seed)

    with pytest.raises(ZeroDivisionError):
        run_command("test", fail, ["--config", path])


def test_user_errors_are_found_inside_what_a_worker_raised(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    class RemoteError(DataError):
        """Passes for the original's class, as Ray's errors do, with a remote traceback as its message."""

        def __init__(self, cause: Exception) -> None:
            super().__init__("remote traceback\n" * 20)
            self.cause = cause

    def remote(config: RunConfig) -> None:
        raise RemoteError(PictureError("row 3 is broken:\n  mend it"))

    def chained(config: RunConfig) -> None:
        raise RuntimeError("the job failed") from RemoteError(PictureError("row 3 is broken:\n  mend it"))

    for action in (remote, chained):
        assert run_command("test", action, ["--config", path]) == 2
        assert capsys.readouterr().err == "error: row 3 is broken: mend it\n"


def test_an_interrupt_says_how_to_go_on(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(config: RunConfig) -> None:
        raise KeyboardInterrupt

    assert run_command("test", interrupt, ["--config", path]) == 130
    assert "run the same command again" in capsys.readouterr().err
