"""Right and wrong answers become accuracies with honest intervals, differences, and baselines without a picture.

Questions about one picture err together, so all intervals are taken over pictures (docs/protocol.md). Knows nothing
of models.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from sparsight.data.turns import normalise
from sparsight.evaluate.answers import Answer
from sparsight.records import Turn

Z_95 = 1.959963984540054


class Share(BaseModel):
    """So many right of so many, with a 95 % interval of the share."""

    model_config = ConfigDict(frozen=True)

    right: int
    count: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.right / self.count if self.count else math.nan


class Ratio(BaseModel):
    """A ratio of sums in [0, 1] that need not be whole numbers, with a 95 % interval."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float
    high: float


class Difference(BaseModel):
    """How much more of the same questions one model answers right than another, with a 95 % interval."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float
    high: float


def share(right: Sequence[bool], pictures: Sequence[str]) -> Share:
    """Share of right questions; see `ratio` for its interval."""
    if not right:
        return Share(right=0, count=0, low=0.0, high=1.0)
    found = ratio(right, [1.0] * len(right), pictures)
    return Share(right=sum(right), count=len(right), low=found.low, high=found.high)


def ratio(part: Sequence[float], whole: Sequence[float], pictures: Sequence[str]) -> Ratio:
    """Sum of `part` over sum of `whole` (0 <= part <= whole, their sum above 0), row by row about `pictures`.

    The Wilson interval with the sum of `whole` as the number of trials, divided by the design effect of pictures (at
    least 1): the variance of the ratio between pictures (ratio estimator) over that of independent trials.
    """
    part_P = _per_picture(np.asarray(part, dtype=np.float64), pictures)
    whole_P = _per_picture(np.asarray(whole, dtype=np.float64), pictures)
    N = float(whole_P.sum())
    value = float(part_P.sum() / N)
    independent = value * (1.0 - value) / N
    effect = max(1.0, _variance(part_P, whole_P) / independent) if independent > 0.0 else 1.0
    low, high = wilson(value, N / effect)
    return Ratio(value=value, low=low, high=high)


def wilson(value: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share `value` seen on `count` independent trials."""
    spread = Z_95 * math.sqrt(value * (1.0 - value) / count + Z_95**2 / (4.0 * count**2))
    middle, scale = value + Z_95**2 / (2.0 * count), 1.0 + Z_95**2 / count
    low, high = (middle - spread) / scale, (middle + spread) / scale
    return max(0.0, min(low, value)), min(1.0, max(high, value))  # rounding must not leave the value outside


def difference(right: Sequence[bool], than: Sequence[bool], pictures: Sequence[str]) -> Difference:
    """Paired by question: share of `right` minus share of `than`, interval from the variance between pictures."""
    gains = np.asarray(right, dtype=np.float64) - np.asarray(than, dtype=np.float64)
    gain_P, count_P = _per_picture(gains, pictures), _per_picture(np.ones(len(gains)), pictures)
    value = float(gains.mean())
    half = Z_95 * math.sqrt(_variance(gain_P, count_P))
    return Difference(value=value, low=value - half, high=value + half)


def _per_picture(values_N: npt.NDArray[np.float64], pictures: Sequence[str]) -> npt.NDArray[np.float64]:
    """Sums over the rows of each picture, in a fixed order of pictures."""
    _, index_N = np.unique(np.asarray(pictures), return_inverse=True)
    return np.bincount(index_N, values_N).astype(np.float64)


def _variance(sum_P: npt.NDArray[np.float64], whole_P: npt.NDArray[np.float64]) -> float:
    """Variance of Σ sum / Σ whole when pictures are drawn, not questions; 0 where there is one picture only."""
    P, N = len(sum_P), whole_P.sum()
    if P < 2:
        return 0.0
    rest_P = sum_P - sum_P.sum() / N * whole_P
    return float(P / (P - 1) * (rest_P**2).sum() / N**2)


def answer_types(answers: Iterable[Answer]) -> list[str]:
    """All answer types, sorted."""
    return sorted({answer.answer_type for answer in answers})


def score(answers: Sequence[Answer]) -> tuple[Share, dict[str, Share]]:
    """Accuracy over all answers, and by answer type."""

    def over(chosen: Sequence[Answer]) -> Share:
        return share([answer.correct for answer in chosen], [answer.picture for answer in chosen])

    kinds = {kind: over([a for a in answers if a.answer_type == kind]) for kind in answer_types(answers)}
    return over(answers), kinds


class Baselines:
    """The most frequent training answers: over all questions, by answer type, and by question text.

    Ties go to the answer that comes first in the alphabet. Turns without an answer are left out.
    """

    def __init__(self, turns: Iterable[Turn]) -> None:
        overall: Counter[str] = Counter()
        kinds: dict[str, Counter[str]] = {}
        questions: dict[str, Counter[str]] = {}
        for turn in turns:
            if turn.answer is not None:
                answer = normalise(turn.answer)
                overall[answer] += 1
                kinds.setdefault(turn.answer_type, Counter())[answer] += 1
                questions.setdefault(normalise(turn.question), Counter())[answer] += 1
        self.constant = _most(overall)
        self.by_type = {kind: _most(counts) for kind, counts in kinds.items()}
        self.by_question = {question: _most(counts) for question, counts in questions.items()}

    def majority(self, answers: Sequence[Answer]) -> list[bool]:
        """Whether the one most frequent answer is right, question by question."""
        return [self.constant == normalise(answer.reference) for answer in answers]

    def type_majority(self, answers: Sequence[Answer]) -> list[bool]:
        """Whether the most frequent answer of the question's type is right."""
        return [self._of_type(answer) == normalise(answer.reference) for answer in answers]

    def question_only(self, answers: Sequence[Answer]) -> list[bool]:
        """Whether the most frequent training answer to the same question text is right; unseen: the type's."""
        said = [self.by_question.get(normalise(answer.question), self._of_type(answer)) for answer in answers]
        return [text == normalise(answer.reference) for text, answer in zip(said, answers, strict=True)]

    def _of_type(self, answer: Answer) -> str:
        return self.by_type.get(answer.answer_type, self.constant)


def _most(counts: Counter[str]) -> str:
    return min(counts, key=lambda text: (-counts[text], text), default="")
