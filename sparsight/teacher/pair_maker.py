"""From questions to preference pairs: draw answers, judge them, keep the best and the worst, score both.

Student and teacher draw candidates from random streams of their own (seed, row, number), so a pair depends on its
question, the models and the settings, not on its neighbours. A question without a pair comes out as `Dropped`, one
that cannot be asked as `Quarantined`. Ready-made pairs are only scored. The Ray shell is `actors.pair_worker`; what is
asked, and where pairs end up, is `pipelines.pairs`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from sparsight.config import PairsConfig
from sparsight.data.pairs import Dropped
from sparsight.errors import DataError
from sparsight.model.sampling import stream_seed
from sparsight.records import Candidate, PreferencePair, Quarantined, Sample
from sparsight.teacher.answering import AnswerModel, DrawSettings, ScoredAnswers, check_length
from sparsight.teacher.choice import Choice, choose, different, rated, unrated
from sparsight.teacher.flow import OpenSample, batches, open_sample, text_size
from sparsight.teacher.judges import Asked, Judge

Outcome = PreferencePair | Dropped | Quarantined

IMPORTED = "imported"
"""The judge of pairs that were ready-made: whoever made them."""


@dataclass(frozen=True)
class PairSettings:
    """How pairs are made, and the limits under which pictures are opened."""

    pairs: PairsConfig
    seed: int = 0
    max_picture_bytes: int = 20_000_000
    max_picture_pixels: int = 50_000_000

    @property
    def content(self) -> dict[str, Any]:
        """The settings that change what a row says or which rows there are; batch and file sizes do not."""
        settings = self.pairs.model_dump(mode="json", exclude={"batch_prompts", "rows_per_file"})
        limits = {"max_picture_bytes": self.max_picture_bytes, "max_picture_pixels": self.max_picture_pixels}
        return {**settings, "seed": self.seed, **limits}


class Prompt(NamedTuple):
    """One question and its picture as both models see them; `shown` is the student's view, None where there is none."""

    row: OpenSample
    seen: Any
    shown: Any

    @property
    def place(self) -> int:
        return self.row.place


