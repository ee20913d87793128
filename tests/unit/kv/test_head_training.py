"""Training of the retrieval head: what it learns, and from which frames."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from sparsight.data.stream_questions import retrieval_clips
from sparsight.errors import DataError
from sparsight.kv.head_training import (
    ClipExample,
    HeadSchedule,
    SigmoidLoss,
    clip_example,
    fit_head,
    train_head,
)
from sparsight.kv.retrieval_head import RetrievalHead, question_words
from tests.unit.kv.tiny_host import SOURCE, tiny_host

KINDS, WIDTH = 6, 24
ONE_STEP = HeadSchedule(steps=1, batch_clips=2)


def weights_of(head: RetrievalHead) -> dict[str, list[float]]:
    return {name: value.flatten().tolist() for name, value in head.state_dict().items()}


def kind_examples(clips: int, seed: int) -> list[ClipExample]:
    """Clips of frames that show one of six kinds, in one token of four; questions that ask for one each.

    What kinds look like and what they are called has nothing in common.
    """
    generator = torch.Generator().manual_seed(seed)
    looks_KD, names_KD = torch.randn(2, KINDS, WIDTH, generator=torch.Generator().manual_seed(99))

    def example() -> ClipExample:
        kinds_F = torch.randint(KINDS, (12,), generator=generator)
        embeds_FSD = torch.randn(12, 4, WIDTH, generator=generator)
        places_F = torch.randint(4, (12,), generator=generator)
        embeds_FSD[torch.arange(12), places_F] = looks_KD[kinds_F] + 0.3 * torch.randn(12, WIDTH, generator=generator)
        evidence_QF = kinds_F == torch.arange(KINDS)[:, None]
        words_QD = names_KD + 0.1 * torch.randn(KINDS, WIDTH, generator=generator)
        return ClipExample(embeds_FSD, words_QD, evidence_QF, torch.ones(KINDS, 12, dtype=torch.bool))

    return [example() for _ in range(clips)]


@torch.inference_mode()
def found_share(head: RetrievalHead, examples: list[ClipExample]) -> float:
    """Of the questions that have evidence, how many have some of it nearest."""
    hits: list[Tensor] = []
    for example in examples:
        scores_QF = head.embed_questions(example.words_QD) @ head.embed_frames(example.embeds_FSD).T
        answered_Q = example.evidence_QF.any(dim=1)
        hits.append(example.evidence_QF.gather(1, scores_QF.argmax(dim=1, keepdim=True))[answered_Q, 0])
    return float(torch.cat(hits).float().mean())


def test_a_head_learns_what_belongs_together() -> None:
    held_out = kind_examples(40, seed=1)
    schedule = HeadSchedule(steps=150, batch_clips=16)
    untrained = fit_head(kind_examples(1, seed=0), 0, HeadSchedule(steps=1, learning_rate=0.0))
    assert found_share(untrained, held_out) < 0.35, "chance is about a fifth"
    assert found_share(fit_head(kind_examples(80, seed=0), 0, schedule), held_out) > 0.8


@torch.no_grad()
def test_frames_are_compared_inside_their_clip_pair_by_pair() -> None:
    examples = kind_examples(3, seed=0)
    examples[1] = replace(examples[1], seen_QF=torch.arange(12).expand(KINDS, 12) < 7)
    objective = SigmoidLoss(RetrievalHead(WIDTH))
    scale, bias = math.exp(objective.log_scale), float(objective.bias)
    losses: list[float] = []
    for example in examples:
        frames_FD = objective.head.embed_frames(example.embeds_FSD)
        questions_QD = objective.head.embed_questions(example.words_QD)
        for question, frame in product(range(KINDS), range(12)):
            if example.seen_QF[question, frame]:
                logit = scale * float(questions_QD[question] @ frames_FD[frame]) + bias
                right = 1 / (1 + math.exp(-logit if example.evidence_QF[question, frame] else logit))
                losses.append(-math.log(right))
    assert float(objective(examples)) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_training_is_determined_by_its_seed() -> None:
    host, clips = tiny_host(), list(retrieval_clips(SOURCE, 0))
    state = torch.get_rng_state()
    head = train_head(host, clips, 3, ONE_STEP)
    assert torch.equal(torch.get_rng_state(), state), "nobody else's random numbers change"
    assert weights_of(train_head(host, clips, 3, ONE_STEP)) == weights_of(head)
    assert weights_of(train_head(host, clips, 4, ONE_STEP)) != weights_of(head)
    with pytest.raises(DataError, match="no clip has a question about what was before"):
        train_head(host, [], 3, ONE_STEP)


def test_examples_are_what_the_clip_says() -> None:
    host = tiny_host()
    for clip in retrieval_clips(SOURCE, 0):
        example = clip_example(host, clip)
        asked = [question for question in clip.questions if question.kind == "past" and question.evidence_s]
        assert example is not None
        assert len(example.words_QD) == len(asked)
        for row, question in enumerate(asked):
            for frame in range(clip.recipe.frames):
                time_s = clip.recipe.time_s(frame)
                evidence = any(start_s <= time_s < end_s for start_s, end_s in question.evidence_s)
                assert bool(example.evidence_QF[row, frame]) == evidence
                assert bool(example.seen_QF[row, frame]) == (time_s <= question.time_s)
            torch.testing.assert_close(example.words_QD[row], question_words(host, question.question))
