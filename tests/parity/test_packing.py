"""Independent questions packed into one sequence against each question asked alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sparsight.config import ArchitectureConfig, LabelConfig, UpcycleConfig
from sparsight.distill.rows import RowMaker
from sparsight.media.images import encode_png
from sparsight.model.packing import pack
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import Sample, TeacherSignal, Turn
from sparsight.teacher.flow import label_questions_apart, label_samples
from sparsight.teacher.protocol import SignalSettings
from sparsight.teacher.vision_language import OneVisionModel

SMALL = ArchitectureConfig(
    tower_layers=1,
    tower_width=32,
    tower_heads=1,
    text_layers=2,
    text_width=64,
    text_heads=2,
    text_key_value_heads=1,
    text_intermediate=96,
    initializer_range=0.2,
)
TURNS = (
    Turn("what shape is in the image?", "circle"),
    Turn("is there a red shape?", "no"),
    Turn("what color is it?", "dark blue"),
)


@pytest.fixture(scope="module", params=["dense", "sparse", "eager"])
def model(request: pytest.FixtureRequest) -> VisionLanguageModel:
    dense = make_dense(SMALL, make_tokenizer([turn.question for turn in TURNS] * 20, 400), seed=0)
    if request.param == "eager":  # attention that tells its weights takes its mask in another form
        dense.use_eager_attention()
    return upcycle(dense, UpcycleConfig(), seed=1) if request.param == "sparse" else dense


def picture(shade: int) -> bytes:
    return encode_png(Image.new("RGB", (64, 64), (shade, 40, 200)))


def sample(turns: tuple[Turn, ...], shade: int = 10) -> Sample:
    return Sample(f"s{shade}", (picture(shade),), turns, "test", independent=True)


@torch.no_grad()
def test_every_packed_question_has_the_hidden_states_of_the_question_alone(model: VisionLanguageModel) -> None:
    generator = torch.Generator().manual_seed(3)
    visual_SD = torch.randn(model.visual_tokens(), SMALL.text_width, generator=generator)
    packed = model.chat.encode_independent(TURNS, model.visual_tokens())
    short = model.chat.encode_independent(TURNS[:1], model.visual_tokens())
    ids_BT, mask_BT = model.pad([packed.input_ids, short.input_ids])
    packing = pack([packed.starts, short.starts], ids_BT.shape[1])
    hidden_BTD = model.hidden(ids_BT, mask_BT, torch.cat([visual_SD, visual_SD]), packing)
    for turn, (start, end) in zip(TURNS, packed.answer_spans, strict=True):
        alone = model.chat.encode([turn], model.visual_tokens())
        alone_BT, ones_BT = model.pad([alone.input_ids])
        expected_TD = model.hidden(alone_BT, ones_BT, visual_SD)[0]
        (first, last) = alone.answer_spans[0]
        torch.testing.assert_close(hidden_BTD[0, start - 1 : end], expected_TD[first - 1 : last], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(hidden_BTD[1, : len(short.input_ids)], hidden_BTD[0, : len(short.input_ids)])


@torch.no_grad()
def test_without_packing_questions_would_see_each_other(model: VisionLanguageModel) -> None:
    visual_SD = torch.randn(model.visual_tokens(), SMALL.text_width, generator=torch.Generator().manual_seed(3))
    packed = model.chat.encode_independent(TURNS, model.visual_tokens())
    ids_BT, mask_BT = model.pad([packed.input_ids])
    with_BTD = model.hidden(ids_BT, mask_BT, visual_SD, pack([packed.starts], ids_BT.shape[1]))
    without_BTD = model.hidden(ids_BT, mask_BT, visual_SD)
    last = packed.answer_spans[-1][0]
    assert (with_BTD[0, last] - without_BTD[0, last]).abs().max() > 1e-2
    assert pack([(), ()], 5) is None


def test_packed_labels_equal_the_labels_of_the_questions_alone(model: VisionLanguageModel) -> None:
    settings = SignalSettings(label=LabelConfig(head=4, tail_samples=0, batch_samples=2, max_answer_tokens=5), seed=0)
    withheld = replace(TURNS[1], answer=None)
    samples = [sample((TURNS[0], withheld, TURNS[2])), sample((withheld,), shade=90)]
    together = label_samples(OneVisionModel(model), settings, samples)
    apart = label_questions_apart(OneVisionModel(model), settings, samples)
    for one, other in zip(together, apart, strict=True):
        assert isinstance(one, TeacherSignal)
        assert isinstance(other, TeacherSignal)
        assert one.response_ids_n.tolist() == other.response_ids_n.tolist()
        assert one.answer_lengths == other.answer_lengths
        assert one.answered_by_teacher == other.answered_by_teacher
        np.testing.assert_allclose(one.label_logprobs_n, other.label_logprobs_n, atol=1e-4)
        np.testing.assert_allclose(one.targets.tail_mass_n, other.targets.tail_mass_n, atol=1e-4)


def test_rows_of_answers_that_the_teacher_wrote_start_where_their_questions_do(model: VisionLanguageModel) -> None:
    settings = SignalSettings(label=LabelConfig(head=4, tail_samples=0, max_answer_tokens=5), seed=0)
    asked = sample(tuple(replace(turn, answer=None) for turn in TURNS))
    (signal,) = label_samples(OneVisionModel(model), settings, [asked])
    assert isinstance(signal, TeacherSignal)
    row = RowMaker(model.chat, model.visual_tokens, int(model.head_VD.shape[0])).align(asked, signal)
    alone = model.chat.turn_prompts(TURNS[1:2], model.visual_tokens())[0]
    question = alone[alone.index(model.chat.visual_id) + model.visual_tokens() :]
    begin = row.starts[1]
    assert row.input_ids[begin : begin + len(question)].tolist() == question
    assert row.label_ids_n.tolist() == signal.response_ids_n.tolist()
