"""The service as clients meet it: answers, batches, events, what is refused, and what its documents show.

Streams as such are in `test_serve_stream`.
"""

import base64
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from serve_apps.app import build, main
from serve_apps.settings import ServiceSettings
from sparsight.errors import ArtifactError
from tests.ray.processes import children_named, wait_until
from tests.ray.serve_case import MODEL, data_uri, error_of, serving

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text()
BATCH = 4
LIMIT_BYTES = 1_000_000
HELLO: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "what is it?"}], "max_tokens": 6}


@pytest.fixture(scope="module")
def address(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(
        tmp_path_factory.mktemp("run"),
        batch_requests=BATCH,
        batch_wait_s=0.5,
        max_queued_requests=4,
        max_body_bytes=LIMIT_BYTES,
        max_answer_tokens=32,
        max_picture_pixels=10_000,
    ) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as http:
        yield http


@pytest.fixture
def and_then_it_answers(http: httpx.Client) -> Iterator[None]:
    """After the test, a good request is answered."""
    yield
    assert http.post("/v1/chat/completions", json=HELLO).status_code == 200


def about(*seeds: int, question: str = "what shape is in the image?") -> list[Any]:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": data_uri(seed)}} for seed in seeds]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def test_models_and_health(client: openai.OpenAI, http: httpx.Client) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "sparsight"
    assert http.get("/healthz").json() == {"status": "ok", "model": MODEL}


def test_a_picture_is_answered_whole_and_in_events(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=about(1, 2), max_tokens=12)
    assert whole.object == "chat.completion"
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage is not None
    assert whole.usage.prompt_tokens > 2 * 17
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

    events = list(
        client.chat.completions.create(
            model=MODEL, messages=about(1, 2), max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    *chunks, last = events
    assert {chunk.object for chunk in events} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in events}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[1:]][-1] == whole.choices[0].finish_reason
    assert last.choices == []
    assert last.usage == whole.usage


def test_events_end_as_openai_ends_them(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json=HELLO | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert all(event.startswith("data: {") for event in events[:-2])
    assert events[-2:] == ["data: [DONE]", ""]


def test_sampling_is_repeatable_by_seed(client: openai.OpenAI) -> None:
    def sampled(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model=MODEL, messages=about(1), temperature=1.5, top_p=0.95, seed=seed, max_tokens=20
        )
        return answer.choices[0].message.content

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_concurrent_requests_share_a_batch_and_keep_their_answers(http: httpx.Client) -> None:
    """The response header counts the requests that were decoded together; it does not depend on how long they took."""
    requests = [
        {"model": MODEL, "messages": about(seed, question="?" * (1 + seed)), "max_tokens": 3 + seed}
        for seed in range(BATCH)
    ]
    alone = [http.post("/v1/chat/completions", json=request) for request in requests]
    together = at_once(http, requests)
    assert [response.headers["x-sparsight-batch"] for response in alone] == ["1"] * BATCH
    assert max(int(response.headers["x-sparsight-batch"]) for response in together) > 1
    for one, other in zip(alone, together, strict=True):
        assert one.json()["choices"] == other.json()["choices"]
        assert one.json()["usage"] == other.json()["usage"]


def at_once(http: httpx.Client, requests: list[dict[str, Any]]) -> list[httpx.Response]:
    ready = threading.Barrier(len(requests))

    def send(request: dict[str, Any]) -> httpx.Response:
        ready.wait()
        return http.post("/v1/chat/completions", json=request)

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(send, requests))


def test_bad_requests_do_not_touch_their_neighbours(http: httpx.Client) -> None:
    broken = {"model": MODEL, "messages": [*about(1), {"role": "user", "content": "?" * 3000}]}
    good = HELLO | {"messages": about(3)}
    alone = http.post("/v1/chat/completions", json=good).json()["choices"]
    responses = at_once(http, [good, broken, good, broken])
    assert [response.status_code for response in responses] == [200, 400, 200, 400]
    assert [responses[index].json()["choices"] for index in (0, 2)] == [alone, alone]


def test_more_requests_than_the_queue_takes_are_told_to_come_back(http: httpx.Client) -> None:
    responses = at_once(http, [HELLO | {"max_tokens": 32}] * 40)
    refused = [response for response in responses if response.status_code != 200]
    assert len(refused) < len(responses)
    assert refused
    for response in refused:
        assert response.status_code == 429, response.text
        assert error_of(response)["code"] == "queue_full"
        assert int(response.headers["retry-after"]) >= 1


@pytest.mark.usefixtures("and_then_it_answers")
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b"[]", 400, "model_type"),
        (HELLO | {"model": "gpt-9"}, 404, "model_not_found"),
        (HELLO | {"n": 2}, 400, "unsupported_value"),
        (HELLO | {"max_tokens": -5}, 400, "greater_than_equal"),
        (HELLO | {"messages": [{"role": "user", "content": 5}]}, 400, "list_type"),
        (HELLO | {"messages": [{"role": "user", "content": "?" * 5000}]}, 400, "context_length_exceeded"),
        (HELLO | {"messages": about(1) * 17}, 400, "too_many_images"),
    ],
)
def test_bad_bodies(http: httpx.Client, body: Any, status: int, code: str) -> None:
    content: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
    response = http.post("/v1/chat/completions", **content)
    assert response.status_code == status
    assert error_of(response)["code"] == code


