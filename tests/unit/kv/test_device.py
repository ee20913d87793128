"""The engine on whatever device there is: what an accelerator computes and keeps is what the definition says."""

from pathlib import Path

import pytest
import torch

from sparsight.kv.answerer import Ask, StreamAnswerer
from sparsight.kv.attention import KvTextModel
from sparsight.kv.bank import RamBank
from sparsight.kv.disk import DiskBudget
from sparsight.kv.encoder import StreamEncoder, encode_sink
from sparsight.kv.page import Encoding
from sparsight.kv.reference import full_attention_answer, full_attention_logits
from sparsight.kv.retrieve import BestAndRecent
from sparsight.kv.tiers import MemoryBudget, TieredBank
from tests.unit.kv.tiny_stream import (
    ARCHITECTURES,
    PROMPT_IDS,
    SINK_IDS,
    TinyStream,
    bank_of,
    encode,
    frames_of,
    said,
    spans_of,
    tiny_stream,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FRAMES = 12
WINDOW = 26
"""Tokens, five frames and the sink's."""


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def stream_on(device: torch.device, architecture: str, dtype: torch.dtype = torch.float32) -> TinyStream:
    stream = tiny_stream(architecture, dtype=dtype)
    text_model, head = stream.text_model.to(device), stream.head.to(device)
    return TinyStream(text_model, head, KvTextModel(text_model))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_retrieved_is_full_attention(device: torch.device, architecture: str) -> None:
    stream = stream_on(device, architecture)
    frames_FSD = frames_of(stream, FRAMES).to(device)
    bank = bank_of(*encode(stream, frames_FSD))
    turn = StreamAnswerer(stream.kv_model, stream.head).begin(bank, PROMPT_IDS, BestAndRecent(FRAMES), room_tokens=0)
    everything = (stream.text_model, stream.head, SINK_IDS.to(device), frames_FSD, PROMPT_IDS.to(device))
    torch.testing.assert_close(turn.logits_V, full_attention_logits(*everything)[-1], atol=1e-4, rtol=1e-4)
    answer = StreamAnswerer(stream.kv_model, stream.head).ask(bank, PROMPT_IDS, BestAndRecent(FRAMES), max_new_tokens=5)
    assert answer.ids == full_attention_answer(*everything, new_tokens=5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_types_round_as_the_stock_model_does(device: torch.device, dtype: torch.dtype) -> None:
    exact, short = stream_on(device, "qwen2"), stream_on(device, "qwen2", dtype)
    exact_V, stock_V = (
        full_attention_logits(
            stream.text_model,
            stream.head,
            SINK_IDS.to(device),
            frames_of(stream, FRAMES).to(device, stream.kv_model.dtype),
            PROMPT_IDS.to(device),
        )[-1].float()
        for stream in (exact, short)
    )
    bank = bank_of(*encode(short, frames_of(short, FRAMES)))
    assert bank.get(0).page_L2GSC.dtype == dtype
    turn = StreamAnswerer(short.kv_model, short.head).begin(bank, PROMPT_IDS, BestAndRecent(FRAMES), room_tokens=0)
    assert (turn.logits_V.float() - exact_V).norm() < 2 * (stock_V - exact_V).norm()


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3_moe"])
def test_a_window_slides_as_on_a_processor(device: torch.device, architecture: str) -> None:
    blocks = []
    for stream, frames in ((stream_on(device, architecture), 3), (tiny_stream(architecture), FRAMES)):
        encoder = StreamEncoder(stream.kv_model, encode_sink(stream.kv_model, SINK_IDS), WINDOW)
        frames_FSD, spans_s = frames_of(stream, FRAMES), spans_of(FRAMES)
        chunks = [slice(start, start + frames) for start in range(0, FRAMES, frames)]
        blocks.append([block for chunk in chunks for block in encoder.encode(frames_FSD[chunk], spans_s[chunk])])
    for found, expected in zip(*blocks, strict=True):
        torch.testing.assert_close(found.page_L2GSC, expected.page_L2GSC, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.mean_keys_LGC, expected.mean_keys_LGC, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("encoding", ["plain", "int8", "int4"])
@pytest.mark.parametrize("device_pages", [0, 2, 40])
def test_every_tier_gathers_the_same_bits(
    device: torch.device, encoding: Encoding, device_pages: int, tmp_path: Path
) -> None:
    stream = stream_on(device, "qwen2", torch.bfloat16)
    sink = encode_sink(stream.kv_model, SINK_IDS)
    encoder = StreamEncoder(stream.kv_model, sink, WINDOW, encoding=encoding)
    blocks = encoder.encode(frames_of(stream, 30), spans_of(30))
    page_bytes = blocks[0].rows_LU.nbytes
    memory = MemoryBudget(60 * page_bytes, device_pages * page_bytes, recent_blocks=2)
    expected = bank_of(sink, blocks)
    with TieredBank.create(tmp_path / "stream", sink, memory, DiskBudget(2**30), device=device) as bank:
        for block in blocks:
            bank.put(block)
        for numbers in ([1, 4, 9], [4, 9, 29], [0, 1, 4, 28], list(range(30))):
            for layer in range(3):
                found = bank.gather(layer, numbers)
                assert found.device.type == device.type
                assert torch.equal(found.cpu(), expected.gather(layer, numbers))


def test_answers_are_the_same_alone_together_and_over_tiers(device: torch.device, tmp_path: Path) -> None:
    stream = stream_on(device, "qwen3_moe")
    sink, blocks = encode(stream, frames_of(stream, FRAMES), WINDOW)
    memory = MemoryBudget(60 * blocks[0].rows_LU.nbytes, 4 * blocks[0].rows_LU.nbytes, recent_blocks=2)
    answerer, retriever = StreamAnswerer(stream.kv_model, stream.head), BestAndRecent(3, recent=1, group=2)
    prompts = (PROMPT_IDS, PROMPT_IDS.flip(0))
    with TieredBank.create(tmp_path / "stream", sink, memory, DiskBudget(2**30), device=device) as tiered:
        for block in blocks:
            tiered.put(block)
        banks: tuple[RamBank | TieredBank, ...] = (bank_of(sink, blocks), tiered)
        asks = [Ask(bank, prompt, retriever, 5, two_pass=two_pass) for bank in banks for prompt in prompts
                for two_pass in (False, True)]  # fmt: skip
        together = [said(answer) for answer in answerer.ask_all(asks)]
        alone = [said(answer) for ask in asks for answer in answerer.ask_all([ask])]
    assert together == alone
    assert together[:4] == together[4:]
