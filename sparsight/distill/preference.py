"""Preference losses on log-ratios: how much more, or less, likely than its reference a student finds two answers.

r(y) = log π_student(y) − log π_reference(y), summed over the answer's tokens. Pure functions of r of the chosen and of
the rejected answer, but for KTO's baselines, which are means over the whole global batch. LLaVA-MoD (arXiv 2408.15881)
takes the frozen teacher as reference. Called by the training step over pairs.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from sparsight.distill.workers import sum_over_workers
from sparsight.stages import PreferenceConfig


class Preference(NamedTuple):
    """Per pair [B]: the loss (differentiable), β (r_chosen − r_rejected), and 1 where the chosen answer has gained more
    on its reference than the rejected one, else 0."""

    losses_B: torch.Tensor
    margins_B: torch.Tensor
    accurate_B: torch.Tensor


class Baselines(NamedTuple):
    """What KTO holds the other answer's ratios against: z = max(0, mean r) of chosen and rejected answers, 0-d."""

    chosen: torch.Tensor
    rejected: torch.Tensor


def preference(chosen_B: torch.Tensor, rejected_B: torch.Tensor, settings: PreferenceConfig) -> Preference:
    """The loss of every pair of this worker's share from its log-ratios. All workers must call it together."""
    if settings.loss == "dpo":
        losses_B = dpo(chosen_B, rejected_B, settings.beta, settings.label_smoothing)
    else:
        losses_B = kto_pair(chosen_B, rejected_B, settings.beta, kto_baselines(chosen_B, rejected_B))
    gap_B = (chosen_B - rejected_B).detach()
    return Preference(losses_B, settings.beta * gap_B, (gap_B > 0).to(gap_B.dtype))


def dpo(chosen_B: torch.Tensor, rejected_B: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """−log σ(β (r_c − r_r)) (arXiv 2305.18290), [B]; ln 2 where nothing distinguishes student and reference.

    With label smoothing s, pairs count the other way round with probability s: (1 − s) · (−log σ(x)) − s · log σ(−x).
    """
    x_B = beta * (chosen_B - rejected_B)
    return -(1.0 - label_smoothing) * logsigmoid(x_B) - label_smoothing * logsigmoid(-x_B)


def kto_baselines(chosen_B: torch.Tensor, rejected_B: torch.Tensor) -> Baselines:
    """Means over the pairs of all workers, detached. All workers must call it together."""
    count = chosen_B.new_full((1,), len(chosen_B))
    local = torch.cat([chosen_B.detach().sum()[None], rejected_B.detach().sum()[None], count])
    chosen, rejected, pairs = sum_over_workers(local)
    return Baselines((chosen / pairs).clamp(min=0), (rejected / pairs).clamp(min=0))


def kto_pair(chosen_B: torch.Tensor, rejected_B: torch.Tensor, beta: float, baselines: Baselines) -> torch.Tensor:
    """The mean of 1 − σ(β (r_c − z_r)) and 1 − σ(β (z_c − r_r)) (after KTO, arXiv 2402.01306), [B].

    0.5 where nothing distinguishes student and reference. The baselines are constants: moving them gains nothing.
    """
    chosen_losses_B = torch.sigmoid(-beta * (chosen_B - baselines.rejected))
    rejected_losses_B = torch.sigmoid(-beta * (baselines.chosen - rejected_B))
    return (chosen_losses_B + rejected_losses_B) / 2
