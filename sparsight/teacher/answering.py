"""What pair making needs of a model: several drawn answers to one question, and how probable given answers are.

`AnswerModel` is the role. Both kinds of teacher play it, and a student does through `vision_language.OneVisionModel`.
Rows here ask exactly one question. Called by `pair_maker` and `judges`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sparsight.errors import DataError
from sparsight.records import hash_answers
from sparsight.teacher.flow import OpenSample


@dataclass(frozen=True)
class DrawSettings:
    """How answers are drawn; see `model.sampling.SamplingSettings`."""

    temperature: float
    top_p: float
    max_tokens: int


@dataclass(frozen=True)
class ScoredAnswers:
    """What a model makes of several answers to one question.

    `logprobs` are log π(answer | picture, question) in nats, summed over the answer's tokens with its end-of-turn
    token, in `ids`; `visual_tokens` is what the picture took.
    """

    logprobs: tuple[float, ...]
    ids: tuple[npt.NDArray[np.int32], ...]
    visual_tokens: int

    @property
    def mean_logprobs(self) -> tuple[float, ...]:
        """Log-prob a token, in nats."""
        return tuple(total / len(ids_n) for total, ids_n in zip(self.logprobs, self.ids, strict=True))

    @property
    def answers_hash(self) -> bytes:
        return hash_answers(self.ids)


class AnswerModel(Protocol):
    """A model that answers questions about pictures and can be asked how probable an answer is."""

    @property
    def max_positions(self) -> int: ...

    def look(self, rows: Sequence[OpenSample]) -> list[Any]:
        """What the model keeps of each row's pictures and question."""
        ...

    def prompt_tokens(self, row: OpenSample, seen: Any) -> int:
        """How long the row's prompt is, its picture included."""
        ...

    def answer_tokens(self, text: str) -> int:
        """How many tokens a given answer takes, its end-of-turn token included."""
        ...

    def answer(self, rows: Sequence[OpenSample], seen: Sequence[Any], max_tokens: int) -> list[tuple[str, ...]]:
        """One answer to each row's question, greedily."""
        ...

    def draw(
        self, rows: Sequence[OpenSample], seen: Sequence[Any], seeds: Sequence[Sequence[int]], settings: DrawSettings
    ) -> list[list[str]]:
        """One answer a row and seed, each from a random stream of its own; every row has as many seeds."""
        ...

    def score(
        self, rows: Sequence[OpenSample], seen: Sequence[Any], answers: Sequence[Sequence[str]]
    ) -> list[ScoredAnswers]:
        """Every row's answers, each scored as if it alone followed the question; at least one a row."""
        ...


def check_length(model: AnswerModel, row: OpenSample, seen: Any, answer_tokens: int) -> None:
    """Raises `DataError` where the prompt and an answer of so many tokens do not fit the model."""
    prompt = model.prompt_tokens(row, seen)
    if prompt + answer_tokens > model.max_positions:
        raise DataError(
            f"the question takes {prompt} tokens and its answer up to {answer_tokens}, the model reads at most "
            f"{model.max_positions}: shorten it"
        )
