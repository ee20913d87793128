"""Watching the routers of a sparse text model: their logits and choices, layer by layer, by forward hooks.

The outer LLaVA-OneVision class does not return router logits, and hooks are the public way to get them. Counts of
choices and the entropy of a load are here because training and evaluation both tell them; what else is done with the
routers' words (balance loss, telemetry) is decided by the callers.
"""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparsight.model.hooks import watched
from sparsight.model.vision_language import VisionLanguageModel


def routers(model: VisionLanguageModel) -> dict[int, nn.Module]:
    """The router module of every sparse text layer, by layer number; empty for a dense model."""
    found: dict[int, nn.Module] = {}
    layers: Any = model.text_model.layers
    for index, layer in enumerate(layers):
        gate = getattr(layer.mlp, "gate", None)
        if gate is not None and hasattr(layer.mlp, "experts"):
            found[index] = gate
    return found


@dataclass
class RouterTrace:
    """Per sparse layer, of the latest forward: logits [tokens, E] and chosen experts [tokens, A]."""

    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    chosen: dict[int, torch.Tensor] = field(default_factory=dict)


@contextmanager
def trace_routers(model: VisionLanguageModel) -> Generator[RouterTrace]:
    """Collects what every router says while the context is open; each forward replaces the one before."""
    trace = RouterTrace()

    def keep(layer: int) -> Callable[[Any], None]:
        def watch(output: Any) -> None:
            trace.logits[layer], _, trace.chosen[layer] = output

        return watch

    with watched((router, keep(layer)) for layer, router in routers(model).items()):
        yield trace


def expert_load(chosen_TA: torch.Tensor, experts: int, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """Share of routed assignments that each expert received [E]; sums to 1. Masked-out tokens do not count."""
    kept = chosen_TA if mask_T is None else chosen_TA[mask_T.bool()]
    counts_E = torch.bincount(kept.reshape(-1), minlength=experts).float()
    return counts_E / counts_E.sum().clamp(min=1)


def chosen_together(chosen_TA: torch.Tensor, experts: int, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """How many tokens were sent to both of two experts [E, E]; the diagonal counts each expert's own tokens.

    Symmetric; masked-out tokens do not count. A token's chosen experts must differ, as top-k makes them.
    """
    kept = chosen_TA if mask_T is None else chosen_TA[mask_T.bool()]
    pairs_TAA = kept[:, :, None] * experts + kept[:, None, :]
    return torch.bincount(pairs_TAA.flatten(), minlength=experts * experts).view(experts, experts)


def load_entropy(load_E: Sequence[float]) -> float:
    """Entropy of shares that sum to 1, relative to ln E: 1 where all experts have equal shares, 0 where one has all.

    Times ln E it is in nats. All-zero shares (nothing was routed) have entropy 0.
    """
    nats = -math.fsum(share * math.log(share) for share in load_E if share > 0.0)
    return abs(nats) / math.log(len(load_E))
