"""Judges by hand: what each score must be, and replies that are no rating."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsight.data.objects import ObjectVocabulary
from sparsight.errors import DataError
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import Sample, Turn
from sparsight.teacher.answering import DrawSettings, ScoredAnswers
from sparsight.teacher.flow import OpenSample, open_sample
from sparsight.teacher.judges import Asked, Judge, LikelihoodJudge, ModelJudge, TruthJudge, rating_row, read_rating
from sparsight.teacher.vision_language import OneVisionModel

CAPTION = Turn("list the shapes.", "red circle, blue rectangle, red circle, teal triangle", "caption")


def asked(turn: Turn, answers: Sequence[str], seen: Any = None) -> Asked:
    sample = Sample("row", (b"",), (turn,), "test")
    return Asked(OpenSample(0, sample, ()), seen, tuple(answers))


def scores_of(judge: Judge, turn: Turn, *answers: str) -> list[float | None]:
    return list(judge.score([asked(turn, answers)])[0])


def test_closed_answers_are_right_or_wrong() -> None:
    judge = TruthJudge(ObjectVocabulary.scenes())
    yes = Turn("is there a red circle?", "yes", "existence")
    assert scores_of(judge, yes, "yes", "no", " YES ", "yes, there is", "") == [1.0, 0.0, 1.0, 0.0, 0.0]


def test_captions_are_scored_by_their_objects() -> None:
    """F with β² = 1/4 of four true objects: 1.25 M / (1 + K)."""
    judge = TruthJudge(ObjectVocabulary.scenes())
    assert scores_of(
        judge,
        CAPTION,
        "teal triangle, red circle, blue rectangle, red circle",  # all four, in another order
        "two red circles, a blue square and a teal triangle",  # the same in other words
        "red circle, blue rectangle, red circle",  # one missing
        "red circle, blue rectangle, red circle, teal triangle, black circle",  # one that is not there
        "red circle, blue rectangle, red circle, teal triangle, red circle",  # one too many
        "red circle",
        "black circle",
        "some shapes",
    ) == pytest.approx([1.0, 1.0, 3.75 / 4, 5 / 6, 5 / 6, 1.25 / 2, 0.0, 0.0])


def test_mentioning_an_absent_object_costs_more_than_leaving_one_out() -> None:
    judge = TruthJudge(ObjectVocabulary.scenes())
    missing, extra = scores_of(
        judge,
        Turn("?", "red circle, blue rectangle", "caption"),
        "red circle",
        "red circle, blue rectangle, red square",
    )
    assert missing is not None
    assert extra is not None
    assert 0.0 < missing < 1.0
    assert 0.0 < extra < 1.0
    assert scores_of(judge, CAPTION, "red circle, blue rectangle, teal triangle")[0] > extra


def test_a_caption_without_known_objects_is_compared_as_it_is() -> None:
    judge = TruthJudge(ObjectVocabulary.scenes())
    assert scores_of(judge, Turn("describe", "an empty field", "caption"), "an empty  field", "red circle") == [
        1.0,
        0.0,
    ]


def test_truth_is_needed() -> None:
    with pytest.raises(DataError, match="withheld"):
        TruthJudge(ObjectVocabulary.scenes()).score([asked(replace(CAPTION, answer=None), ["a"])])


@torch.inference_mode()
def test_likelihood_is_the_teachers_log_prob_a_token(
    teacher_directory: Path, new_sample: Callable[..., Sample]
) -> None:
    model = OneVisionModel(VisionLanguageModel.load(teacher_directory))
    row = open_sample(0, new_sample(0, turns=1), 10**6, 10**6)
    assert isinstance(row, OpenSample)
    (seen,) = model.look([row])
    answers = ("red", "a big blue triangle", "yes yes yes yes yes")
    (scores,) = LikelihoodJudge(model).score([Asked(row, seen, answers)])
    for answer, score in zip(answers, scores, strict=True):
        (alone,) = model.score([row], [seen], [[answer]])
        assert score == pytest.approx(alone.logprobs[0] / len(alone.ids[0]), abs=1e-5)


def test_a_rating_speaks_of_a_picture_where_there_is_one() -> None:
    row = asked(Turn("how many?", "two"), []).row
    text = replace(row, sample=replace(row.sample, frames=(), frame_times_s=()))
    prompts = [rating_row(one, "three").sample.turns[0].question for one in (row, text)]
    assert ["picture" in prompt for prompt in prompts] == [True, False]
    assert all('"how many?"' in prompt and '"three"' in prompt for prompt in prompts)


@pytest.mark.parametrize(
    ("reply", "mark"),
    [
        ("8", 8.0),
        (" 10. ", 10.0),
        ("Rating: 7.5", 7.5),
        ("7,5", 7.5),
        ("I would say 9/10", 9.0),
        ("10/10", 10.0),
        ("8 out of 10.", 8.0),
        ("**3**", 3.0),
        ("6, yes 6", 6.0),
        ("", None),
        ("good", None),
        ("0", None),
        ("11", None),
        ("-3", None),
        ("between 3 and 5", None),
        ("3-5", None),
        ("100", None),
        ("8/100", None),
    ],
)
def test_a_rating_is_one_number_of_the_scale(reply: str, mark: float | None) -> None:
    assert read_rating(reply) == mark


class Replies:
    """A model that answers from a list, to see what a judge asks and makes of replies."""

    max_positions = 10_000

    def __init__(self, replies: Sequence[str]) -> None:
        self.replies = list(replies)
        self.prompts: list[str] = []

    def look(self, rows: Sequence[OpenSample]) -> list[Any]:
        return [None] * len(rows)

    def prompt_tokens(self, row: OpenSample, seen: Any) -> int:
        return len(row.sample.turns[0].question)

    def answer_tokens(self, text: str) -> int:
        return len(text)

    def answer(self, rows: Sequence[OpenSample], seen: Sequence[Any], max_tokens: int) -> list[tuple[str, ...]]:
        self.prompts += [row.sample.turns[0].question for row in rows]
        assert all(row.sample.turns[0].answer is None for row in rows)
        return [(self.replies.pop(0),) for _ in rows]

    def draw(
        self, rows: Sequence[OpenSample], seen: Sequence[Any], seeds: Sequence[Sequence[int]], settings: DrawSettings
    ) -> list[list[str]]:
        raise NotImplementedError

    def score(
        self, rows: Sequence[OpenSample], seen: Sequence[Any], answers: Sequence[Sequence[str]]
    ) -> list[ScoredAnswers]:
        raise NotImplementedError


def test_a_model_marks_every_answer_and_unreadable_marks_are_none() -> None:
    model = Replies(["9", "no idea", "2/10"])
    marks = ModelJudge(model, batch=2).score([asked(CAPTION, ["one", "two"]), asked(CAPTION, ["three"])])
    assert marks == [(9.0, None), (2.0,)]
    assert all(CAPTION.question in prompt for prompt in model.prompts)
    assert ['"one"' in model.prompts[0], '"two"' in model.prompts[1], '"three"' in model.prompts[2]] == [True] * 3


def test_an_answer_too_long_to_be_marked_is_not() -> None:
    model = Replies(["9"])
    assert ModelJudge(model, batch=8).score([asked(CAPTION, ["x" * 20_000, "short"])]) == [(None, 9.0)]
