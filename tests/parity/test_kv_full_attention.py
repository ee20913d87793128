"""A stream with everything retrieved, and inside its window, is plain full attention of the unmodified model."""

import pytest
import torch

from sparsight.kv.answerer import StreamAnswerer
from sparsight.kv.reference import full_attention_answer, full_attention_logits
from sparsight.kv.retrieve import BestAndRecent
from tests.unit.kv.tiny_stream import (
    ARCHITECTURES,
    FRAME_TOKENS,
    PROMPT_IDS,
    SINK_IDS,
    TinyStream,
    bank_of,
    encode,
    frames_of,
    tiny_stream,
)

FRAMES = 7


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def stream(request: pytest.FixtureRequest) -> TinyStream:
    return tiny_stream(request.param)


@pytest.mark.parametrize("retriever", [BestAndRecent(FRAMES), BestAndRecent(3, recent=4), BestAndRecent(0, recent=99)])
def test_logits_equal_full_attention(stream: TinyStream, retriever: BestAndRecent) -> None:
    frames_FSD = frames_of(stream, FRAMES)
    bank = bank_of(*encode(stream, frames_FSD))
    answerer = StreamAnswerer(stream.kv_model, stream.head)
    turn = answerer.begin(bank, PROMPT_IDS[:1], retriever, room_tokens=len(PROMPT_IDS))
    logits_TV = [turn.logits_V]
    for token in PROMPT_IDS[1:].tolist():
        turn.step(token)
        logits_TV.append(turn.logits_V)
    expected_TV = full_attention_logits(stream.text_model, stream.head, SINK_IDS, frames_FSD, PROMPT_IDS)
    torch.testing.assert_close(torch.stack(logits_TV), expected_TV, atol=5e-5, rtol=5e-5)

    whole = answerer.begin(bank, PROMPT_IDS, retriever, room_tokens=0)
    torch.testing.assert_close(whole.logits_V, expected_TV[-1], atol=5e-5, rtol=5e-5)


def test_greedy_decoding_equals_stepwise_full_forward(stream: TinyStream) -> None:
    frames_FSD = frames_of(stream, FRAMES)
    answer = StreamAnswerer(stream.kv_model, stream.head).ask(
        bank_of(*encode(stream, frames_FSD)), PROMPT_IDS, BestAndRecent(FRAMES), max_new_tokens=8
    )
    assert answer.ids == full_attention_answer(stream.text_model, stream.head, SINK_IDS, frames_FSD, PROMPT_IDS, 8)


def test_a_window_that_holds_the_stream_just_so_is_exact(stream: TinyStream) -> None:
    frames_FSD = frames_of(stream, FRAMES)
    tokens = len(SINK_IDS) + FRAMES * FRAME_TOKENS
    _, wide = encode(stream, frames_FSD)
    _, narrow = encode(stream, frames_FSD, window_tokens=tokens)
    _, narrower = encode(stream, frames_FSD, window_tokens=tokens - 1)
    for expected, block in zip(wide, narrow, strict=True):
        torch.testing.assert_close(block.page_L2GSC, expected.page_L2GSC, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(narrower[-1].page_L2GSC, wide[-1].page_L2GSC, atol=1e-5)


@pytest.mark.parametrize("rope_type", ["linear", "llama3", "yarn"])
def test_scaled_rotary_frequencies_are_the_models_own(rope_type: str) -> None:
    scaling = {"rope_theta": 10000.0, "rope_type": rope_type, "factor": 4.0, "original_max_position_embeddings": 64}
    if rope_type == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    stream = tiny_stream("llama", rope_parameters=scaling)
    frames_FSD = frames_of(stream, FRAMES)
    turn = StreamAnswerer(stream.kv_model, stream.head).begin(
        bank_of(*encode(stream, frames_FSD)), PROMPT_IDS, BestAndRecent(FRAMES), room_tokens=0
    )
    expected_TV = full_attention_logits(stream.text_model, stream.head, SINK_IDS, frames_FSD, PROMPT_IDS)
    torch.testing.assert_close(turn.logits_V, expected_TV[-1], atol=5e-5, rtol=5e-5)
