"""A batched examination against one question at a time through the unmodified stock model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsight.errors import PictureError
from sparsight.evaluate.answers import (
    ANSWER_TOKENS,
    PICTURE_TOKENS,
    TEXT_TOKENS,
    Answer,
    Examination,
    Examiner,
    by_pictures,
    join,
    normalise,
)
from sparsight.media.images import DecodeLimits, decode
from sparsight.media.pixels import to_pixels
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import Sample, Turn

LIMIT = 4


@pytest.fixture(scope="module")
def examination(model: VisionLanguageModel, samples: list[Sample]) -> Examination:
    return Examiner(model, batch=7, max_answer_tokens=LIMIT).examine(samples)


def questions(samples: list[Sample]) -> list[tuple[Sample, Turn]]:
    return [(sample, turn) for sample in samples for turn in sample.turns]


def test_answers_equal_stock_generation_one_by_one(
    model: VisionLanguageModel, samples: list[Sample], examination: Examination
) -> None:
    expected: list[str] = []
    for sample, turn in questions(samples)[::5]:
        prompt = model.chat.turn_prompts([Turn(turn.question, None)], model.visual_tokens())[0]
        pixels = to_pixels([decode(sample.frames[0])], model.pixels)[None]
        ids = model.model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            pixel_values_videos=pixels,
            max_new_tokens=LIMIT,
            do_sample=False,
        )
        expected.append(model.chat.decode(ids[0, len(prompt) :].tolist()))
    assert [answer.answer for answer in examination.answers[::5]] == expected
    assert len(set(expected)) > 1


def test_answers_come_in_the_order_of_the_questions(samples: list[Sample], examination: Examination) -> None:
    told = [(answer.picture, answer.question, answer.reference) for answer in examination.answers]
    assert told == [(sample.content_hash, turn.question, turn.answer) for sample, turn in questions(samples)]
    assert len({answer.id for answer in examination.answers}) == len(told)


def test_states_predict_the_reference_answers(
    model: VisionLanguageModel, samples: list[Sample], examination: Examination
) -> None:
    start = 0
    for sample, turn in questions(samples):
        chat = model.chat.encode([turn], model.visual_tokens())
        pixels = to_pixels([decode(sample.frames[0])], model.pixels)[None]
        with torch.no_grad():
            logits_TV = model.model(input_ids=torch.tensor([chat.input_ids]), pixel_values_videos=pixels).logits[0]
        end = start + len(chat.response_ids_n)
        states_nD = torch.from_numpy(examination.states_nD[start:end])
        torch.testing.assert_close(
            states_nD @ model.head_VD.T, logits_TV[chat.response_positions_n - 1], atol=2e-5, rtol=0.0
        )
        np.testing.assert_array_equal(examination.response_ids_n[start:end], chat.response_ids_n)
        start = end
    assert start == len(examination.states_nD)


def test_text_alone_is_asked_and_read_as_the_stock_model_does(
    model: VisionLanguageModel, samples: list[Sample]
) -> None:
    """In one batch with questions about pictures, and without any."""
    texts = [replace(sample, frames=(), frame_times_s=()) for sample in samples[:3]]
    examiner = Examiner(model, batch=7, max_answer_tokens=LIMIT)
    alone, mixed = examiner.examine(texts), examiner.examine([*samples[3:5], *texts])
    assert sum(alone.expert_counts[0][PICTURE_TOKENS]) == 0
    assert mixed.answers[-len(alone.answers) :] == alone.answers
    np.testing.assert_allclose(mixed.states_nD[-len(alone.states_nD) :], alone.states_nD, atol=2e-5)
    start = 0
    for answer, (_, turn) in zip(alone.answers, questions(texts), strict=True):
        chat = model.chat.encode([turn], 0)
        prompt = chat.input_ids[: chat.answer_spans[0][0]]
        ids = model.model.generate(
            input_ids=torch.tensor([prompt]),
            max_new_tokens=LIMIT,
            do_sample=False,
            suppress_tokens=[model.chat.visual_id],  # nobody can write a picture
        )
        assert answer.answer == model.chat.decode(ids[0, len(prompt) :].tolist())
        with torch.no_grad():
            logits_TV = model.model(input_ids=torch.tensor([chat.input_ids])).logits[0]
        end = start + len(chat.response_ids_n)
        states_nD = torch.from_numpy(alone.states_nD[start:end])
        torch.testing.assert_close(
            states_nD @ model.head_VD.T, logits_TV[chat.response_positions_n - 1], atol=2e-5, rtol=0.0
        )
        start = end


def test_expert_counts_count_every_token_once(
    model: VisionLanguageModel, samples: list[Sample], examination: Examination
) -> None:
    asked = questions(samples)
    chats = [model.chat.encode([turn], model.visual_tokens()) for _, turn in asked]
    assert list(examination.expert_counts) == [0]
    totals = {group: sum(counts) for group, counts in examination.expert_counts[0].items()}
    visual = model.visual_tokens() * len(asked)
    assert totals.pop(PICTURE_TOKENS) == 2 * visual
    assert totals.pop(TEXT_TOKENS) == 2 * (sum(len(chat.input_ids) for chat in chats) - visual)
    assert sum(totals.values()) == 2 * len(examination.response_ids_n)
    assert set(totals) == {f"{ANSWER_TOKENS}{turn.answer_type}" for _, turn in asked}


def test_pieces_join_to_the_whole(model: VisionLanguageModel, samples: list[Sample], examination: Examination) -> None:
    pieces = list(by_pictures(samples, pictures=4))
    assert [len({sample.content_hash for sample in piece}) for piece in pieces] == [4, 4, 1]
    assert [sample for piece in pieces for sample in piece] == samples
    examiner = Examiner(model, batch=64, max_answer_tokens=LIMIT)
    whole = join([examiner.examine(piece) for piece in pieces])
    assert whole.answers == examination.answers
    assert whole.expert_counts == examination.expert_counts
    np.testing.assert_allclose(whole.states_nD, examination.states_nD, atol=2e-5)


def test_pictures_beyond_the_configured_limits_are_refused(model: VisionLanguageModel, samples: list[Sample]) -> None:
    examiner = Examiner(model, 7, LIMIT, DecodeLimits(max_bytes=10))
    with pytest.raises(PictureError, match="the limit is 10"):
        examiner.examine(samples)


@pytest.mark.parametrize("limit", [1, 4, 13])
def test_a_limit_keeps_the_first_questions(samples: list[Sample], limit: int) -> None:
    kept = [turn for piece in by_pictures(samples, 3, limit) for sample in piece for turn in sample.turns]
    assert kept == [turn for _, turn in questions(samples)][:limit]


def test_exact_match_ignores_case_and_white_space_only() -> None:
    def correct(answer: str) -> bool:
        return Answer("", "", "", "Red  circle", answer, "").correct

    assert normalise("  Red \n circle ") == "red circle"
    assert correct("red circle")
    assert not correct("red circle.")
    assert not correct("a red circle")
