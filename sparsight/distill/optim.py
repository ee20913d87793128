"""The optimiser of a stage: AdamW with decay on matrices only, and a warm-up then cosine learning rate.

The rate is a pure function of the step, so a resumed run needs no schedule state.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from sparsight.config import StageConfig


def make_optimizer(parameters: Sequence[nn.Parameter], stage: StageConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; vectors (norms, biases, the newline) are not decayed."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": stage.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=stage.betas, fused=True)


def learning_rate_scale(step: int, total_steps: int, warmup_fraction: float) -> float:
    """Factor on the learning rate of optimiser step `step` (from 0): linear warm-up to 1, then a half cosine to 0."""
    warmup = math.ceil(total_steps * warmup_fraction)
    if step < warmup:
        return (step + 1) / warmup
    remaining = max(1, total_steps - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / remaining))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
