"""What docs/serving.md and the examples show works as it stands, and streams outlive the replica that encodes them."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.ray.processes import children_named, wait_until
from tests.ray.serve_case import MODEL, data_uri, serving

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text()


@pytest.fixture(scope="module")
def address(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("run"), max_answer_tokens=16) as address:
        yield address


def blocks(language: str) -> list[str]:
    """The page's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run(command: list[str], address: str) -> str:
    environment = {**os.environ, "OPENAI_BASE_URL": f"{address}/v1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("code", blocks("python"))
def test_python_of_the_page(address: str, code: str) -> None:
    run([sys.executable, "-c", code.replace("http://127.0.0.1:8000", address)], address)


@pytest.mark.parametrize("code", blocks("sh"))
def test_shell_of_the_page(address: str, code: str) -> None:
    script = code.replace("http://127.0.0.1:8000", address)
    output = run(["bash", "-euo", "pipefail", "-c", script], address)
    assert "[DONE]" in output or '"deleted":true' in output


@pytest.mark.parametrize("name", ["02_ask_about_a_picture.py", "03_ask_about_a_stream.py"])
def test_examples(address: str, name: str) -> None:
    output = run([sys.executable, str(ROOT / "examples" / name)], address)
    assert "what color is the circle?" in output


def test_a_client_that_leaves_in_the_middle_harms_nobody(address: str) -> None:
    request = {"model": MODEL, "messages": [{"role": "user", "content": "what is it?"}]}
    with httpx.Client(base_url=f"{address}/v1", timeout=60) as http:
        with http.stream("POST", "/chat/completions", json=request | {"stream": True}) as response:
            assert next(response.iter_lines()).startswith("data: {")
        assert http.post("/chat/completions", json=request).status_code == 200


def test_streams_outlive_a_killed_replica(address: str) -> None:
    question = {"question": "what shape is in the image?"}
    times_s = [float(second) for second in range(6)]
    with httpx.Client(base_url=f"{address}/v1", timeout=120) as http:
        whole, killed = (f"/streams/{http.post('/streams', json={'model': MODEL}).json()['id']}" for _ in range(2))
        send(http, whole, times_s)
        send(http, killed, times_s[:3])
        before = http.get(killed).json()
        os.kill(replica_of_streams(), signal.SIGKILL)
        assert patiently(http, killed).json() == before
        send(http, killed, times_s[3:])
        after, expected = (http.post(f"{path}/questions", json=question).json() for path in (killed, whole))
        assert after["answer"] == expected["answer"]
        assert after["evidence"] == expected["evidence"]


def send(http: httpx.Client, path: str, times_s: list[float]) -> None:
    frames = [{"time_s": time_s, "image": data_uri(int(time_s))} for time_s in times_s]
    assert http.post(f"{path}/frames", json={"frames": frames}).status_code == 200


def patiently(http: httpx.Client, path: str) -> httpx.Response:
    """Ask again as long as the service says that it is restarting, as a client would."""

    def answered() -> httpx.Response | None:
        response = http.get(path)
        if response.status_code != 503:
            return response
        assert response.json()["error"]["code"] == "unavailable"
        return None

    response = wait_until(answered, "the replica is back")
    assert response is not None
    return response


def replica_of_streams() -> int:
    """The process of this cluster's stream replica: Ray names its workers by what they run."""
    [process] = children_named("ray::ServeReplica:sparsight:StreamReplica")
    return process
