"""Models as pair making uses them: drawn answers and scores of given ones, the same in any company."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsight.errors import DataError
from sparsight.model.decode import BatchDecoder
from sparsight.model.sampling import SamplingSettings, stream_seed
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import Sample, Turn
from sparsight.teacher.answering import DrawSettings, check_length
from sparsight.teacher.flow import OpenSample, open_sample, response_hidden
from sparsight.teacher.vision_language import OneVisionModel

HOT = DrawSettings(temperature=8.0, top_p=0.95, max_tokens=6)


@pytest.fixture(scope="module")
def model(teacher_directory: Path) -> OneVisionModel:
    return OneVisionModel(VisionLanguageModel.load(teacher_directory))


def opened(sample: Sample) -> OpenSample:
    row = open_sample(0, sample, 10**6, 10**6)
    assert isinstance(row, OpenSample)
    return row


def seeds_of(row: OpenSample, count: int) -> list[int]:
    return [stream_seed(3, row.sample.id, number) for number in range(count)]


@torch.inference_mode()
def test_draws_are_the_same_alone_and_in_company(model: OneVisionModel, new_sample: Callable[..., Sample]) -> None:
    rows = [opened(new_sample(number, turns=1)) for number in range(5)]
    together = model.draw(rows, model.look(rows), [seeds_of(row, 4) for row in rows], HOT)
    for row, texts in zip(rows, together, strict=True):
        for seed, text in zip(seeds_of(row, 4), texts, strict=True):
            assert drawn_alone(model, row, seed) == text
    assert len({text for texts in together for text in texts}) > 5


def drawn_alone(model: OneVisionModel, row: OpenSample, seed: int) -> str:
    """One answer over a cache of its own."""
    (tokens_SD,) = model.look([row])
    decoder = BatchDecoder(model.model, 1)
    decoder.feed([model.chat.turn_prompts(row.sample.turns, len(tokens_SD))[0]], tokens_SD)
    settings = SamplingSettings(HOT.temperature, HOT.top_p, seed)
    return model.chat.decode(decoder.decode([HOT.max_tokens], [settings])[0])


@torch.inference_mode()
def test_equal_pictures_are_looked_at_once_and_given_to_every_row(
    model: OneVisionModel, new_sample: Callable[..., Sample]
) -> None:
    first, second = opened(new_sample(1, turns=1)), opened(new_sample(2, turns=1))
    again = replace(first, sample=replace(first.sample, id="again"))
    seen = model.look([first, second, again])
    torch.testing.assert_close(seen[0], seen[2], atol=0, rtol=0)
    torch.testing.assert_close(seen[1], model.look([second])[0], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_scores_are_sums_over_each_answers_own_tokens(model: OneVisionModel, new_sample: Callable[..., Sample]) -> None:
    rows = [opened(new_sample(number, turns=1)) for number in range(3)]
    answers = [["red", "a big blue triangle"], ["yes"], ["two", "", "red"]]
    for row, texts, scored in zip(rows, answers, model.score(rows, model.look(rows), answers), strict=True):
        assert len(scored.logprobs) == len(texts)
        for text, total, mean, ids_n in zip(texts, scored.logprobs, scored.mean_logprobs, scored.ids, strict=True):
            turn = Turn(row.sample.turns[0].question, text)
            chat = model.chat.encode([turn], scored.visual_tokens)
            assert ids_n.tolist() == chat.response_ids_n.tolist()
            encoded = model.encode(replace(row, sample=replace(row.sample, turns=(turn,))), model.look([row])[0])
            logprobs_nV = model.head(response_hidden(model.forward([encoded]), [encoded])).log_softmax(dim=-1)
            slow = sum(float(logprobs_nV[place, token]) for place, token in enumerate(ids_n))
            assert total == pytest.approx(slow, abs=1e-4)
            assert mean == pytest.approx(slow / len(ids_n), abs=1e-4)


def test_a_question_that_leaves_no_room_for_its_answer_is_refused(
    model: OneVisionModel, new_sample: Callable[..., Sample]
) -> None:
    row = opened(new_sample(0, turns=1))
    (seen,) = model.look([row])
    used = model.prompt_tokens(row, seen)
    check_length(model, row, seen, model.max_positions - used)
    with pytest.raises(DataError, match=f"reads at most {model.max_positions}"):
        check_length(model, row, seen, model.max_positions - used + 1)


def test_other_tokens_are_another_hash(model: OneVisionModel, new_sample: Callable[..., Sample]) -> None:
    row = opened(new_sample(0, turns=1))
    seen = model.look([row])
    one, other = (model.score([row], seen, [texts])[0] for texts in (["red", "two"], ["two", "red"]))
    assert one.answers_hash != other.answers_hash
    np.testing.assert_array_equal(one.ids[0], other.ids[1])
