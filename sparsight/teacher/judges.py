"""Judges of answers: several answers to one question go in, a score for each comes out, higher for better.

Scores of one judge can be compared within a question; those of different judges have different units. A judge sees
texts, not who wrote them. Called by `pair_maker`, which keeps the best and the worst.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from sparsight.data.objects import ObjectVocabulary
from sparsight.data.turns import normalise
from sparsight.errors import DataError
from sparsight.records import Turn
from sparsight.teacher.answering import AnswerModel, check_length
from sparsight.teacher.flow import OpenSample

CAPTIONS = frozenset({"caption", "description"})
"""Answer types that are judged by the objects they mention."""

BETA_SQUARED = 0.25
"""How much a missing object costs beside an absent one that is mentioned."""

RATING_TOKENS = 16
LOWEST, HIGHEST = 1.0, 10.0

RATING_PROMPT = """\
Someone was asked about this picture: "{question}"
They answered: "{answer}"
How right is the answer? Everything it says must be in the picture, and it must answer the question. \
Reply with one number from 1 (wrong or made up) to 10 (right and complete), and nothing else."""

TEXT_RATING_PROMPT = """\
Someone was asked: "{question}"
They answered: "{answer}"
How right is the answer? Everything it says must be true, and it must answer the question. \
Reply with one number from 1 (wrong or made up) to 10 (right and complete), and nothing else."""

_NUMBER = re.compile(r"[-+]?\d+(?:[.,]\d+)?")
_OUT_OF = re.compile(r"\s*(?:/|out of)\s*10(?:\.0+)?(?![\d.,]\d|\d)", re.IGNORECASE)


@dataclass(frozen=True)
class Asked:
    """One question and the different answers to it; `seen` is what the run's teacher keeps of row and picture."""

    row: OpenSample
    seen: Any
    answers: tuple[str, ...]

    @property
    def turn(self) -> Turn:
        return self.row.sample.turns[0]


class Judge(Protocol):
    """Scores answers."""

    @property
    def name(self) -> str:
        """What pairs are marked with."""
        ...

    def score(self, asked: Sequence[Asked]) -> list[tuple[float | None, ...]]:
        """One score an answer, in order; None for an answer that this judge could not score."""
        ...


class TruthJudge:
    """Compares with the sample's own answer, which must be there.

    Closed questions: 1 for the same answer (`turns.normalise`), else 0. Captions are judged by their objects, as
    multisets: of T objects in the truth and K in the answer, M agree, P = M / K, R = M / T, and the score is

        F_β = (1 + β²) P R / (β² P + R) = (1 + β²) M / (β² T + K),  β² = 1/4,

    so 1 is perfect; mentioning one absent object adds 1 to the denominator, and an object that is left out takes away
    less. An answer that mentions nothing that is there scores 0. A caption whose truth has no object that the
    vocabulary knows is compared like a closed answer.
    """

    name = "truth"

    def __init__(self, vocabulary: ObjectVocabulary) -> None:
        self._vocabulary = vocabulary

    def score(self, asked: Sequence[Asked]) -> list[tuple[float | None, ...]]:
        return [tuple(self._score(question.turn, answer) for answer in question.answers) for question in asked]

    def _score(self, turn: Turn, answer: str) -> float:
        if turn.answer is None:
            raise DataError(f"the answer to '{turn.question}' is withheld: the judge 'truth' cannot do without")
        truth = self._vocabulary.counts(turn.answer)
        if turn.answer_type not in CAPTIONS or not truth:
            return float(normalise(answer) == normalise(turn.answer))
        said = self._vocabulary.counts(answer)
        return (1.0 + BETA_SQUARED) * (said & truth).total() / (BETA_SQUARED * truth.total() + said.total())


class LikelihoodJudge:
    """The teacher's log-prob of an answer with its end-of-turn token, in nats a token: length does not decide."""

    name = "likelihood"

    def __init__(self, teacher: AnswerModel) -> None:
        self._teacher = teacher

    @torch.inference_mode()
    def score(self, asked: Sequence[Asked]) -> list[tuple[float | None, ...]]:
        rows, seen = [question.row for question in asked], [question.seen for question in asked]
        scored = self._teacher.score(rows, seen, [question.answers for question in asked])
        return [answers.mean_logprobs for answers in scored]


class ModelJudge:
    """Asks a model, in its own chat, to mark every answer from 1 to 10; a reply that is no such mark scores None."""

    name = "model"

    def __init__(self, model: AnswerModel, batch: int) -> None:
        self._model = model
        self._batch = batch

    @torch.inference_mode()
    def score(self, asked: Sequence[Asked]) -> list[tuple[float | None, ...]]:
        rows = [rating_row(question.row, answer) for question in asked for answer in question.answers]
        marks: list[float | None] = []
        for start in range(0, len(rows), self._batch):
            marks += self._marks(rows[start : start + self._batch])
        given = iter(marks)
        return [tuple(next(given) for _ in question.answers) for question in asked]

    def _marks(self, rows: Sequence[OpenSample]) -> list[float | None]:
        seen = self._model.look(rows)
        fits = [self._fits(row, view) for row, view in zip(rows, seen, strict=True)]
        short = [(row, view) for row, view, fit in zip(rows, seen, fits, strict=True) if fit]
        replies = iter(
            self._model.answer([row for row, _ in short], [view for _, view in short], RATING_TOKENS) if short else []
        )
        return [read_rating(next(replies)[0]) if fit else None for fit in fits]

    def _fits(self, row: OpenSample, view: Any) -> bool:
        try:
            check_length(self._model, row, view, RATING_TOKENS)
        except DataError:
            return False  # a mark that cannot be asked for is none, and counted as such
        return True


def rating_row(row: OpenSample, answer: str) -> OpenSample:
    """The row with the question how right an answer is."""
    template = RATING_PROMPT if row.sample.frames else TEXT_RATING_PROMPT
    prompt = template.format(question=row.sample.turns[0].question, answer=answer)
    return replace(row, sample=replace(row.sample, turns=(Turn(prompt, None),)))


def read_rating(reply: str) -> float | None:
    """The one number from 1 to 10 in a reply ("8", "Rating: 7.5", "9/10", "8 out of 10."); None for anything else.

    A reply with two different numbers, or one outside the scale, says nothing for certain.
    """
    found = {float(number.replace(",", ".")) for number in _NUMBER.findall(_OUT_OF.sub(" ", reply))}
    if len(found) != 1:
        return None
    (mark,) = found
    return mark if LOWEST <= mark <= HIGHEST else None
