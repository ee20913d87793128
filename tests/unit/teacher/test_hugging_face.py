"""The teacher on any stock directory, here a tiny LLaVA of transformers' own: signals against its own forward."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from sparsight.config import HuggingFaceTeacherConfig, LabelConfig, PairsConfig
from sparsight.errors import CheckpointError
from sparsight.media.images import decode
from sparsight.model.tiny import make_tokenizer
from sparsight.records import PreferencePair, Quarantined, Sample, TeacherSignal, Turn
from sparsight.teacher.answering import DrawSettings
from sparsight.teacher.flow import OpenSample, open_sample
from sparsight.teacher.hugging_face import ImageTextModel
from sparsight.teacher.load import TeacherSource, identify, load_teacher
from sparsight.teacher.pair_maker import PairMaker, PairSettings
from sparsight.teacher.protocol import SignalSettings, Teacher

SETTINGS = SignalSettings(LabelConfig(head=6, tail_samples=4, batch_samples=3, max_answer_tokens=6), seed=7)
WORDS = "what colour is the shape are there how many squares red yes two a big blue triangle which it circle"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, but only whole words and the end of a turn are likely, so what it writes is proper text."""
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = make_tokenizer([WORDS] * 4, 400)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>")
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    likely = [token for token in tokenizer.convert_tokens_to_ids([f"\u0120{word}" for word in WORDS.split()]) if token]
    scale_V = torch.full((len(tokenizer),), 0.1)
    scale_V[[*likely, tokenizer.eos_token_id]] = 20.0
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale_V[:, None])
    model.save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(directory: Path) -> Teacher:
    source = TeacherSource.hugging_face(HuggingFaceTeacherConfig(kind="hugging_face", path=str(directory)))
    return load_teacher(source, identify(source), SETTINGS)


@pytest.fixture(scope="module")
def stock(directory: Path) -> tuple[Any, Any]:
    return AutoModelForImageTextToText.from_pretrained(directory).eval(), AutoProcessor.from_pretrained(directory)


def messages_of(turns: tuple[Turn, ...], frames: int = 1) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(turns):
        content = [{"type": "image"}] * (0 if index else frames) + [{"type": "text", "text": turn.question}]
        messages.append({"role": "user", "content": content})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return messages


def pictures_of(sample: Sample) -> list[list[Image.Image]] | None:
    """As a processor takes them."""
    return [[decode(frame) for frame in sample.frames]] if sample.frames else None


