"""A question after earlier turns is full attention over [prompt, frames, turn 1, turn 2, …]; it retrieves alone."""

from typing import Any

import pytest
import torch

from sparsight.config import UpcycleConfig
from sparsight.errors import StreamError
from sparsight.kv.answerer import Answer, StreamAnswerer
from sparsight.kv.attention import KvTextModel
from sparsight.kv.bank import RamBank
from sparsight.kv.encoder import StreamEncoder, encode_sink
from sparsight.kv.reference import full_attention_logits
from sparsight.kv.retrieve import BestAndRecent
from sparsight.model.tiny import make_tokenizer
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import Turn
from tests.parity.families import FAMILIES, LAYERS, dense_model
from tests.unit.kv.tiny_stream import (
    ARCHITECTURES,
    FRAME_TOKENS,
    PROMPT_IDS,
    SINK_IDS,
    TinyStream,
    bank_of,
    encode,
    frames_of,
    spans_of,
    tiny_stream,
)

FRAMES = 5
END_ID = 8
NEXT_IDS = torch.tensor([60, 7, 41, 2, 90])
QUESTION = slice(-len(NEXT_IDS), None)


@pytest.fixture(scope="module", params=[(family, sparse) for family in FAMILIES for sparse in (False, True)])
def model(request: pytest.FixtureRequest) -> VisionLanguageModel:
    family, sparse = request.param
    tokenizer: Any = make_tokenizer(["what is in the image?", "a red circle"] * 20, 300)
    dense = dense_model(family, tokenizer)
    if not sparse:
        return dense
    student = upcycle(dense, UpcycleConfig(experts=4, layers=LAYERS[family]), seed=3)
    with torch.no_grad():  # experts of a fresh student are equal: mixing them up would go unnoticed
        for name, weight in student.model.named_parameters():
            if ".experts." in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    return student


def messages_of(earlier: list[Turn], question: str) -> list[dict[str, Any]]:
    """The conversation in transformers' form, the clip in the first message."""
    messages: list[dict[str, Any]] = []
    for turn in earlier:
        messages += [{"role": "user", "content": [{"type": "text", "text": turn.question}]}]
        messages += [{"role": "assistant", "content": [{"type": "text", "text": turn.answer}]}]
    messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
    messages[0]["content"].insert(0, {"type": "video"})
    return messages


def test_logits_after_earlier_turns_are_the_stock_models(model: VisionLanguageModel) -> None:
    """From pixels and text to logits, on dense and sparse students: the stock forward of the whole conversation."""
    chat, kv_model = model.chat, KvTextModel(model.model.model.language_model)
    pixels_FCHW = torch.randn(FRAMES, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        embeds_FSD = model.frame_embeds(model.features(pixels_FCHW))
    sink = encode_sink(kv_model, torch.tensor(chat.frames_prompt("?").before_ids))
    bank = RamBank(sink, 2**30)
    for block in StreamEncoder(kv_model, sink, 400).encode(embeds_FSD, spans_of(FRAMES)):
        bank.put(block)
    answerer = StreamAnswerer(kv_model, model.model.get_output_embeddings(), model.newline_D[None])
    earlier: list[Turn] = []
    for question in ("what is in the image?", "a red circle?", "what is in the image?"):
        prompt = chat.frames_prompt(question, earlier)
        turn = answerer.begin(
            bank, torch.tensor(prompt.after_ids), BestAndRecent(FRAMES), question=prompt.question, room_tokens=0
        )
        ids = chat.prompt(messages_of(earlier, question), [model.visual_tokens(FRAMES)])
        with torch.no_grad():
            stock = model.model(input_ids=torch.tensor([ids]), pixel_values_videos=pixels_FCHW[None])
        torch.testing.assert_close(turn.logits_V, stock.logits[0, -1], atol=1e-4, rtol=1e-4)
        words = torch.topk(turn.logits_V, 4).indices.tolist()
        earlier.append(Turn(question, f"a circle {chat.decode(words)}".strip()))


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def stream(request: pytest.FixtureRequest) -> TinyStream:
    return tiny_stream(request.param)


def after(answer: Answer) -> torch.Tensor:
    """The ids of a first turn with its answer as generated, and then another question."""
    return torch.cat((PROMPT_IDS, torch.tensor([*answer.ids, END_ID]), NEXT_IDS))


def test_an_answer_kept_as_it_was_generated_is_attended_to(stream: TinyStream) -> None:
    frames_FSD = frames_of(stream, FRAMES)
    bank = bank_of(*encode(stream, frames_FSD))
    answerer = StreamAnswerer(stream.kv_model, stream.head)
    first = answerer.ask(bank, PROMPT_IDS, BestAndRecent(FRAMES), max_new_tokens=4)
    for two_pass in (False, True):
        second = answerer.begin(
            bank, after(first), BestAndRecent(FRAMES), question=QUESTION, room_tokens=0, two_pass=two_pass
        )
        expected_TV = full_attention_logits(stream.text_model, stream.head, SINK_IDS, frames_FSD, after(first))
        torch.testing.assert_close(second.logits_V, expected_TV[-1], atol=1e-4, rtol=1e-4)


def test_the_new_question_alone_retrieves(stream: TinyStream) -> None:
    """In two passes, earlier turns change no choice; in one, none of the first layer, whose queries know only words."""
    bank = bank_of(*encode(stream, frames_of(stream, 14), window_tokens=21))
    answerer, retriever = StreamAnswerer(stream.kv_model, stream.head), BestAndRecent(4)
    first = answerer.ask(bank, PROMPT_IDS, retriever, max_new_tokens=4)
    for two_pass, layers in ((True, 3), (False, 1)):
        alone, later = (
            answerer.begin(bank, ids, retriever, question=QUESTION, room_tokens=0, two_pass=two_pass)
            for ids in (NEXT_IDS, after(first))
        )
        assert later.evidence[0].numbers != first.evidence[0].numbers
        for before, now in zip(alone.evidence[:layers], later.evidence[:layers], strict=True):
            assert now.numbers == before.numbers


def test_a_dialogue_too_long_goes_on_without_its_oldest_turns(stream: TinyStream) -> None:
    bank = bank_of(*encode(stream, frames_of(stream, 4)))
    answerer, turn_ids = StreamAnswerer(stream.kv_model, stream.head), PROMPT_IDS.tolist()
    fitting = (512 - len(SINK_IDS) - 4 * FRAME_TOKENS - len(NEXT_IDS) - 1) // len(turn_ids)

    def ask(earlier_turns: int) -> Answer:
        prompt_ids_T = torch.tensor(turn_ids * earlier_turns + NEXT_IDS.tolist())
        return answerer.ask(bank, prompt_ids_T, BestAndRecent(4), question=QUESTION, max_new_tokens=1)

    with pytest.raises(StreamError, match="leave out the oldest earlier turns"):
        ask(fitting + 1)
    assert len(ask(fitting).ids) == 1
