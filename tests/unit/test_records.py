"""Rows: what goes in comes out, through Parquet, and the hashes tell things apart."""

from dataclasses import replace
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsight.records import (
    PAIR_SCHEMA,
    PICTURE_MARK,
    SAMPLE_SCHEMA,
    SIGNAL_SCHEMA,
    Candidate,
    PreferencePair,
    Sample,
    SparseTargets,
    TeacherSignal,
    Turn,
    hash_answers,
    hash_frames,
    hash_response,
)


def through_parquet(row: dict[str, object], schema: pa.Schema) -> dict[str, object]:
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist([row], schema=schema), buffer)
    table = pq.read_table(buffer)
    assert table.schema.names == schema.names
    assert table.schema.metadata == schema.metadata
    return table.to_pylist()[0]


def sample(*answers: str | None) -> Sample:
    turns = tuple(Turn(f"question {index}?", answer, "kind") for index, answer in enumerate(answers))
    return Sample("id/0", (b"frame a", b"frame b"), turns, "somewhere", (0.0, 1.5))


def test_sample_survives_parquet() -> None:
    for one in (sample("yes", "no"), sample("yes", None), sample()):
        assert Sample.from_row(through_parquet(one.to_row(), SAMPLE_SCHEMA)) == one


def test_conversation_is_in_llava_form() -> None:
    messages = sample("yes", None).to_row()["conversation"]
    assert messages == [
        {"from": "human", "value": f"{PICTURE_MARK}\nquestion 0?"},
        {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "question 1?"},
        {"from": "gpt", "value": None},
    ]


def test_withheld_answers_change_nothing_else() -> None:
    full = sample("yes", "no")
    full = replace(full, turns=tuple(replace(turn, evidence=(0,)) for turn in full.turns))
    assert Sample.from_row(full.to_row()) == full
    bare = full.without_answers()
    assert [turn.evidence for turn in bare.turns] == [(), ()], "it would give the answer away"
    assert full.has_ground_truth
    assert not bare.has_ground_truth
    assert [turn.answer for turn in bare.turns] == [None, None]
    assert [(turn.question, turn.answer_type) for turn in bare.turns] == [
        (turn.question, turn.answer_type) for turn in full.turns
    ]
    assert (bare.id, bare.content_hash, bare.frame_times_s) == (full.id, full.content_hash, full.frame_times_s)


def test_content_hash_sees_bytes_and_borders() -> None:
    assert hash_frames([b"ab", b"c"]) != hash_frames([b"a", b"bc"])
    assert hash_frames([b"ab", b"c"]) != hash_frames([b"c", b"ab"])
    assert hash_frames([b"ab"]) == hash_frames([b"ab"])


def test_text_alone_is_known_by_its_first_question() -> None:
    """Two texts are two contents, and a text stays the same one without its answers and its later turns."""
    text = replace(sample("yes", "no"), frames=(), frame_times_s=())
    assert Sample.from_row(through_parquet(text.to_row(), SAMPLE_SCHEMA)) == text
    assert text.to_row()["conversation"][0]["value"] == "question 0?"
    other = replace(text, turns=(Turn("another?", "yes"), *text.turns[1:]))
    assert len({text.content_hash, other.content_hash, sample("yes", "no").content_hash}) == 3
    same = (text.without_answers(), replace(text, turns=text.turns[:1]), replace(text, id="other"))
    assert {one.content_hash for one in same} == {text.content_hash}


def targets(positions: int, head: int, tail: int) -> SparseTargets:
    random = np.random.default_rng(0)
    return SparseTargets(
        head_ids_nK=random.integers(0, 150_000, (positions, head)).astype(np.int32),
        head_logprobs_nK=random.normal(size=(positions, head)).astype(np.float16).astype(np.float32),
        tail_mass_n=random.uniform(size=positions).astype(np.float16).astype(np.float32),
        tail_ids_nS=random.integers(0, 150_000, (positions, tail)).astype(np.int32),
        tail_logprobs_nS=random.normal(size=(positions, tail)).astype(np.float16).astype(np.float32),
    )


@pytest.mark.parametrize(("positions", "head", "tail"), [(5, 3, 2), (4, 3, 0), (1, 1, 1), (0, 3, 2)])
def test_signal_survives_parquet(positions: int, head: int, tail: int) -> None:
    signal = TeacherSignal(
        id="a",
        content_hash="h",
        response_ids_n=np.arange(positions, dtype=np.int32),
        answer_lengths=(positions,),
        answered_by_teacher=(True,),
        label_logprobs_n=np.linspace(-1, 0, positions, dtype=np.float32),
        targets=targets(positions, head, tail),
        visual_tokens=65,
    )
    back = TeacherSignal.from_row(through_parquet(signal.to_row(), SIGNAL_SCHEMA))
    assert len(back.targets) == positions
    for name in ("id", "content_hash", "answer_lengths", "answered_by_teacher", "visual_tokens"):
        assert getattr(back, name) == getattr(signal, name)
    for name in ("response_ids_n", "label_logprobs_n"):
        np.testing.assert_array_equal(getattr(back, name), getattr(signal, name))
    if positions:
        for name in ("head_ids_nK", "head_logprobs_nK", "tail_mass_n", "tail_ids_nS", "tail_logprobs_nS"):
            np.testing.assert_array_equal(getattr(back.targets, name), getattr(signal.targets, name))
    assert back.response_hash == hash_response(signal.response_ids_n)


def test_response_hash_tells_tokens_apart() -> None:
    one = np.array([1, 2, 3], dtype=np.int32)
    assert hash_response(one) == hash_response(np.array([1, 2, 3], dtype=np.int64).astype(np.int32))
    assert hash_response(one) == hash_response(np.array([0, 1, 2, 3], dtype=np.int32)[1:])
    assert hash_response(one) != hash_response(np.array([1, 3, 2], dtype=np.int32))
    assert hash_response(one) != hash_response(np.array([1, 2], dtype=np.int32))


def test_pair_survives_parquet() -> None:
    candidates = (Candidate("a", "student", 7, 0.5), Candidate("b", "ground_truth", 0, 1.0))
    hashed = hash_answers([np.arange(3, dtype=np.int32), np.arange(4, dtype=np.int32)])
    pair = PreferencePair(
        "id/0", "somewhere", "0f", "what?", "b", "a", "kind", candidates, "truth", 0.5, -1.25, -3.5, 17, hashed
    )
    assert PreferencePair.from_row(through_parquet(pair.to_row(), PAIR_SCHEMA)) == pair


def test_answers_hash_knows_where_one_answer_ends() -> None:
    one, other = np.array([1, 2, 3], np.int32), np.array([1, 2], np.int32)
    hashes = [hash_answers(ids) for ids in ([one, other], [other, one], [one], [other, np.array([3], np.int32)])]
    assert len(set(hashes)) == 4
    assert hash_answers([one.copy(), other]) == hashes[0]
