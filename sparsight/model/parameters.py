"""Counting and grouping a model's weights: activated and total parameters, and what a stage may train."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from sparsight.config import TrainableGroup
from sparsight.model.routing import routers
from sparsight.model.vision_language import VisionLanguageModel


def group_of(name: str) -> TrainableGroup:
    """The training group of a parameter, from its name in the stock LLaVA-OneVision model."""
    if ".vision_tower." in name:
        return "tower"
    if ".multi_modal_projector." in name or name.endswith("image_newline"):
        return "projector"
    if ".mlp.gate." in name:
        return "routers"
    if ".mlp." in name:
        return "experts"
    if ".self_attn." in name or "norm" in name:
        return "attention"
    return "embeddings"


def set_trainable(model: VisionLanguageModel, groups: Sequence[TrainableGroup]) -> list[nn.Parameter]:
    """Freeze everything but the given groups (`text` is all but tower and projector); returns what will train.

    `experts` are the feed-forward networks of all layers, dense ones included (LLaVA-MoD trains them so);
    `attention` includes the norms; `embeddings` includes the head.
    """
    wanted = set(groups)
    if "text" in wanted:
        wanted |= {"embeddings", "attention", "experts", "routers"}
    trainable: list[nn.Parameter] = []
    for name, parameter in model.model.named_parameters():
        parameter.requires_grad_(group_of(name) in wanted)
        if parameter.requires_grad:
            trainable.append(parameter)
    return trainable


def total_parameters(model: VisionLanguageModel) -> int:
    """All weights, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.model.parameters())


def activated_parameters(model: VisionLanguageModel) -> int:
    """Weights that take part in one token: of each sparse layer's experts, only the active ones."""
    idle = 0
    for layer, router in routers(model).items():
        layers: Any = model.text_model.layers
        gate: Any = router
        experts = sum(parameter.numel() for parameter in layers[layer].mlp.experts.parameters())
        idle += experts * (gate.num_experts - gate.top_k) // gate.num_experts
    return total_parameters(model) - idle