@pytest.mark.usefixtures("and_then_it_answers")
@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,aGVsbG8=", "invalid_image"),
        (data_uri(1)[:-400], "invalid_image"),
        ("data:image/png;base64,???", "invalid_image_url"),
        ("http://127.0.0.1:1/a.png", "image_url_not_allowed"),
        ("https://example.com/a.png", "image_url_not_allowed"),
        ("file:///etc/passwd", "image_url_not_allowed"),
        ("", "image_url_not_allowed"),
    ],
)
def test_bad_pictures(http: httpx.Client, url: str, code: str) -> None:
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    response = http.post("/v1/chat/completions", json=HELLO | {"messages": messages})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"]) == (code, "messages.0.content.0.image_url")


@pytest.mark.usefixtures("and_then_it_answers")
def test_a_picture_of_too_many_pixels(http: httpx.Client) -> None:
    """One that is small in bytes."""
    buffer = BytesIO()
    Image.new("1", (2000, 2000)).save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    response = http.post("/v1/chat/completions", json=HELLO | {"messages": messages})
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_image"


@pytest.mark.usefixtures("and_then_it_answers")
@pytest.mark.parametrize("announced", [True, False])
def test_a_body_of_100_mb(http: httpx.Client, announced: bool) -> None:
    size, piece = 100_000_000, b"x" * 1_000_000

    def pieces() -> Iterator[bytes]:
        yield from (piece for _ in range(size // len(piece)))

    headers = {"content-type": "application/json"} | ({"content-length": str(size)} if announced else {})
    response = http.post("/v1/chat/completions", content=pieces(), headers=headers)
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"


@pytest.mark.usefixtures("and_then_it_answers")
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("DELETE", "/v1/models", 405), ("GET", "/v1/models/other", 404), ("GET", "/", 404)],
)
def test_other_urls(http: httpx.Client, method: str, path: str, status: int) -> None:
    response = http.request(method, path)
    assert response.status_code == status
    error_of(response)


def test_the_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=about(1))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL, messages=about(1), n=3)
    assert wrong.value.param == "n"


def test_an_unfinished_export_is_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json is missing"):
        build(ServiceSettings(model=str(tmp_path)))
    assert main(["--model", str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: '{tmp_path}' holds no finished artefact")


def blocks(language: str, page: str = PAGE) -> list[str]:
    """The page's code blocks of a language, at least one: pytest would skip a test that has none."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found, f"the page shows no {language}"
    return found


def test_a_page_without_code_is_seen() -> None:
    assert blocks("python", "```python\n1\n```") == ["1\n"]
    with pytest.raises(AssertionError, match="shows no python"):
        blocks("python", "```sh\nls\n```")


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


@pytest.mark.parametrize("name", ["01_ask_about_a_picture.py", "02_ask_about_a_stream.py"])
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
