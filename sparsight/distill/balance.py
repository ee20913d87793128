"""The router load-balance loss over real tokens of the whole global batch, and the load figures beside it.

Per sparse layer E · Σ_e f_e · P_e, with f the share of routed assignments that expert e received and P its mean
router probability (Switch Transformer, arXiv 2101.03961, with all A choices counted); the mean over layers. Equals 1
at perfect balance. Padding is not a token. Called by the training step; the routers are watched elsewhere
(`model.routing`).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from sparsight.distill.workers import sum_over_workers, worker_count
from sparsight.model.routing import expert_load


class Balance(NamedTuple):
    """`loss` is this worker's share: its mean over workers is `value`, and so are the gradients. `load_LE` is f."""

    loss: torch.Tensor
    value: torch.Tensor
    load_LE: torch.Tensor


def balance_loss(
    logits: Mapping[int, torch.Tensor], chosen: Mapping[int, torch.Tensor], mask_T: torch.Tensor
) -> Balance:
    """Balance of a forward's routers: logits [T, E] and chosen experts [T, A] by layer, mask [T] of real tokens.

    f and the number of tokens are of all workers together, so that however a batch is split over workers, the mean of
    their gradients is the gradient of the whole batch. f carries no gradient.
    """
    layers = sorted(logits)
    experts = logits[layers[0]].shape[1]
    local_load_LE = torch.stack([expert_load(chosen[layer], experts, mask_T) for layer in layers])
    weights_T = mask_T.to(torch.float32)
    local_sums_LE = torch.stack([weights_T @ logits[layer].float().softmax(dim=-1) for layer in layers])
    tokens = weights_T.sum()
    totals = sum_over_workers(torch.cat([(local_load_LE * tokens).flatten(), local_sums_LE.flatten(), tokens[None]]))
    all_tokens = totals[-1].clamp(min=1)
    load_LE, mean_LE = (totals[:-1] / all_tokens).view(2, len(layers), experts)
    loss = experts * (load_LE * local_sums_LE).sum(dim=-1).mean() / all_tokens * worker_count()
    value = experts * (load_LE * mean_LE).sum(dim=-1).mean()
    return Balance(loss, value, load_LE)
