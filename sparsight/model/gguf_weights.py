"""A language model from a GGUF file, in transformers' terms: config, float32 weights by name, tokenizer.

llama.cpp keeps the rows of query and key projections in another order (its rotary embedding turns neighbouring
numbers, transformers' turns the two halves of a head); they are put back here. Only dense Llama models with a
byte-level BPE are read, everything else is refused. Nothing is written. Called by `text_base.py`.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsight.errors import CheckpointError

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_DIGITS_APART = {"smollm": True, "gpt-2": False}
"""The byte-level BPE variants that are known, by their name in GGUF, and whether each digit is a piece of its own."""
_SPECIAL = 3
"""GGUF's token type for control tokens."""


class LanguageModel(NamedTuple):
    """A causal language model: its stock config, its weights under transformers' names, its tokenizer."""

    config: Any
    weights: dict[str, torch.Tensor]
    tokenizer: Any


def read_gguf(path: Path, sha256: str | None = None) -> LanguageModel:
    """The model in a GGUF file, dequantised to float32.

    Raises `CheckpointError` where the file is missing, damaged, not the one that `sha256` names, or holds another
    kind of model.
    """
    if not path.is_file():
        raise CheckpointError(f"'{path}' is not there: correct the path of the GGUF file")
    if sha256 is not None:
        _check_digest(path, sha256)
    try:
        values, tensors = _open(path)
        config = _config(values)
        tokenizer = _tokenizer(values)
        weights = dict(_weights(tensors, config))
    except KeyError as error:
        raise CheckpointError(f"'{path}' lacks {error}: it is damaged or not a whole model, get it again") from error
    except (ValueError, IndexError, OSError, NotImplementedError) as error:
        raise CheckpointError(f"cannot read '{path}', give text_base.weights another file: {error}") from error
    _check_whole(path, config, weights)
    return LanguageModel(config, weights, tokenizer)


def unpermute(weight_RD: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection from llama.cpp's order (x0 y0 x1 y1 … in a head) to x0 x1 … y0 y1 …."""
    return weight_RD.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight_RD.shape)


def _check_digest(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise CheckpointError(
            f"'{path}' is damaged or another version: its sha256 is {found}, expected {sha256}: install it again"
        )


def _open(path: Path) -> tuple[dict[str, Any], Any]:
    reader: Any = GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, reader.tensors


def _config(values: dict[str, Any]) -> LlamaConfig:
    architecture = values["general.architecture"]
    scaling = values.get("llama.rope.scaling.type", "none")
    if architecture != "llama" or values.get("llama.expert_count", 0) or scaling != "none":
        raise ValueError(
            f"it is a '{architecture}' model with {values.get('llama.expert_count', 0)} experts and rotary scaling "
            f"'{scaling}'; only dense Llama models without scaling can be read"
        )
    heads, width = values["llama.attention.head_count"], values["llama.embedding_length"]
    rotary: dict[str, Any] = {"rope_type": "default", "rope_theta": values.get("llama.rope.freq_base", 10_000.0)}
    return LlamaConfig(
        vocab_size=len(values["tokenizer.ggml.tokens"]),
        hidden_size=width,
        intermediate_size=values["llama.feed_forward_length"],
        num_hidden_layers=values["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=values.get("llama.attention.head_count_kv", heads),
        head_dim=values.get("llama.rope.dimension_count", width // heads),
        max_position_embeddings=values["llama.context_length"],
        rms_norm_eps=values["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters=rotary,
        bos_token_id=values.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=values["tokenizer.ggml.eos_token_id"],
        pad_token_id=values.get("tokenizer.ggml.padding_token_id"),
        architectures=["LlamaForCausalLM"],
    )


def _weights(tensors: Any, config: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in tensors:
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        block, _, part = tensor.name.removeprefix("blk.").removesuffix(".weight").partition(".")
        if tensor.name in _TOP:
            yield _TOP[tensor.name], weight
        elif part in _BLOCK and tensor.name.endswith(".weight"):
            count = heads.get(part)
            yield f"model.layers.{block}.{_BLOCK[part]}.weight", unpermute(weight, count) if count else weight
        else:
            raise ValueError(f"the tensor '{tensor.name}' does not belong to a plain Llama model")


def _check_whole(path: Path, config: LlamaConfig, weights: dict[str, torch.Tensor]) -> None:
    """Every weight of the stock model is there, in its shape; without a head of its own, the head is the embedding."""
    config.tie_word_embeddings = "lm_head.weight" not in weights
    with torch.device("meta"):
        stock = LlamaForCausalLM(config)
    wrong = [
        name for name, weight in stock.named_parameters() if name not in weights or weights[name].shape != weight.shape
    ]
    if wrong:
        raise CheckpointError(
            f"'{path}' is damaged: {len(wrong)} weights are missing or misshapen, first '{wrong[0]}'; get it again"
        )


def _tokenizer(values: dict[str, Any]) -> Any:
    kind = f"{values['tokenizer.ggml.model']}/{values.get('tokenizer.ggml.pre', 'gpt-2')}"
    family, _, variant = kind.partition("/")
    if family != "gpt2" or variant not in _DIGITS_APART:
        raise ValueError(f"its tokenizer is '{kind}'; known are {[f'gpt2/{name}' for name in _DIGITS_APART]}")
    tokens: list[str] = values["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    bytes_apart = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits_apart = [pre_tokenizers.Digits(individual_digits=True)] if _DIGITS_APART[variant] else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits_apart, bytes_apart])  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    types: list[int] = values["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    named = {
        f"{name}_token": tokens[values[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
        if f"tokenizer.ggml.{key}_token_id" in values
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens=special,
        chat_template=values.get("tokenizer.chat_template"),
        model_max_length=values["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **named,
    )
