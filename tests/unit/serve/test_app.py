"""The serving command refuses what it cannot do in one line, before a cluster starts. No cluster here."""

import socket
from pathlib import Path

import pytest
import ray
import yaml

from serve_apps.app import check_address, main
from sparsight.artifacts import RunDirectory
from sparsight.config import ServeConfig
from sparsight.errors import SparsightError

STAGE = {"name": "mimic", "terms": {"forward_kl": 1.0}, "steps": 10}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The configuration of a run whose export is finished."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    RunDirectory(str(tmp_path / "run")).artifact("export", "export", 1, {}).commit()
    values = {
        "run_dir": str(tmp_path / "run"),
        "data": {"sources": [{"kind": "scenes"}]},
        "teacher": {"kind": "tiny", "stages": [STAGE]},
        "distill": {"students": [{"name": "sparse", "stages": [STAGE]}]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "run.yaml")


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command prints."""
    connected = ray.is_initialized()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    assert line.startswith("error: ")
    assert ray.is_initialized() == connected
    return line


def test_an_occupied_port_is_named(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as other:  # as another service of Ray holds it
        port = other.getsockname()[1]
        line = refusal(["--config", config, "--set", f"serve.port={port}"], capsys)
    assert f"cannot listen at 127.0.0.1:{port}" in line
    assert "set serve.host and serve.port" in line
    check_address(ServeConfig(port=port))  # free again


def test_a_host_that_is_not_this_machine_is_named() -> None:
    with pytest.raises(SparsightError, match=r"cannot listen at 192\.0\.2\.1:8000"):
        check_address(ServeConfig(host="192.0.2.1"))


def test_several_faults_are_one_line(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(["--config", config, "--set", "serve.prt=1", "--set", "serve.port=0"], capsys)
    assert "serve.prt" in line
    assert "serve.port" in line


def test_arguments_that_contradict_are_named(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config FILE" in refusal([], capsys)
    assert "holds no finished artefact" in refusal(["--config", config, "--model", f"{config}.absent"], capsys)