@pytest.mark.parametrize("clips", [[1], [2], [0], [0, 2, 1]])
def test_signals_are_those_of_the_stock_forward(
    teacher: Teacher, stock: tuple[Any, Any], new_sample: Callable[..., Sample], clips: list[int]
) -> None:
    """The whole conversation through the processor and model at once gives the same ids and log-probabilities."""
    model, processor = stock
    samples = [new_sample(row, turns=1 + row % 2, frames=clips[row // 2 % len(clips)]) for row in range(7)]
    for sample, signal in zip(samples, teacher.label(samples), strict=True):
        assert isinstance(signal, TeacherSignal)
        frames = len(sample.frames)
        text = processor.apply_chat_template(messages_of(sample.turns, frames), tokenize=False)
        inputs = processor(text=[text], images=pictures_of(sample), return_tensors="pt")
        with torch.inference_mode():
            logprobs_TV = model(**inputs).logits[0].log_softmax(dim=-1).numpy()
        ids = inputs["input_ids"][0].tolist()
        positions = answer_positions(ids, processor.tokenizer)
        assert signal.response_ids_n.tolist() == [ids[position] for position in positions]
        before_nV = logprobs_TV[np.asarray(positions) - 1]
        labels_n = before_nV[np.arange(len(positions)), signal.response_ids_n]
        np.testing.assert_allclose(signal.label_logprobs_n, labels_n, atol=1e-4)
        np.testing.assert_allclose(signal.targets.head_logprobs_nK, -np.sort(-before_nV)[:, :6], atol=1e-4)
        assert signal.visual_tokens == ids.count(model.config.image_token_id) == 16 * frames


def answer_positions(ids: list[int], tokenizer: Any) -> list[int]:
    """Positions after each assistant mark, the end token included."""
    start, end = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    inside, positions = False, []
    for position, token in enumerate(ids):
        if inside:
            positions.append(position)
        inside = (inside or token == start) and token != end
    return positions


def test_withheld_answers_are_generated_in_turn(
    teacher: Teacher, stock: tuple[Any, Any], new_sample: Callable[..., Sample]
) -> None:
    model, processor = stock
    samples = [new_sample(number, 1 + number % 3, answered=False, frames=int(number < 3)) for number in range(6)]
    for sample, signal in zip(samples, teacher.label(samples), strict=True):
        assert isinstance(signal, TeacherSignal)
        assert all(signal.answered_by_teacher)
        done: tuple[Turn, ...] = ()
        ends = np.cumsum(signal.answer_lengths)
        for turn, start, end in zip(sample.turns, ends - signal.answer_lengths, ends, strict=True):
            asked = messages_of((*done, turn), len(sample.frames))
            text = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            inputs = processor(text=[text], images=pictures_of(sample), return_tensors="pt")
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
            written = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
            ours = processor.tokenizer.decode(signal.response_ids_n[start:end], skip_special_tokens=True).strip()
            assert ours == written
            done = (*done, Turn(turn.question, written))


def test_unusable_rows_are_quarantined(teacher: Teacher, new_sample: Callable[..., Sample]) -> None:
    good = new_sample(0, turns=1)
    broken = replace(good, frames=(good.frames[0][:30],))
    long = replace(good, turns=(Turn("what " * 600, "yes"),))
    results = teacher.label([broken, good, long])
    assert [type(result) for result in results] == [Quarantined, TeacherSignal, Quarantined]


def test_a_directory_that_lacks_weights_is_refused(directory: Path, tmp_path: Path) -> None:
    for path in directory.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    source = TeacherSource("hugging_face", str(tmp_path), "float32")
    with pytest.raises(CheckpointError, match="cannot load"):
        load_teacher(source, identify(source), SETTINGS)


def test_the_identity_is_that_of_the_directory_and_of_how_it_is_opened(directory: Path, teacher: Teacher) -> None:
    assert identify(TeacherSource("hugging_face", str(directory), "auto")) == teacher.identity
    others = [
        identify(TeacherSource("hugging_face", str(directory), dtype, attention))
        for dtype, attention in (("float32", None), ("bfloat16", None), ("auto", "eager"), ("bfloat16", "eager"))
    ]
    assert len({identity.fingerprint for identity in (teacher.identity, *others)}) == 5
    assert {identity.model for identity in others} == {teacher.identity.model}


@torch.inference_mode()
def test_answers_are_drawn_and_scored_by_any_model(stock: tuple[Any, Any], new_sample: Callable[..., Sample]) -> None:
    """Draws do not depend on the company; a score is the sum over the answer's tokens in the stock forward."""
    model, processor = stock
    ours = ImageTextModel(model, processor)
    opened = [open_sample(0, new_sample(number, turns=1), 10**6, 10**6) for number in range(3)]
    rows = [row for row in opened if isinstance(row, OpenSample)]
    seen, seeds = ours.look(rows), [[5, 6, 7], [8, 9, 10], [5, 6, 7]]
    settings = DrawSettings(temperature=1.0, top_p=0.9, max_tokens=5)
    together = ours.draw(rows, seen, seeds, settings)
    for row, view, streams, texts in zip(rows, seen, seeds, together, strict=True):
        assert [ours.draw([row], [view], [[seed]], settings)[0][0] for seed in streams] == texts
    assert len({text for texts in together for text in texts}) > 3
    for row, texts, scored in zip(rows, together, ours.score(rows, seen, together), strict=True):
        for text, total, ids_n in zip(texts, scored.logprobs, scored.ids, strict=True):
            turns = (Turn(row.sample.turns[0].question, text),)
            prompt = processor.apply_chat_template(messages_of(turns), tokenize=False)
            inputs = processor(text=[prompt], images=[list(row.pictures)], return_tensors="pt")
            logprobs_TV = model(**inputs).logits[0].log_softmax(dim=-1)
            ids = inputs["input_ids"][0].tolist()
            positions = answer_positions(ids, processor.tokenizer)
            assert ids_n.tolist() == [ids[position] for position in positions]
            assert total == pytest.approx(sum(float(logprobs_TV[at - 1, ids[at]]) for at in positions), abs=1e-4)
            assert scored.visual_tokens == ids.count(model.config.image_token_id)


def test_ready_made_pairs_are_scored_by_any_model(stock: tuple[Any, Any], new_sample: Callable[..., Sample]) -> None:
    model, processor = stock
    turns = (Turn("which shape is it?", "a big circle"), Turn("which shape is it?", "red"))
    sample = replace(new_sample(0, turns=1), turns=turns, independent=True)
    maker = PairMaker(ImageTextModel(model, processor), PairSettings(PairsConfig()))
    (pair,) = maker.score_given([sample])
    assert isinstance(pair, PreferencePair)
    for turn, stored in zip(turns, (pair.teacher_chosen_logprob, pair.teacher_rejected_logprob), strict=True):
        prompt = processor.apply_chat_template(messages_of((turn,)), tokenize=False)
        inputs = processor(text=[prompt], images=[[decode(sample.frames[0])]], return_tensors="pt")
        with torch.inference_mode():
            logprobs_TV = model(**inputs).logits[0].log_softmax(dim=-1)
        ids = inputs["input_ids"][0].tolist()
        live = sum(float(logprobs_TV[at - 1, ids[at]]) for at in answer_positions(ids, processor.tokenizer))
        assert stored == pytest.approx(live, abs=1e-4)
