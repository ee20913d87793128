"""The teacher on a LLaVA-OneVision checkpoint: what a row says, and that it says it alone or in company."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsight.config import LabelConfig
from sparsight.errors import CheckpointError
from sparsight.media.images import decode
from sparsight.media.pixels import to_pixels
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import Quarantined, Sample, TeacherSignal, Turn
from sparsight.stages import VisualAsk
from sparsight.teacher.load import TeacherSource, identify, load_teacher
from sparsight.teacher.protocol import SignalSettings, Teacher

SETTINGS = SignalSettings(LabelConfig(head=6, tail_samples=4, batch_samples=3, max_answer_tokens=5), seed=7)


@pytest.fixture(scope="module")
def source(teacher_directory: Path) -> TeacherSource:
    return TeacherSource("tiny", str(teacher_directory))


@pytest.fixture(scope="module")
def teacher(source: TeacherSource) -> Teacher:
    return load_teacher(source, identify(source), SETTINGS)


@pytest.fixture(scope="module")
def model(teacher_directory: Path) -> VisionLanguageModel:
    return VisionLanguageModel.load(teacher_directory)


def stock_logprobs(model: VisionLanguageModel, sample: Sample) -> tuple[torch.Tensor, list[int], int]:
    """Full log-probs [T, V], ids and visual tokens of an answered sample through the stock model's own forward."""
    visual = model.visual_tokens(len(sample.frames))
    chat = model.chat.encode(sample.turns, visual)
    with torch.inference_mode():
        logits = model.model(input_ids=torch.tensor([chat.input_ids]), **shown(model, sample)).logits[0]
    return logits.log_softmax(dim=-1), chat.response_positions_n.tolist(), visual


def shown(model: VisionLanguageModel, sample: Sample) -> dict[str, torch.Tensor]:
    """The picture inputs of the stock forward, none for text alone."""
    if not sample.frames:
        return {}
    pixels_FCHW = to_pixels([decode(frame) for frame in sample.frames], model.pixels)
    return {"pixel_values_videos": pixels_FCHW[None]}


@pytest.mark.parametrize("frames", [0, 1, 3])
def test_signals_are_those_of_the_stock_forward(
    teacher: Teacher, model: VisionLanguageModel, new_sample: Callable[..., Sample], frames: int
) -> None:
    samples = [new_sample(number, turns=1 + number % 4, frames=frames) for number in range(7)]
    for sample, signal in zip(samples, teacher.label(samples), strict=True):
        assert isinstance(signal, TeacherSignal)
        logprobs_TV, positions, visual = stock_logprobs(model, sample)
        before_nV = logprobs_TV[np.asarray(positions) - 1].numpy()
        np.testing.assert_allclose(
            signal.label_logprobs_n, before_nV[np.arange(len(positions)), signal.response_ids_n], atol=1e-4
        )
        np.testing.assert_allclose(signal.targets.head_logprobs_nK, -np.sort(-before_nV)[:, :6], atol=1e-4)
        drawn_nS = np.take_along_axis(before_nV, signal.targets.tail_ids_nS, axis=1)
        np.testing.assert_allclose(signal.targets.tail_logprobs_nS, drawn_nS, atol=1e-4)
        assert signal.visual_tokens == visual
        assert sum(signal.answer_lengths) == len(positions)
        assert signal.content_hash == sample.content_hash
        assert not any(signal.answered_by_teacher)


def test_withheld_answers_are_the_greedy_ones_given_those_before(
    teacher: Teacher, model: VisionLanguageModel, new_sample: Callable[..., Sample]
) -> None:
    """Each written answer is found again one token at a time from the whole text before it."""
    samples = [new_sample(number, 1 + number % 3, answered=False, frames=int(number < 3)) for number in range(6)]
    for sample, signal in zip(samples, teacher.label(samples), strict=True):
        assert isinstance(signal, TeacherSignal)
        assert all(signal.answered_by_teacher)
        done: list[Turn] = []
        ends = np.cumsum(signal.answer_lengths)
        for turn, start, end in zip(sample.turns, ends - signal.answer_lengths, ends, strict=True):
            written = greedy(model, sample, done, turn.question, limit=5)
            assert model.chat.decode(signal.response_ids_n[start:end].tolist()) == written
            done.append(Turn(turn.question, written))


def greedy(model: VisionLanguageModel, sample: Sample, done: list[Turn], question: str, limit: int) -> str:
    visual = model.visual_tokens(len(sample.frames))
    prompts = model.chat.turn_prompts([*done, Turn(question, None)], visual)
    answered = model.chat.encode(done, visual) if done else None
    ids = answered.input_ids[: answered.answer_spans[-1][1]] + prompts[-1] if answered is not None else list(prompts[0])
    written: list[int] = []
    while len(written) < limit and written[-1:] != [model.chat.end_id]:
        with torch.inference_mode():
            logits = model.model(input_ids=torch.tensor([ids + written]), **shown(model, sample)).logits[0, -1]
        written.append(int(logits.argmax()))
    return model.chat.decode(written)


