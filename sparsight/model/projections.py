"""What the layers of a text model ask for and what they offer: queries and keys before rotation, by forward hooks.

These are the tensors that retrieval from a stream works with (`sparsight.kv`), seen while the stock model runs in
training. Where a family norms queries and keys by head, they are taken after that. Used by the retrieval term.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparsight.model.hooks import watched
from sparsight.model.vision_language import VisionLanguageModel


@dataclass
class ProjectionTrace:
    """By layer, of the latest forward: queries [B, T, H, C] and keys [B, T, G, C], not rotated."""

    queries: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    keys: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])


@contextmanager
def trace_projections(model: VisionLanguageModel) -> Generator[ProjectionTrace]:
    """Collects every text layer's queries and keys while the context is open; each forward replaces the one before."""
    trace = ProjectionTrace()
    watchers: list[tuple[nn.Module, Callable[[Any], None]]] = []
    layers: Any = model.text_model.layers
    for layer, block in enumerate(layers):
        attention: Any = block.self_attn
        for kept, name in ((trace.queries, "q"), (trace.keys, "k")):
            module: nn.Module = getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj")
            watchers.append((module, _keep(kept, layer, attention.head_dim)))
    with watched(watchers):
        yield trace


def _keep(kept: dict[int, torch.Tensor], layer: int, width: int) -> Callable[[torch.Tensor], None]:
    """Puts a layer's output [B, T, …] into `kept`, as heads of this width."""

    def watch(output: torch.Tensor) -> None:
        kept[layer] = output.reshape(*output.shape[:2], -1, width)

    return watch
