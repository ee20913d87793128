"""Intervals against textbook values and plain definitions; baselines against hand-counted answers."""

import random

import pytest

from sparsight.evaluate.answers import Answer
from sparsight.evaluate.scores import Baselines, difference, score, share, wilson
from sparsight.records import Turn


def test_wilson_interval_has_textbook_values() -> None:
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_independent_questions_get_the_plain_interval() -> None:
    right = [True, True, True, False] * 25
    found = share(right, [str(index) for index in range(100)])
    assert (found.right, found.count, found.value) == (75, 100, 0.75)
    assert (found.low, found.high) == pytest.approx(wilson(0.75, 100), rel=2e-2)


def test_questions_that_err_together_count_once_a_picture() -> None:
    right = [index % 4 != 0 for index in range(400) for _ in range(10)]
    pictures = [str(index) for index in range(400) for _ in range(10)]
    found = share(right, pictures)
    assert (found.low, found.high) == pytest.approx(wilson(0.75, 400), rel=2e-3)
    alone = share(right, [str(index) for index in range(4000)])
    assert alone.high - alone.low < 0.4 * (found.high - found.low)


@pytest.mark.parametrize("right", [[], [True], [False, False], [True] * 5])
def test_few_or_equal_answers_have_intervals_too(right: list[bool]) -> None:
    found = share(right, ["one picture"] * len(right))
    assert 0.0 <= found.low <= found.high <= 1.0
    assert found.high - found.low > 0.2


def test_intervals_cover_the_truth_about_95_times_in_100() -> None:
    rng = random.Random(0)
    covered = 0
    for _ in range(300):
        right: list[bool] = []
        pictures: list[str] = []
        for picture in range(60):
            chance = rng.choice((0.6, 1.0))  # pictures differ: half of them are always right
            right += [rng.random() < chance for _ in range(8)]
            pictures += [str(picture)] * 8
        found = share(right, pictures)
        covered += found.low <= 0.8 <= found.high
    assert covered / 300 > 0.9


def test_difference_is_paired() -> None:
    one = [True, True, False, True] * 50
    other = [True, False, False, True] * 50
    pictures = [str(index // 4) for index in range(200)]
    found = difference(one, other, pictures)
    assert found.value == 0.25
    assert (found.low, found.high) == pytest.approx((0.25, 0.25))  # the same gain in every picture
    assert difference(one, one, pictures).value == 0.0
    mixed = difference(one, other, [str(index) for index in range(200)])
    assert mixed.low < 0.25 < mixed.high


def asked(question: str, reference: str, kind: str, answer: str = "") -> Answer:
    return Answer("id", "picture", question, reference, answer, kind)


def test_baselines_answer_from_training_only() -> None:
    baselines = Baselines(
        [
            Turn("is it red?", "yes", "yes_no"),
            Turn("is it red?", "No", "yes_no"),
            Turn("is it red?", "no ", "yes_no"),
            Turn("is it blue?", "yes", "yes_no"),
            Turn("is it blue?", "yes", "yes_no"),
            Turn("what shape?", "circle", "shape"),
            Turn("what shape?", None, "shape"),
        ]
    )
    test = [
        asked("is it red?", "no", "yes_no"),
        asked("is it new?", "yes", "yes_no"),
        asked("what?", "circle", "shape"),
    ]
    assert baselines.constant == "yes"
    assert baselines.majority(test) == [False, True, False]
    assert baselines.type_majority(test) == [False, True, True]
    assert baselines.question_only(test) == [True, True, True]


def test_scores_by_answer_type_add_up() -> None:
    answers = [
        asked("q", "yes", "yes_no", "Yes"),
        asked("q", "no", "yes_no", "yes"),
        asked("q", "red", "colour", "red"),
    ]
    whole, kinds = score(answers)
    assert (whole.right, whole.count) == (2, 3)
    assert {kind: (found.right, found.count) for kind, found in kinds.items()} == {"colour": (1, 1), "yes_no": (1, 2)}