def test_a_partly_answered_sample_keeps_what_is_given(teacher: Teacher, new_sample: Callable[..., Sample]) -> None:
    full = new_sample(3, turns=3)
    mixed = replace(full, turns=(full.turns[0], replace(full.turns[1], answer=None), full.turns[2]))
    (signal,) = teacher.label([mixed])
    assert isinstance(signal, TeacherSignal)
    assert signal.answered_by_teacher == (False, True, False)
    (given,) = teacher.label([full])
    assert isinstance(given, TeacherSignal)
    first = given.answer_lengths[0]
    np.testing.assert_array_equal(signal.response_ids_n[:first], given.response_ids_n[:first])
    last = given.answer_lengths[2]
    np.testing.assert_array_equal(signal.response_ids_n[-last:], given.response_ids_n[-last:])


def test_a_row_is_the_same_in_any_company(teacher: Teacher, new_sample: Callable[..., Sample]) -> None:
    samples = [new_sample(number, 1 + number % 4, number % 2 == 0, frames=number // 2 % 3) for number in range(8)]
    together = teacher.label(samples)
    for sample, row in zip(samples, together, strict=True):
        (alone,) = teacher.label([sample])
        assert isinstance(row, TeacherSignal)
        assert isinstance(alone, TeacherSignal)
        np.testing.assert_array_equal(row.response_ids_n, alone.response_ids_n)
        np.testing.assert_array_equal(row.targets.head_ids_nK, alone.targets.head_ids_nK)
        np.testing.assert_array_equal(row.targets.tail_ids_nS, alone.targets.tail_ids_nS)
        np.testing.assert_allclose(row.label_logprobs_n, alone.label_logprobs_n, atol=1e-5)


def test_unusable_rows_are_quarantined_in_their_place(teacher: Teacher, new_sample: Callable[..., Sample]) -> None:
    good = new_sample(0, turns=1)
    broken = replace(new_sample(1, turns=1), frames=(good.frames[0][:40],))
    endless = replace(new_sample(2, turns=1), turns=(Turn("why " * 9000, "because"),))
    silent = new_sample(3, turns=0, frames=0)
    results = teacher.label([broken, good, endless, silent])
    assert [type(result) for result in results] == [Quarantined, TeacherSignal, Quarantined, Quarantined]
    assert [result.id for result in results] == ["row-0001", "row-0000", "row-0002", "row-0003"]
    assert isinstance(results[2], Quarantined)
    assert "8192" in results[2].reason


def test_nothing_is_said_of_a_picture_that_is_not_there(
    source: TeacherSource, new_sample: Callable[..., Sample]
) -> None:
    """In a batch of text alone, and beside a picture."""
    settings = replace(SETTINGS, visual=VisualAsk(True, True, True))
    teacher = load_teacher(source.asked_about(settings.visual), identify(source), settings)
    for others in ([], [new_sample(9, turns=1)]):
        for signal in teacher.label([new_sample(number, turns=1, frames=0) for number in range(2)] + others)[:2]:
            assert isinstance(signal, TeacherSignal)
            assert signal.visual is not None
            assert signal.visual.targets is not None
            assert signal.visual.relation is not None
            assert signal.visual.attention_LN is not None
            assert len(signal.visual.targets) == 0
            assert signal.visual.relation.to_matrix().shape == (0, 0)
            assert signal.visual.attention_LN.shape == (2, 0)


def test_nothing_in_nothing_out(teacher: Teacher) -> None:
    assert teacher.label([]) == []


def test_another_weight_prompt_or_tokenizer_is_another_teacher(source: TeacherSource, tmp_path: Path) -> None:
    identity = identify(source)
    model = VisionLanguageModel.load(source.uri)
    with torch.no_grad():
        model.head_VD[0, 0] += 1.0
    model.save(tmp_path)
    changed = identify(TeacherSource("tiny", str(tmp_path)))
    assert (changed.prompt, changed.tokenizer, changed.vocabulary) == (
        identity.prompt,
        identity.tokenizer,
        identity.vocabulary,
    )
    assert changed.fingerprint != identity.fingerprint
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|user|>", "<|user|> "))
    assert identify(TeacherSource("tiny", str(tmp_path))).prompt != identity.prompt


def test_a_directory_without_a_model_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        identify(TeacherSource("tiny", str(tmp_path)))