class PairMaker:
    """Makes pairs for one student with one teacher. Ready-made pairs are scored without `student` and `judge`."""

    def __init__(
        self,
        teacher: AnswerModel,
        settings: PairSettings,
        student: AnswerModel | None = None,
        judge: Judge | None = None,
    ) -> None:
        self._teacher = teacher
        self._student = student
        self._judge = judge
        self._settings = settings

    def make(self, samples: Sequence[Sample]) -> list[Outcome]:
        """One outcome a sample, in order. Every sample asks one question; its own answer may be None."""
        judge = self._judge
        if judge is None:
            raise ValueError("making pairs takes a judge")
        return self._work(samples, lambda prompts: self._judged(prompts, judge), self._room_to_draw)

    def score_given(self, samples: Sequence[Sample]) -> list[Outcome]:
        """One outcome a sample, in order. Every sample's two turns ask the same; the first answer is the better one."""
        answers = [[str(turn.answer) for turn in sample.turns] for sample in samples]
        return self._work(
            [replace(sample, turns=sample.turns[:1]) for sample in samples],
            lambda prompts: self._given(prompts, [answers[prompt.place] for prompt in prompts]),
            lambda prompt: self._room_for(prompt, answers[prompt.place]),
        )

    @torch.inference_mode()
    def _work(
        self,
        samples: Sequence[Sample],
        work: Callable[[Sequence[Prompt]], Iterable[Outcome]],
        check: Callable[[Prompt], None],
    ) -> list[Outcome]:
        """Open all rows, look at their pictures, and give rows of similar length to `work` together."""
        size = self._settings.pairs.batch_prompts
        outcomes: dict[int, Outcome] = {}
        rows: list[OpenSample] = []
        for place, sample in enumerate(samples):
            opened = open_sample(place, sample, self._settings.max_picture_bytes, self._settings.max_picture_pixels)
            if isinstance(opened, Quarantined):
                outcomes[place] = opened
            else:
                rows.append(opened)
        prompts: list[Prompt] = []
        for start in range(0, len(rows), size):  # questions about one picture stand side by side: it is seen once
            for prompt in self._look(rows[start : start + size]):
                try:
                    check(prompt)
                    prompts.append(prompt)
                except DataError as error:
                    sample = prompt.row.sample
                    outcomes[prompt.place] = Quarantined(sample.id, sample.source, str(error))
        for batch in batches(prompts, size, lambda prompt: text_size(prompt.row)):
            for prompt, outcome in zip(batch, work(batch), strict=True):
                outcomes[prompt.place] = outcome
        return [outcomes[place] for place in range(len(samples))]

    def _look(self, rows: Sequence[OpenSample]) -> list[Prompt]:
        seen = self._teacher.look(rows)
        shown = [None] * len(rows) if self._student is None else self._student.look(rows)
        return [Prompt(*views) for views in zip(rows, seen, shown, strict=True)]

    def _room_to_draw(self, prompt: Prompt) -> None:
        """Raises `DataError` where a model has no room for the question and an answer."""
        pairs = self._settings.pairs
        check_length(self._teacher, prompt.row, prompt.seen, pairs.max_answer_tokens)
        if self._student is not None:
            check_length(self._student, prompt.row, prompt.shown, pairs.max_answer_tokens)
        truth = prompt.row.sample.turns[0].answer
        if pairs.include_truth and truth is not None:
            self._room_for(prompt, [truth])

    def _room_for(self, prompt: Prompt, answers: Sequence[str]) -> None:
        longest = max(self._teacher.answer_tokens(answer) for answer in answers)
        check_length(self._teacher, prompt.row, prompt.seen, longest)

    def _judged(self, prompts: Sequence[Prompt], judge: Judge) -> list[Outcome]:
        drawn = self._candidates(prompts)
        competing = [index for index, candidates in enumerate(drawn) if len(candidates) > 1]
        asked = [
            Asked(prompts[index].row, prompts[index].seen, tuple(candidate.text for candidate in drawn[index]))
            for index in competing
        ]
        for index, scores in zip(competing, judge.score(asked) if asked else [], strict=True):
            drawn[index] = rated(drawn[index], scores)
        outcomes: list[Outcome | None] = [None] * len(prompts)
        chosen: dict[int, Choice] = {}
        for index, (prompt, candidates) in enumerate(zip(prompts, drawn, strict=True)):
            choice = choose(candidates, self._settings.pairs.min_margin)
            if isinstance(choice, Choice):
                chosen[index] = choice
            else:
                sample = prompt.row.sample
                silent = unrated(candidates) if index in competing else 0
                outcomes[index] = Dropped(sample.id, sample.source, choice, silent)
        made = self._pairs([(prompts[index], choice) for index, choice in chosen.items()], judge.name)
        for index, pair in zip(chosen, made, strict=True):
            outcomes[index] = pair
        return [outcome for outcome in outcomes if outcome is not None]

    def _given(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[Outcome]:
        pairs: list[tuple[Prompt, Choice]] = []
        for prompt, (better, worse) in zip(prompts, answers, strict=True):
            both = Candidate(better, IMPORTED, 0, 1.0), Candidate(worse, IMPORTED, 0, 0.0)
            pairs.append((prompt, Choice(both, *both)))
        return list(self._pairs(pairs, IMPORTED))

    def _pairs(self, pairs: Sequence[tuple[Prompt, Choice]], judge: str) -> list[PreferencePair]:
        """The rows of chosen pairs, both answers of each scored in one forward pass that shares the picture."""
        if not pairs:
            return []
        rows, seen = [prompt.row for prompt, _ in pairs], [prompt.seen for prompt, _ in pairs]
        scores = self._teacher.score(rows, seen, [choice.texts for _, choice in pairs])
        return [
            pair_of(prompt.row.sample, choice, judge, scored)
            for (prompt, choice), scored in zip(pairs, scores, strict=True)
        ]

    def _candidates(self, prompts: Sequence[Prompt]) -> list[Sequence[Candidate]]:
        """Every prompt's different answers, not judged yet: the student's, the teacher's, the truth."""
        pairs = self._settings.pairs
        student = self._drawn(
            "student", self._student, prompts, [prompt.shown for prompt in prompts], pairs.student_candidates
        )
        teacher = self._drawn(
            "teacher", self._teacher, prompts, [prompt.seen for prompt in prompts], pairs.teacher_candidates
        )
        found: list[Sequence[Candidate]] = []
        for prompt, *drawn in zip(prompts, student, teacher, strict=True):
            candidates = [candidate for own in drawn for candidate in own]
            truth = prompt.row.sample.turns[0].answer
            if pairs.include_truth and truth is not None:
                candidates.append(Candidate(truth, "ground_truth", 0, math.nan))
            found.append(different(candidates))
        return found

    def _drawn(
        self,
        origin: Literal["student", "teacher"],
        model: AnswerModel | None,
        prompts: Sequence[Prompt],
        views: Sequence[Any],
        count: int,
    ) -> list[list[Candidate]]:
        if model is None or count == 0:
            return [[] for _ in prompts]
        pairs = self._settings.pairs
        rows = [prompt.row for prompt in prompts]
        seeds = [
            [stream_seed(self._settings.seed, f"{origin}\n{row.sample.id}", number) for number in range(count)]
            for row in rows
        ]
        settings = DrawSettings(pairs.temperature, pairs.top_p, pairs.max_answer_tokens)
        texts = model.draw(rows, views, seeds, settings)
        return [
            [Candidate(text, origin, seed, math.nan) for text, seed in zip(own, streams, strict=True)]
            for own, streams in zip(texts, seeds, strict=True)
        ]


def pair_of(sample: Sample, choice: Choice, judge: str, scored: ScoredAnswers) -> PreferencePair:
    """The row of a pair; `scored` are the teacher's scores of the chosen and the rejected answer."""
    turn = sample.turns[0]
    chosen, rejected = scored.logprobs
    return PreferencePair(
        id=sample.id,
        source=sample.source,
        content_hash=sample.content_hash,
        question=turn.question,
        chosen=choice.chosen.text,
        rejected=choice.rejected.text,
        answer_type=turn.answer_type,
        candidates=choice.candidates,
        judge=judge,
        margin=choice.margin,
        teacher_chosen_logprob=chosen,
        teacher_rejected_logprob=rejected,
        visual_tokens=scored.visual_tokens,
        answers_hash=scored.answers_hash,
    )
