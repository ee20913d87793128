"""Which two of several judged answers become a pair, and when none do. Pure functions, called by `pair_maker`."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sparsight.data.pairs import DropReason
from sparsight.data.turns import normalise
from sparsight.records import Candidate


@dataclass(frozen=True)
class Choice:
    """A better and a worse answer, and all that competed."""

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    rejected: Candidate

    @property
    def margin(self) -> float:
        return self.chosen.score - self.rejected.score

    @property
    def texts(self) -> tuple[str, str]:
        return self.chosen.text, self.rejected.text


def different(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The first of each group of equal answers (`turns.normalise`), in order; empty ones are no answers."""
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        found.setdefault(normalise(candidate.text), candidate)
    return [candidate for text, candidate in found.items() if text]


def rated(candidates: Sequence[Candidate], scores: Sequence[float | None]) -> tuple[Candidate, ...]:
    """The candidates with their scores; NaN where the judge gave none."""
    return tuple(
        replace(candidate, score=math.nan if score is None else float(score))
        for candidate, score in zip(candidates, scores, strict=True)
    )


def unrated(candidates: Iterable[Candidate]) -> int:
    """How many candidates the judge could not score."""
    return sum(math.isnan(candidate.score) for candidate in candidates)


def choose(candidates: Sequence[Candidate], min_margin: float) -> Choice | DropReason:
    """The pair with the largest margin, or why there is none.

    Of equally good answers the earlier one is taken, and of equally bad ones too: candidates stand in the order
    student, teacher, ground truth, so ties go to words that the student itself is likely to say. Candidates without a
    score take no part.
    """
    if len(candidates) < 2:
        return "alike"
    judged = [candidate for candidate in candidates if not math.isnan(candidate.score)]
    if len(judged) < 2:
        return "unrated"
    best = max(judged, key=lambda candidate: candidate.score)
    worst = min(judged, key=lambda candidate: candidate.score)
    choice = Choice(tuple(candidates), best, worst)
    return "margin" if choice.margin <= 0.0 or choice.margin < min_margin else choice
