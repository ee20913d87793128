"""Rows for preference: a question about a picture with its chosen and its rejected answer, side by side.

A row is only made when the student cuts both answers into the very tokens that the teacher was asked about; a
disagreement is an `AlignmentError` with the row's id. Called by the pipelines before training starts.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsight.distill.rows import check_tokenizer, misfit
from sparsight.media.chat import ChatEncoder, EncodedAnswers
from sparsight.records import PreferencePair, hash_answers

_AGAIN = "make the pairs again"


@dataclass(frozen=True)
class PairRow:
    """One pair to learn from: `answers` are the chosen answer and the rejected one, after the prompt that they share.

    `teacher_logprobs` are the teacher's, summed over each of the two answers.
    """

    id: str
    content_hash: str
    answers: EncodedAnswers
    teacher_logprobs: tuple[float, float]

    def __len__(self) -> int:
        return len(self.answers.input_ids)

    @property
    def positions_n(self) -> npt.NDArray[np.int64]:
        return self.answers.positions_n

    @property
    def chosen_tokens(self) -> int:
        start, end = self.answers.answer_spans[0]
        return end - start


@dataclass(frozen=True)
class PairRowMaker:
    """Encodes pairs for one student and checks them against what the teacher saw.

    `visual_tokens(frames)` is what a clip costs the student; `frames` says how many frames the student's samples hold
    of each content hash; `vocabulary` is the number of ids that both the teacher and the student know.
    """

    chat: ChatEncoder
    visual_tokens: Callable[[int], int]
    vocabulary: int
    frames: Mapping[str, int]
    same_visual_tokens: bool = True

    def check_tokenizer(self, fingerprint: str | None) -> None:
        """Raises `AlignmentError` unless the pairs were scored with the student's tokenizer."""
        check_tokenizer("pairs", fingerprint, self.chat.tokenizer_fingerprint)

    def rows(self, pairs: Iterable[PreferencePair]) -> list[PairRow]:
        """All pairs as rows, in order. Raises `AlignmentError` for one that does not fit."""
        return [self.align(pair) for pair in pairs]

    def align(self, pair: PreferencePair) -> PairRow:
        """One pair as a row."""
        frames = self.frames.get(pair.content_hash)
        if frames is None:
            raise misfit(pair.id, "its picture is not among the student's samples", _AGAIN)
        visual_tokens = self.visual_tokens(frames)
        if self.same_visual_tokens and visual_tokens != pair.visual_tokens:
            raise misfit(
                pair.id,
                f"its picture takes {pair.visual_tokens} tokens for the teacher, {visual_tokens} for the student",
                "use towers and patch sizes that agree, or set distill.same_visual_tokens: false",
            )
        answers = self.chat.encode_answers(pair.question, [pair.chosen, pair.rejected], visual_tokens)
        chosen_ids, rejected_ids = answers.answer_ids(0), answers.answer_ids(1)
        if hash_answers([chosen_ids, rejected_ids]) != pair.answers_hash:
            raise misfit(pair.id, "the student cuts its answers into other tokens", "use the teacher's tokenizer")
        if np.array_equal(chosen_ids, rejected_ids):
            raise misfit(pair.id, "its two answers are the same", _AGAIN)
        highest = int(max(chosen_ids.max(), rejected_ids.max()))
        if highest >= self.vocabulary:
            raise misfit(
                pair.id,
                f"its answers hold token {highest}, the smaller head ends at {self.vocabulary}",
                "use a student and a teacher of one vocabulary",
            )
        logprobs = (pair.teacher_chosen_logprob, pair.teacher_rejected_logprob)
        if not all(math.isfinite(logprob) and logprob <= 0.0 for logprob in logprobs):
            raise misfit(pair.id, f"the teacher's log-probs {logprobs} are none", _AGAIN)
        return PairRow(pair.id, pair.content_hash, answers, logprobs)
