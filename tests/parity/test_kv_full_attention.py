"""A stream with everything retrieved, and inside its window, is plain full attention of the unmodified model."""

import pytest
import torch
from torch import Tensor

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_rounding_is_of_the_models_own_size(stream: TinyStream, dtype: torch.dtype) -> None:
    """Inside the window and beyond it: as far from exact logits as full attention of the stock model in that type.

    A rounded router may take another expert at a token, here or there; a wrong position would be far outside."""
    half = tiny_stream(stream.text_model.config.model_type, dtype=dtype)
    frames_FSD = frames_of(stream, FRAMES)

    def logits_of(host: TinyStream, window_tokens: int) -> Tensor:
        bank = bank_of(*encode(host, frames_FSD, window_tokens))
        assert bank.get(0).format.dtype == bank.sink.format.dtype == host.kv_model.dtype
        answerer = StreamAnswerer(host.kv_model, host.head)
        return answerer.begin(bank, PROMPT_IDS, BestAndRecent(FRAMES), room_tokens=0).logits_V

    exact_V = full_attention_logits(stream.text_model, stream.head, SINK_IDS, frames_FSD, PROMPT_IDS)[-1]
    stock_V = full_attention_logits(half.text_model, half.head, SINK_IDS, frames_FSD.to(dtype), PROMPT_IDS)[-1]
    rounding = (stock_V - exact_V).norm()
    assert rounding > 0
    for window_tokens in (500, 21):
        assert (logits_of(half, window_tokens) - logits_of(stream, window_tokens)).norm() < 4 * rounding
