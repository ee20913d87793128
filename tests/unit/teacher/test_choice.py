"""Which answers become a pair: by hand."""

import math

import pytest

from sparsight.records import Candidate
from sparsight.teacher.choice import Choice, choose, different, rated, unrated


def candidates(*scores: float) -> list[Candidate]:
    return [Candidate(f"answer {number}", "student", number, score) for number, score in enumerate(scores)]


def chosen(*scores: float, min_margin: float = 0.0) -> tuple[int, int]:
    choice = choose(candidates(*scores), min_margin)
    assert isinstance(choice, Choice)
    return choice.chosen.seed, choice.rejected.seed


def test_best_and_worst_are_taken_and_ties_go_to_the_earlier() -> None:
    assert chosen(0.5, 1.0, 0.0) == (1, 2)
    assert chosen(0.0, 1.0, 0.0, 1.0) == (1, 0)
    assert chosen(math.nan, 3.0, math.nan, 9.0) == (3, 1)


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ((), "alike"),
        ((1.0,), "alike"),
        ((math.nan, 1.0), "unrated"),
        ((math.nan, math.nan, math.nan), "unrated"),
        ((1.0, 1.0, 1.0), "margin"),
        ((0.75, 0.5, 0.75), "margin"),
    ],
)
def test_reasons_for_no_pair(scores: tuple[float, ...], reason: str) -> None:
    assert choose(candidates(*scores), min_margin=0.5) == reason


def test_the_margin_may_be_reached_exactly() -> None:
    assert chosen(0.5, 1.0, min_margin=0.5) == (1, 0)


def test_equal_answers_are_one_and_empty_ones_none() -> None:
    texts = ["Red  circle", "", "red circle", "blue", " ", "BLUE", "red"]
    found = different(Candidate(text, "student", number, 0.0) for number, text in enumerate(texts))
    assert [candidate.seed for candidate in found] == [0, 3, 6]


def test_scores_that_a_judge_did_not_give_are_counted() -> None:
    scored = rated(candidates(0.0, 0.0, 0.0), [1.0, None, 2.0])
    assert [candidate.score for candidate in scored] == pytest.approx([1.0, math.nan, 2.0], nan_ok=True)
    assert unrated(scored) == 1
