"""What the routers of a sparse student did, per sparse layer: load, its entropy, co-activation, dead experts.

Pure functions of the routers' choices, and the one place that knows the names under which a training step's figures
stand in `metrics.jsonl`: `routing_metrics` writes them, `read_history` reads them for the report. Nothing here takes
part in the loss (that is `balance.py`), and nothing is drawn here. Called by the training loop and `pipelines.report`.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from sparsight.model.routing import chosen_together, load_entropy

DEAD_BELOW = 0.1
"""An expert whose share is below this part of an even share (1 / E) counts as dead."""

PAIRS_EVERY_STEPS = 10
"""Co-activation has E (E - 1) / 2 numbers a layer: it is written every so many steps, and after the last."""

_LOAD = re.compile(r"load/layer_(\d+)/expert_(\d+)")
_PAIR = re.compile(r"together/layer_(\d+)/experts_(\d+)_(\d+)")


class LayerRouting(NamedTuple):
    """One sparse layer: each expert's share of the routing decisions, and the share of tokens sent to both of two.

    `together_EE` is symmetric; its diagonal is the share of tokens that an expert received, `A` times its load.
    """

    load_E: list[float]
    together_EE: list[list[float]]

    @property
    def entropy(self) -> float:
        """Of the load, relative to ln E: 1 is even, 0 is collapse."""
        return load_entropy(self.load_E)

    @property
    def dead(self) -> list[int]:
        """Experts with less than `DEAD_BELOW` of an even share."""
        return [expert for expert, share in enumerate(self.load_E) if share < DEAD_BELOW / len(self.load_E)]


@dataclass
class LayerHistory:
    """One sparse layer over training: load [n, E] and its entropy at n steps, co-activation [E, E] of m of them."""

    steps: list[int] = field(default_factory=list[int])
    load_nE: list[list[float]] = field(default_factory=list[list[float]])
    entropy_n: list[float] = field(default_factory=list[float])
    together_mEE: list[list[list[float]]] = field(default_factory=list[list[list[float]]])
    """With a diagonal of 0; empty where tokens have one expert only, or none was written."""

    def extend(self, later: "LayerHistory", offset: int) -> None:
        """Append what followed, its steps counted on from `offset`."""
        self.steps += [offset + step for step in later.steps]
        self.load_nE += later.load_nE
        self.entropy_n += later.entropy_n
        self.together_mEE += later.together_mEE

    def last_together(self) -> list[list[float]]:
        """Mean co-activation [E, E] over the last tenth of what was written."""
        tables = self.together_mEE[-max(1, len(self.together_mEE) // 10) :]
        return [
            [math.fsum(cells) / len(cells) for cells in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)
        ]


def pair_counts(chosen: Mapping[int, torch.Tensor], experts: int, mask_T: torch.Tensor) -> torch.Tensor:
    """Tokens sent to both of two experts, layers in order [L, E, E], from chosen experts [T, A] by layer.

    Counts of several workers or steps may be added before they are read.
    """
    return torch.stack([chosen_together(chosen[layer], experts, mask_T) for layer in sorted(chosen)])


def layer_routing(counts_EE: Sequence[Sequence[float]]) -> LayerRouting:
    """One layer's figures from its `pair_counts`. Without a token, every share is 0."""
    E = len(counts_EE)
    assigned = math.fsum(counts_EE[expert][expert] for expert in range(E))
    active = math.fsum(map(math.fsum, counts_EE)) / max(1.0, assigned)  # a token counts A * A times, A on the diagonal
    tokens = assigned / max(1.0, active)
    load_E = [counts_EE[expert][expert] / max(1.0, assigned) for expert in range(E)]
    return LayerRouting(load_E, [[count / max(1.0, tokens) for count in row] for row in counts_EE])


def routing_metrics(counts_LEE: torch.Tensor, layers: Sequence[int], pairs: bool) -> dict[str, float]:
    """A step's figures by name: load of every expert, entropy and number of dead experts of every layer.

    With `pairs`, co-activation too, where tokens have more than one expert: `together/layer_l/experts_i_j`, i < j.
    """
    found: dict[str, float] = {}
    for layer, counts_EE in zip(layers, counts_LEE.tolist(), strict=True):
        routing = layer_routing(counts_EE)
        found |= {f"load/layer_{layer}/expert_{expert}": share for expert, share in enumerate(routing.load_E)}
        found[f"entropy/layer_{layer}"] = routing.entropy
        found[f"dead_experts/layer_{layer}"] = len(routing.dead)
        table = [(i, j, share) for i, row in enumerate(routing.together_EE) for j, share in enumerate(row) if i < j]
        if pairs and any(share > 0.0 for _, _, share in table):
            found |= {f"together/layer_{layer}/experts_{i}_{j}": share for i, j, share in table}
    return found


def read_history(rows: Iterable[Mapping[str, Any]]) -> dict[int, LayerHistory]:
    """Load, entropy and co-activation over the records of a metrics file, by sparse layer; empty if there is none."""
    found: dict[int, LayerHistory] = {}
    for row in rows:
        loads: dict[int, dict[int, float]] = {}
        pairs: dict[int, dict[tuple[int, int], float]] = {}
        for name, value in row.items():
            if match := _LOAD.fullmatch(name):
                loads.setdefault(int(match[1]), {})[int(match[2])] = value
            elif match := _PAIR.fullmatch(name):
                pairs.setdefault(int(match[1]), {})[int(match[2]), int(match[3])] = value
        for layer, load in loads.items():
            history = found.setdefault(layer, LayerHistory())
            history.steps.append(row["step"])
            history.load_nE.append([load[expert] for expert in sorted(load)])
            history.entropy_n.append(load_entropy(history.load_nE[-1]))
            if layer in pairs:
                history.together_mEE.append(_table(len(load), pairs[layer]))
    return found


def _table(experts: int, pairs: Mapping[tuple[int, int], float]) -> list[list[float]]:
    return [[pairs.get((min(i, j), max(i, j)), 0.0) for j in range(experts)] for i in range(experts)]
