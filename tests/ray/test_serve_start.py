"""The serving command before it answers and when it is told to stop: too few CPUs, and signals at any time."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray import serve
from ray.util.placement_group import placement_group, remove_placement_group

from serve_apps.app import APPLICATION
from tests.ray.processes import DEADLINE_S, wait_until
from tests.ray.serve_case import export_tiny

ROOT = Path(__file__).resolve().parents[2]


def command(run_dir: Path, *settings: str) -> list[str]:
    """`make serve` of a run, at a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    overrides = [f"run_dir={run_dir}", f"serve.port={port}", *settings]
    options = [option for override in overrides for option in ("--set", override)]
    return [sys.executable, "-m", "serve_apps.app", "--config", str(ROOT / "configs" / "tiny.yaml"), *options]


def test_a_cluster_that_is_too_small_is_refused_in_one_line(tmp_path: Path) -> None:
    """A private one, of `resources.num_cpus`."""
    export_tiny(tmp_path)
    arguments = command(tmp_path, "resources.num_cpus=3", "serve.threads=2")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        arguments, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: the service needs 4 CPU (the cluster has 3): ")
    assert "lower serve.threads" in line


@contextmanager
def started(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """The command on the cluster of the tests, killed afterwards if it still runs."""
    export_tiny(run_dir)
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    service = subprocess.Popen(command(run_dir), env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        yield service
    finally:
        service.kill()
        service.communicate()
        serve.shutdown()


@pytest.fixture
def full_cluster(ray_cluster: None) -> Iterator[None]:
    """No CPU of the cluster is free during the test."""
    group = placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    assert group.wait(DEADLINE_S)
    yield
    remove_placement_group(group)


def state() -> str | None:
    """The application's, if the cluster knows it."""
    application = serve.status().applications.get(APPLICATION)
    return None if application is None else application.status.value


@pytest.mark.usefixtures("full_cluster")
def test_ctrl_c_ends_it_while_it_waits_for_cpus(tmp_path: Path) -> None:
    with started(tmp_path) as service:
        wait_until(lambda: state() == "DEPLOYING", "the replicas are asked for", lambda: service.poll() is None)
        service.send_signal(signal.SIGINT)
        service.communicate(timeout=DEADLINE_S)
        assert service.returncode == 130
        assert state() is None


@pytest.mark.usefixtures("ray_cluster")
def test_sigterm_ends_it_while_it_answers(tmp_path: Path) -> None:
    with started(tmp_path) as service:
        assert service.stderr is not None
        assert any(line.startswith("serving ") for line in service.stderr), "it ended by itself"
        assert state() == "RUNNING"
        service.send_signal(signal.SIGTERM)
        service.communicate(timeout=DEADLINE_S)
        assert service.returncode == 0
        assert state() is None
