"""Answers scored side by side after one prompt against each answer scored by a plain forward pass of its own."""

import pytest
import torch
from PIL import Image

from sparsight.config import ArchitectureConfig, UpcycleConfig
from sparsight.media.pixels import to_pixels
from sparsight.model.answer_scores import score_answers
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import Turn

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
ASKED = [
    ("what is in the image?", ["a red circle and a blue square", "a red circle"]),
    ("how many shapes are there?", ["two", "three green triangles", "two shapes", ""]),
    ("is there a red shape?", ["yes"]),
]


@pytest.fixture(scope="module", params=["dense", "sparse"])
def model(request: pytest.FixtureRequest) -> VisionLanguageModel:
    texts = [text for question, answers in ASKED for text in (question, *answers)]
    dense = make_dense(SMALL, make_tokenizer(texts * 20, 400), seed=0)
    return dense if request.param == "dense" else upcycle(dense, UpcycleConfig(), seed=1)


@torch.no_grad()
def slow_score(model: VisionLanguageModel, question: str, answer: str, pixels_FCHW: torch.Tensor) -> float:
    """One answer alone in the stock forward, its log-softmax over the whole vocabulary, position by position."""
    chat = model.chat.encode([Turn(question, answer)], model.visual_tokens())
    logits_TV = model.model(input_ids=torch.tensor([chat.input_ids]), pixel_values_videos=pixels_FCHW[None]).logits[0]
    logprobs_TV = logits_TV.double().log_softmax(dim=-1)
    ((start, end),) = chat.answer_spans
    return sum(float(logprobs_TV[position - 1, chat.input_ids[position]]) for position in range(start, end))


@torch.no_grad()
def test_answers_side_by_side_score_as_each_alone(model: VisionLanguageModel) -> None:
    pictures = [Image.new("RGB", (64, 64), (shade, 40, 200)) for shade in (10, 90, 170)]
    pixels_NCHW = to_pixels(pictures, model.pixels)
    visual_ND = model.clip_embeds(model.features(pixels_NCHW)[:, None]).flatten(0, 1)
    rows = [model.chat.encode_answers(question, answers, model.visual_tokens()) for question, answers in ASKED]
    scores = score_answers(model, rows, visual_ND)
    assert [len(row_A) for row_A in scores] == [2, 4, 1]
    for (question, answers), pixels_CHW, row_A in zip(ASKED, pixels_NCHW, scores, strict=True):
        slow = [slow_score(model, question, answer, pixels_CHW[None]) for answer in answers]
        assert row_A.tolist() == pytest.approx(slow, abs=1e-5, rel=1e-6)


def test_answers_take_the_tokens_of_the_conversation(model: VisionLanguageModel) -> None:
    for question, answers in ASKED:
        row = model.chat.encode_answers(question, answers, model.visual_tokens())
        for index, answer in enumerate(answers):
            alone = model.chat.encode([Turn(question, answer)], model.visual_tokens())
            assert row.answer_ids(index).tolist() == alone.response_ids_n.tolist()
            assert row.input_ids[: row.starts[0]] == alone.input_ids[: alone.answer_spans[0][0]]


@torch.no_grad()
def test_a_cut_vocabulary_normalises_over_what_is_left(model: VisionLanguageModel) -> None:
    row = model.chat.encode_answers(ASKED[0][0], ["q", "xyz"], model.visual_tokens())
    visual_SD = torch.randn(model.visual_tokens(), SMALL.text_width, generator=torch.Generator().manual_seed(0))
    known = max(row.answer_ids(0).max(), row.answer_ids(1).max()) + 1
    assert known < model.head_VD.shape[0]
    ids_BT, mask_BT = model.pad([[*row.input_ids[: row.starts[0]], *row.answer_ids(0).tolist()]])
    logits_TV = model.hidden(ids_BT, mask_BT, visual_SD)[0] @ model.head_VD[:known].T
    logprobs_TV = logits_TV.log_softmax(dim=-1)
    start, end = row.answer_spans[0]
    slow = sum(float(logprobs_TV[position - 1, ids_BT[0, position]]) for position in range(start, end))
    (cut_A,) = score_answers(model, [row], visual_SD, known)
    (whole_A,) = score_answers(model, [row], visual_SD)
    assert float(cut_A[0]) == pytest.approx(slow, abs=1e-4)
    assert float(cut_A[0]) > float(whole_A[0])
