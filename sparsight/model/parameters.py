"""Counting and grouping a model's weights: activated and total parameters, and what a stage may train."""

import re
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
    `attention` includes the norms; `embeddings` includes the head. Of the tower, what comes after the layer that
    features are taken from stays frozen: no loss depends on it, and data-parallel workers would wait for its gradient.
    """
    wanted = set(groups)
    if "text" in wanted:
        wanted |= {"embeddings", "attention", "experts", "routers"}
    trainable: list[nn.Parameter] = []
    for name, parameter in model.model.named_parameters():
        parameter.requires_grad_(group_of(name) in wanted and not _after_features(model.model.config, name))
        if parameter.requires_grad:
            trainable.append(parameter)
    return trainable


def _after_features(config: Any, name: str) -> bool:
    """Whether a weight of the tower comes after the hidden states that are its features."""
    if group_of(name) != "tower":
        return False
    layer, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    place = re.search(r"\.layers\.(\d+)\.", name)
    if place is not None:
        return int(place[1]) >= (layer if layer >= 0 else layers + 1 + layer)
    return ".post_layernorm." in name or ".head." in name


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
