"""Tiny random models of every supported text architecture, and a stream of random frames to run through them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sparsight.errors import StreamError
from sparsight.kv.answerer import Answer
from sparsight.kv.attention import KvTextModel
from sparsight.kv.bank import RamBank
from sparsight.kv.block import KvBlock
from sparsight.kv.encoder import StreamEncoder, encode_sink

VOCABULARY = 97
FRAME_TOKENS = 5
SINK_IDS = torch.tensor([3, 14, 15, 9])
PROMPT_IDS = torch.tensor([26, 5, 35, 89, 79, 32])
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, dict[str, object]] = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": EXPERTS,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@dataclass(frozen=True)
class TinyStream:
    """A stock model and the same model made ready for streams."""

    text_model: PreTrainedModel
    head: nn.Module
    kv_model: KvTextModel


def tiny_stream(
    architecture: str = "qwen3", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> TinyStream:
    """Three layers, four heads of 32 over two key/value heads; weights large enough for attention to be picky."""
    config = CONFIG_MAPPING[architecture](
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        initializer_range=0.2,
        **{**ARCHITECTURES[architecture], **changes},
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight", "layernorm.weight")):
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    model.to(dtype)
    return TinyStream(model.model, model.lm_head, KvTextModel(model.model))


def frames_of(stream: TinyStream, frames: int, seed: int = 1) -> Tensor:
    """Random projected tokens [F, S, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(frames, FRAME_TOKENS, stream.kv_model.width, generator=generator)


def spans_of(frames: int, first: int = 0) -> list[tuple[float, float]]:
    """Two seconds a frame."""
    return [(2.0 * number, 2.0 * number + 2.0) for number in range(first, first + frames)]


def encode(stream: TinyStream, frames_FSD: Tensor, window_tokens: int = 500) -> tuple[KvBlock, list[KvBlock]]:
    """The sink's block and the frames' blocks, from one call."""
    sink = encode_sink(stream.kv_model, SINK_IDS)
    encoder = StreamEncoder(stream.kv_model, sink, window_tokens)
    return sink, encoder.encode(frames_FSD, spans_of(len(frames_FSD)))


def bank_of(sink: KvBlock, blocks: list[KvBlock]) -> RamBank:
    bank = RamBank(sink, budget_bytes=2**30)
    for block in blocks:
        bank.put(block)
    return bank


def said(answer: Answer | StreamError) -> tuple[object, ...]:
    """An answer but for its scores, whose last digits depend on what else is in the batch."""
    assert isinstance(answer, Answer), answer
    return answer.ids, answer.finish, [layer.numbers for layer in answer.evidence]
