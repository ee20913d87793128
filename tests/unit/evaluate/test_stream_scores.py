"""Figures about long streams."""

import math

import pytest

from sparsight.evaluate.stream_scores import (
    StreamAnswerRow,
    from_parquet,
    metrics,
    most_frequent_answers,
    score_method,
    scores,
    to_parquet,
)


def row(
    answer_type: str,
    right: bool,
    stream: str = "a",
    seconds: float = 60.0,
    recall: float = math.nan,
    method: str = "internal",
) -> StreamAnswerRow:
    return StreamAnswerRow(
        model="student",
        method=method,
        stream=stream,
        seconds=seconds,
        question_id="q",
        kind=answer_type.partition("_")[0],
        answer_type=answer_type,
        question="was there ever a red circle?",
        reference="yes",
        answer=" Yes" if right else "no",
        recall=recall,
    )


def test_a_kind_is_the_mean_over_its_types_however_often_each_was_asked() -> None:
    rows = [row("past_ever", True)] * 3 + [row("past_times", False)] + [row("now_count", True)]
    score = score_method(rows)
    found = metrics(score)
    assert score.accuracy == pytest.approx(0.8)
    assert (found["past"], found["now"]) == (0.5, 1.0)
    assert (found["now_count"], found["past_ever"], found["past_times"]) == (1.0, 1.0, 0.0)


def test_a_kind_that_was_not_asked_has_no_accuracy() -> None:
    assert "past" not in metrics(score_method([row("now_count", True)]))


def test_lengths_are_told_apart() -> None:
    rows = [row("past_ever", True, seconds=60.0), row("past_ever", False, seconds=3600.0)]
    found = metrics(score_method(rows))
    assert (found["past_60s"], found["past_3600s"], found["past"]) == (1.0, 0.0, 0.5)
    assert (found["past_ever_60s"], found["past_ever_3600s"]) == (1.0, 0.0)


def test_questions_without_evidence_do_not_count_for_recall() -> None:
    rows = [row("past_ever", True, recall=0.25), row("past_ever", True, recall=0.75), row("past_ever", True)]
    assert score_method(rows).recall == pytest.approx(0.5)
    assert "recall" not in metrics(score_method(rows[2:]))


def test_recall_is_told_apart_by_type_and_length() -> None:
    rows = [
        row("past_ever", True, recall=0.25),
        row("past_ever", True, seconds=3600.0, recall=0.75),
        row("past_order", True, seconds=3600.0, recall=0.25),
    ]
    found = metrics(score_method(rows))
    assert (found["recall_60s"], found["recall_3600s"], found["recall_past_3600s"]) == (0.25, 0.5, 0.5)
    assert (found["recall_past_ever"], found["recall_past_order"]) == (0.5, 0.25)
    assert found["recall_past_ever_3600s"] == 0.75


def test_the_most_frequent_answer_of_a_type_is_given_once_to_each_question() -> None:
    asked = [("past_ever", "yes"), ("past_ever", "no"), ("past_ever", "No"), ("now_count", "two")]
    rows = [
        row(answer_type, True, method=method, recall=0.5)._replace(question_id=str(number), reference=reference)
        for method in ("internal", "recent")
        for number, (answer_type, reference) in enumerate(asked)
    ]
    answered = most_frequent_answers(rows)
    assert [it.answer for it in answered] == ["no", "no", "no", "two"]
    found = metrics(score_method(answered))
    assert (found["past"], found["now"]) == (pytest.approx(2 / 3), 1.0)
    assert "recall" not in found


def test_answers_about_one_stream_widen_the_interval_as_they_err_together() -> None:
    together = [row("past_ever", stream == "a", stream) for stream in "ab" for _ in range(20)]
    apart = [row("past_ever", index % 2 == 0, stream) for stream in "ab" for index in range(20)]
    wide, narrow = score_method(together), score_method(apart)
    assert wide.accuracy == narrow.accuracy == pytest.approx(0.5)
    assert wide.high - wide.low > narrow.high - narrow.low


def test_models_and_methods_are_scored_apart_and_rows_survive_their_file() -> None:
    rows = [row("past_ever", True), row("past_ever", False, method="recent", recall=0.5)]
    again = from_parquet(to_parquet(rows))
    assert [it.method for it in again] == ["internal", "recent"]
    assert math.isnan(again[0].recall)
    found = scores(again)
    assert found["student", "internal"].accuracy == 1.0
    assert found["student", "recent"].accuracy == 0.0
