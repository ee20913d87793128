"""Streams over HTTP: frames in, answers with evidence out, as the chat endpoint answers the same picture."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest

from tests.ray.serve_case import MODEL, data_uri, error_of, serving

FRAMES_BEFORE_FULL = 12
QUESTION = {"question": "what shape is in the image?", "max_tokens": 12}


def block_bytes(tokens: int) -> int:
    """Keys and values of two layers, one head of width 32, in float32, and the mean keys."""
    return 2 * 2 * tokens * 32 * 4 + 2 * 32 * 4


@pytest.fixture(scope="module")
def http(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    stream = {
        "window_tokens": 64,
        "retrieve_blocks": 4,
        "recent_blocks": 1,
        "max_streams": 3,
        "max_frames_per_request": 8,
        "max_stream_bytes": FRAMES_BEFORE_FULL * block_bytes(16) + block_bytes(1),
    }
    with (
        serving(tmp_path_factory.mktemp("run"), stream=stream, max_body_bytes=1_000_000) as address,
        httpx.Client(base_url=f"{address}/v1", timeout=60) as http,
    ):
        yield http


@pytest.fixture
def stream(http: httpx.Client) -> Iterator[str]:
    with opened(http) as path:
        yield path


@contextmanager
def opened(http: httpx.Client) -> Iterator[str]:
    """The path of a new stream, closed in the end."""
    response = http.post("/streams", json={"model": MODEL})
    assert response.status_code == 200
    path = f"/streams/{response.json()['id']}"
    yield path
    http.delete(path)


def frames(*times_s: float) -> dict[str, Any]:
    """Frames whose pictures differ by their times."""
    return {"frames": [{"time_s": time_s, "image": data_uri(round(10 * time_s))} for time_s in times_s]}


def test_a_stream_from_opening_to_closing(http: httpx.Client) -> None:
    opened = http.post("/streams", json={"model": MODEL}).json()
    assert opened["model"] == MODEL
    assert opened["created"] > 0
    assert (opened["frames"], opened["span"]) == (0, None)
    path = f"/streams/{opened['id']}"
    assert http.post(f"{path}/frames", json=frames(0.5, 1.5)).json()["frames"] == 2
    assert http.post(f"{path}/frames", json=frames(2.0)).json()["span"] == {"start_s": 0.5, "end_s": 2.0}
    assert http.get(path).json()["bytes"] == block_bytes(1) + 3 * block_bytes(16)
    assert opened["id"] in [stream["id"] for stream in http.get("/streams").json()["data"]]
    assert http.delete(path).json() == {"id": opened["id"], "object": "stream.deleted", "deleted": True}
    assert http.get(path).status_code == 404
    assert opened["id"] not in [stream["id"] for stream in http.get("/streams").json()["data"]]


def test_one_frame_is_answered_as_the_chat_endpoint_answers_a_picture(http: httpx.Client, stream: str) -> None:
    http.post(f"{stream}/frames", json=frames(3.0))
    answer = http.post(f"{stream}/questions", json=QUESTION).json()
    picture = {"type": "image_url", "image_url": {"url": data_uri(30)}}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": QUESTION["question"]}]}]
    chat = http.post("/chat/completions", json={"model": MODEL, "messages": messages, "max_tokens": 12}).json()
    assert answer["answer"] == chat["choices"][0]["message"]["content"]
    assert answer["finish_reason"] == chat["choices"][0]["finish_reason"]
    assert answer["usage"] == chat["usage"]
    [moment] = answer["evidence"]
    assert (moment["start_s"], moment["end_s"], moment["block"], moment["weight"]) == (3.0, 3.0, 0, 1.0)


def test_evidence_is_a_choice_with_the_newest_frame_in_it(http: httpx.Client, stream: str) -> None:
    http.post(f"{stream}/frames", json=frames(*(float(second) for second in range(8))))
    evidence = http.post(f"{stream}/questions", json=QUESTION).json()["evidence"]
    assert 4 <= len(evidence) <= 7  # four in each of two layers, the newest in both
    assert 7 in {moment["block"] for moment in evidence}
    assert all(moment["start_s"] == float(moment["block"]) for moment in evidence)
    weights = [moment["weight"] for moment in evidence]
    assert weights == sorted(weights, reverse=True)
    earlier = http.post(f"{stream}/questions", json=QUESTION | {"until_s": 2.5}).json()["evidence"]
    assert {moment["block"] for moment in earlier} == {0, 1, 2}


def test_how_frames_are_grouped_does_not_matter(http: httpx.Client) -> None:
    times_s = [float(second) for second in range(6)]
    answers: list[Any] = []
    for groups in ([times_s], [times_s[:1], times_s[1:4], times_s[4:]]):
        path = f"/streams/{http.post('/streams', json={'model': MODEL}).json()['id']}"
        for group in groups:
            assert http.post(f"{path}/frames", json=frames(*group)).status_code == 200
        answer = http.post(f"{path}/questions", json=QUESTION).json()
        answers.append((answer["answer"], [moment["block"] for moment in answer["evidence"]]))
        http.delete(path)
    assert answers[0] == answers[1]


def test_a_question_changes_nothing(http: httpx.Client, stream: str) -> None:
    http.post(f"{stream}/frames", json=frames(1.0, 2.0))
    before = http.get(stream).json()
    first, second = (http.post(f"{stream}/questions", json=QUESTION).json() for _ in range(2))
    assert (first["answer"], first["evidence"]) == (second["answer"], second["evidence"])
    assert http.get(stream).json() == before


def test_frames_are_taken_all_or_none(http: httpx.Client, stream: str) -> None:
    http.post(f"{stream}/frames", json=frames(1.0))
    before = http.get(stream).json()
    broken = frames(2.0, 3.0)
    broken["frames"][1]["image"] = "data:image/png;base64,AAAA"
    for value, status, param in [
        (broken, 400, "frames.1.image"),
        (frames(2.0, 2.0), 400, "frames"),
        (frames(1.0), 409, "frames.0.time_s"),
        (frames(0.5, 4.0), 409, "frames.0.time_s"),
        (frames(*(2.0 + second for second in range(9))), 413, "frames"),
        ({"frames": [{"time_s": "now", "image": data_uri(1)}]}, 400, "frames.0.time_s"),
    ]:
        response = http.post(f"{stream}/frames", json=value)
        assert (response.status_code, error_of(response)["param"]) == (status, param)
        assert http.get(stream).json() == before
    assert http.post(f"{stream}/frames", json=frames(2.0)).json()["frames"] == 2


def test_a_full_stream_keeps_what_it_has_and_goes_on_answering(http: httpx.Client, stream: str) -> None:
    assert http.post(f"{stream}/frames", json=frames(*(float(second) for second in range(8)))).status_code == 200
    too_many = http.post(f"{stream}/frames", json=frames(*(8.0 + second for second in range(5))))
    assert (too_many.status_code, error_of(too_many)["code"]) == (409, "stream_full")
    assert http.get(stream).json()["frames"] == 8
    rest = http.post(f"{stream}/frames", json=frames(*(8.0 + second for second in range(4))))
    assert rest.json()["frames"] == FRAMES_BEFORE_FULL
    assert http.post(f"{stream}/questions", json=QUESTION).status_code == 200


def test_a_client_that_leaves_in_the_middle_does_not_disturb_its_stream(http: httpx.Client, stream: str) -> None:
    """Its frames are taken or not, and the next ones are encoded after all that were."""
    address, impatient = http.base_url, httpx.Timeout(60, read=0.005)
    with httpx.Client(base_url=address, timeout=impatient) as leaving, suppress(httpx.ReadTimeout):
        leaving.post(f"{stream}/frames", json=frames(*(float(second) for second in range(8))))
    assert http.post(f"{stream}/frames", json=frames(8.0)).status_code == 200
    taken = http.get(stream).json()["frames"]
    assert taken in (1, 9)
    with opened(http) as quiet:
        if taken == 9:
            http.post(f"{quiet}/frames", json=frames(*(float(second) for second in range(8))))
        http.post(f"{quiet}/frames", json=frames(8.0))
        left, expected = (http.post(f"{path}/questions", json=QUESTION).json()["evidence"] for path in (stream, quiet))
    assert [moment["block"] for moment in left] == [moment["block"] for moment in expected]
    assert [moment["score"] for moment in left] == pytest.approx([moment["score"] for moment in expected], abs=1e-5)


def test_bad_questions(http: httpx.Client, stream: str) -> None:
    empty = http.post(f"{stream}/questions", json=QUESTION)
    assert (empty.status_code, error_of(empty)["code"]) == (409, "stream_not_answerable")
    http.post(f"{stream}/frames", json=frames(5.0))
    for value, status in [
        ({}, 400),
        ({"question": " "}, 400),
        ({"question": "?", "max_tokens": 0}, 400),
        ({"question": "?" * 5000}, 400),
        (QUESTION | {"until_s": 1.0}, 409),
    ]:
        response = http.post(f"{stream}/questions", json=value)
        assert response.status_code == status
        error_of(response)
        assert http.post(f"{stream}/questions", json=QUESTION).status_code == 200


def test_unknown_streams_and_models(http: httpx.Client) -> None:
    responses = [
        http.get("/streams/other"),
        http.delete("/streams/other"),
        http.post("/streams/other/frames", json=frames(1.0)),
        http.post("/streams/other/questions", json=QUESTION),
        http.post("/streams", json={"model": "other"}),
    ]
    assert [response.status_code for response in responses] == [404] * 5
    assert [error_of(response)["code"] for response in responses] == ["stream_not_found"] * 4 + ["model_not_found"]


def test_no_more_streams_than_the_limit(http: httpx.Client) -> None:
    opened = [http.post("/streams", json={"model": MODEL}) for _ in range(3)]
    assert [response.status_code for response in opened] == [200] * 3
    refused = http.post("/streams", json={"model": MODEL})
    assert (refused.status_code, error_of(refused)["code"]) == (429, "too_many_streams")
    assert "retry-after" in refused.headers
    for response in opened:
        http.delete(f"/streams/{response.json()['id']}")
    assert http.get("/streams").json()["data"] == []
