"""Pairs from tiny models: what a row says, that it says it alone or in company, and what comes of rows without one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsight.config import PairsConfig, UpcycleConfig
from sparsight.data.pairs import Dropped
from sparsight.data.turns import normalise
from sparsight.media.images import decode
from sparsight.media.pixels import to_pixels
from sparsight.model.sampling import stream_seed
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import PreferencePair, Quarantined, Sample, Turn, hash_answers
from sparsight.teacher.load import TeacherSource
from sparsight.teacher.pair_maker import PairMaker, PairSettings
from sparsight.teacher.pair_models import PairModels, load_pair_maker

PAIRS: dict[str, Any] = {
    "judge": "likelihood",
    "student_candidates": 3,
    "teacher_candidates": 2,
    "temperature": 12.0,
    "max_answer_tokens": 5,
    "min_margin": 0.05,
}


@pytest.fixture(scope="module")
def models(teacher_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> PairModels:
    """A sparse student that has drifted away from the teacher."""
    student = upcycle(VisionLanguageModel.load(teacher_directory), UpcycleConfig(), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in student.text_model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    folder = tmp_path_factory.mktemp("student")
    student.save(folder)
    return PairModels(TeacherSource("tiny", str(teacher_directory)), TeacherSource("tiny", str(folder)))


def maker(models: PairModels, **settings: Any) -> PairMaker:
    return load_pair_maker(models, PairSettings(PairsConfig.model_validate({**PAIRS, **settings}), seed=5))


def pairs_of(outcomes: Sequence[object]) -> list[PreferencePair]:
    return [outcome for outcome in outcomes if isinstance(outcome, PreferencePair)]


def live_logprob(model: VisionLanguageModel, sample: Sample, answer: str) -> float:
    """An answer's summed log-prob in the stock model's own forward pass, alone."""
    chat = model.chat.encode([Turn(sample.turns[0].question, answer)], model.visual_tokens(len(sample.frames)))
    shown = {"pixel_values_videos": to_pixels([decode(frame) for frame in sample.frames], model.pixels)[None]}
    with torch.inference_mode():
        logits_TV = model.model(input_ids=torch.tensor([chat.input_ids]), **(shown if sample.frames else {})).logits[0]
    logprobs_TV = logits_TV.double().log_softmax(dim=-1)
    return sum(float(logprobs_TV[at - 1, chat.input_ids[at]]) for at in chat.response_positions_n)


def test_stored_log_probs_are_those_of_the_live_teacher(models: PairModels, new_sample: Callable[..., Sample]) -> None:
    samples = [new_sample(number, turns=1, frames=int(number < 6)) for number in range(10)]  # some are text alone
    teacher = VisionLanguageModel.load(models.teacher.uri)
    pairs = pairs_of(maker(models).make(samples))
    assert len(pairs) > 6
    by_id = {sample.id: sample for sample in samples}
    for pair in pairs:
        sample = by_id[pair.id]
        assert pair.teacher_chosen_logprob == pytest.approx(live_logprob(teacher, sample, pair.chosen), abs=1e-4)
        assert pair.teacher_rejected_logprob == pytest.approx(live_logprob(teacher, sample, pair.rejected), abs=1e-4)
        turns = [Turn(pair.question, text) for text in (pair.chosen, pair.rejected)]
        ids = [teacher.chat.encode([turn], pair.visual_tokens).response_ids_n for turn in turns]
        assert pair.answers_hash == hash_answers(ids)
        assert pair.visual_tokens == teacher.visual_tokens(len(sample.frames))
        assert (pair.content_hash, pair.source) == (sample.content_hash, sample.source)
        assert (pair.question, pair.answer_type) == (sample.turns[0].question, sample.turns[0].answer_type)


def test_a_pair_is_the_best_and_worst_of_what_was_drawn(models: PairModels, new_sample: Callable[..., Sample]) -> None:
    samples = [new_sample(number, turns=1) for number in range(8)]
    for pair in pairs_of(maker(models, include_truth=True).make(samples)):
        scores = [candidate.score for candidate in pair.candidates]
        texts = [normalise(candidate.text) for candidate in pair.candidates]
        assert len(set(texts)) == len(texts) <= 6
        assert pair.margin == pytest.approx(max(scores) - min(scores))
        assert pair.chosen == pair.candidates[scores.index(max(scores))].text
        assert pair.rejected == pair.candidates[scores.index(min(scores))].text
        assert pair.judge == "likelihood"
        origins = [candidate.origin for candidate in pair.candidates]
        assert origins == sorted(origins, key=["student", "teacher", "ground_truth"].index)
        for candidate in pair.candidates:
            drawn = {stream_seed(5, f"{candidate.origin}\n{pair.id}", number) for number in range(3)}
            assert candidate.seed in (drawn if candidate.origin != "ground_truth" else {0})


def test_pairs_do_not_depend_on_batches_or_company(models: PairModels, new_sample: Callable[..., Sample]) -> None:
    samples = [new_sample(number, turns=1) for number in range(6)]
    together = maker(models, batch_prompts=4).make(samples)
    alone = maker(models, batch_prompts=1)
    for sample, outcome in zip(samples, together, strict=True):
        (single,) = alone.make([sample])
        assert_same(outcome, single)
    for one, other in zip(maker(models, batch_prompts=3).make(samples[::-1])[::-1], together, strict=True):
        assert_same(one, other)


def assert_same(one: object, other: object) -> None:
    """Equal up to rounding of the forward passes."""
    if not isinstance(one, PreferencePair) or not isinstance(other, PreferencePair):
        assert one == other
        return
    scores = [[candidate.score for candidate in pair.candidates] for pair in (one, other)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    plain = [
        replace(
            pair,
            candidates=tuple(replace(candidate, score=0.0) for candidate in pair.candidates),
            margin=0.0,
            teacher_chosen_logprob=0.0,
            teacher_rejected_logprob=0.0,
        )
        for pair in (one, other)
    ]
    assert plain[0] == plain[1]
    logprobs = [(pair.teacher_chosen_logprob, pair.teacher_rejected_logprob) for pair in (one, other)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)


def test_other_seeds_draw_other_answers(models: PairModels, new_sample: Callable[..., Sample]) -> None:
    samples = [new_sample(number, turns=1) for number in range(4)]
    one = maker(models).make(samples)
    config = PairsConfig.model_validate(PAIRS)
    other = load_pair_maker(models, PairSettings(config, seed=6)).make(samples)
    assert {pair.candidates for pair in pairs_of(one)} != {pair.candidates for pair in pairs_of(other)}


def test_the_truth_judge_prefers_the_truth(models: PairModels, new_sample: Callable[..., Sample]) -> None:
    samples = [new_sample(number, turns=1) for number in range(6)]
    settings = {"judge": "truth", "include_truth": True, "min_margin": 1.0}
    pairs = pairs_of(maker(models, **settings).make(samples))
    assert len(pairs) == len(samples)
    for sample, pair in zip(samples, pairs, strict=True):
        assert normalise(pair.chosen) == normalise(str(sample.turns[0].answer))
        assert normalise(pair.rejected) != normalise(pair.chosen)
        assert pair.margin == 1.0


def test_rows_without_a_pair_say_why(models: PairModels, new_sample: Callable[..., Sample]) -> None:
    good = new_sample(0, turns=1)
    broken = replace(good, id="broken", frames=(good.frames[0][:40],))
    endless = replace(good, id="endless", turns=(Turn("why " * 9000, "because"),))
    results = maker(models, min_margin=1000.0).make([broken, good, endless])
    assert [type(result) for result in results] == [Quarantined, Dropped, Quarantined]
    assert results[1] == Dropped(good.id, good.source, "margin")
    one = {"student_candidates": 1, "teacher_candidates": 1, "temperature": 1e-3, "include_truth": False}
    same = PairModels(models.teacher, models.teacher)
    assert maker(same, **one).make([good]) == [Dropped(good.id, good.source, "alike")]
    marked = maker(models, judge="model", temperature=12.0).make([good])
    assert isinstance(marked[0], Dropped)
    assert (marked[0].reason, marked[0].unrated) == ("unrated", unrated_candidates(models, good))


def unrated_candidates(models: PairModels, sample: Sample) -> int:
    """A random teacher gives no marks: every different candidate is without one."""
    (pair,) = maker(models, min_margin=0.0).make([sample])
    assert isinstance(pair, PreferencePair)
    return len(pair.candidates)


def test_ready_made_pairs_are_only_scored(models: PairModels, new_sample: Callable[..., Sample]) -> None:
    teacher = VisionLanguageModel.load(models.teacher.uri)
    question = "what colour is the shape?"
    turns = (Turn(question, "a big blue triangle"), Turn(question, "red"))
    samples = [replace(new_sample(number, turns=1), turns=turns, independent=True) for number in range(3)]
    long = replace(samples[0], id="long", turns=(turns[0], Turn(question, "two " * 9000)))
    scorer = load_pair_maker(PairModels(models.teacher), PairSettings(PairsConfig.model_validate(PAIRS)))
    *outcomes, refused = scorer.score_given([*samples, long])
    assert isinstance(refused, Quarantined)
    assert "8192" in refused.reason
    assert len(pairs_of(outcomes)) == 3
    for sample, pair in zip(samples, pairs_of(outcomes), strict=True):
        assert (pair.chosen, pair.rejected, pair.judge, pair.margin) == ("a big blue triangle", "red", "imported", 1.0)
        assert pair.teacher_chosen_logprob == pytest.approx(live_logprob(teacher, sample, pair.chosen), abs=1e-4)
        assert pair.teacher_rejected_logprob == pytest.approx(live_logprob(teacher, sample, pair.rejected), abs=1e-4)


def test_nothing_in_nothing_out(models: PairModels) -> None:
    assert maker(models).make([]) == []
