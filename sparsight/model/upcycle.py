"""Sparse up-cycling: a dense student becomes its stock mixture-of-experts twin with the same logits.

Every expert of a sparse layer is a copy of the dense feed-forward network and the router's weights sum to one, so
whatever the random router chooses, the layer computes what it did before (LLaVA-MoD section 3, Sparse Upcycling
arXiv 2212.05055). All other weights are moved unchanged. Routing drops no token.
"""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, LlavaOnevisionForConditionalGeneration

from sparsight.config import UpcycleConfig
from sparsight.errors import ConfigError
from sparsight.model.experts import use_experts
from sparsight.model.vision_language import VisionLanguageModel

SPARSE_TWINS = {"qwen3": "qwen3_moe", "qwen2": "qwen2_moe", "llama": "mixtral"}
_ARCHITECTURES = {
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


def sparse_layers(pattern: str | Sequence[int], layers: int) -> list[int]:
    """The text layers that a pattern makes sparse. Raises `ConfigError` for none, or one that is not there."""
    named = {
        "every_second": range(0, layers, 2),
        "first_half": range(layers // 2),
        "second_half": range(layers // 2, layers),
        "all": range(layers),
    }
    if isinstance(pattern, str):
        if not named[pattern]:
            raise ConfigError(f"upcycle.layers {pattern} of {layers} text layers are none: take another pattern")
        return list(named[pattern])
    wrong = [layer for layer in pattern if not 0 <= layer < layers]
    if wrong or not pattern:
        raise ConfigError(f"upcycle.layers {list(pattern)}: the text model has layers 0 to {layers - 1}")
    return sorted(set(pattern))


def upcycle(dense: VisionLanguageModel, settings: UpcycleConfig, seed: int) -> VisionLanguageModel:
    """A sparse model of the dense one's stock twin class; only its routers are new (random, seeded).

    Raises `ConfigError` if the text model has no stock sparse twin, or the twin cannot express the layer pattern.
    """
    config = copy.deepcopy(dense.model.config)
    sparse = sparse_layers(settings.layers, config.text_config.num_hidden_layers)
    config.text_config = _sparse_text_config(config.text_config, settings, sparse)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # Qwen2-MoE's shared expert of width 0
        model: Any = LlavaOnevisionForConditionalGeneration(config)
    weights = dense.model.state_dict()
    with torch.no_grad():
        for name, target in model.state_dict().items():
            target.copy_(_source(name, target, weights, settings.experts))
    model = model.to(dense.device, dense.model.dtype).eval()
    use_experts(model)
    model.generation_config = copy.deepcopy(dense.model.generation_config)
    return VisionLanguageModel(model, dense.chat, dense.pixels)


def _source(name: str, target: torch.Tensor, weights: dict[str, torch.Tensor], experts: int) -> torch.Tensor:
    """Where a weight of the sparse model comes from: the dense one, copied per expert, or its own random start."""
    if name in weights:
        return weights[name]
    prefix, _, leaf = name.rpartition(".mlp.")
    if leaf == "experts.gate_up_proj":
        gate_up = [weights[f"{prefix}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        return torch.cat(gate_up).expand(experts, -1, -1)
    if leaf == "experts.down_proj":
        return weights[f"{prefix}.mlp.down_proj.weight"].expand(experts, -1, -1)
    assert leaf == "gate.weight" or target.numel() == 0 or "shared_expert" in leaf, f"no source for {name}"
    if leaf == "gate.weight":
        return torch.randn_like(target) * 0.02
    return target


def _sparse_text_config(dense: Any, settings: UpcycleConfig, sparse: Sequence[int]) -> Any:
    kind = SPARSE_TWINS.get(dense.model_type)
    if kind is None:
        raise ConfigError(f"text model '{dense.model_type}' has no stock sparse twin; known: {sorted(SPARSE_TWINS)}")
    layers = dense.num_hidden_layers
    if kind == "mixtral" and len(sparse) != layers:
        raise ConfigError("Mixtral, the sparse twin of Llama, makes every layer sparse: set upcycle.layers to 'all'")
    values: dict[str, Any] = dense.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        values.pop(key, None)
    values |= {"num_experts_per_tok": settings.active_experts, "output_router_logits": False}
    if kind == "mixtral":
        values |= {"num_local_experts": settings.experts}
    else:
        values |= {
            "num_experts": settings.experts,
            "moe_intermediate_size": dense.intermediate_size,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer in range(layers) if layer not in sparse],
        }
    if kind == "qwen2_moe":
        values |= {"shared_expert_intermediate_size": 0, "qkv_bias": True}
    return AutoConfig.for_model(kind, architectures=[_ARCHITECTURES[kind]], **values)
