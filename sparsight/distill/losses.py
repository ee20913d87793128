"""Cross-entropy and forward KL to sparse teacher targets, at chosen positions, without a [N, V] tensor.

Logits are made chunk by chunk from hidden states and the head; both losses share them, and the gradients for hidden
states and head are taken on the spot, so nothing of vocabulary width outlives its chunk and nothing is computed
twice. Which positions count, and how much, is the caller's choice through per-position weights. Called by the
training step.
"""

from typing import Any, Literal, NamedTuple, cast

import torch

Tail = Literal["sampled", "bucket"]

CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}
"""Logits of one chunk, by default: 32 MiB in float32 on a CPU; a GPU needs taller products to be busy."""


class SparseTargetTensors(NamedTuple):
    """`records.SparseTargets` of N positions as tensors; a tail id of -1 is an empty draw."""

    head_ids_NK: torch.Tensor
    head_logprobs_NK: torch.Tensor
    tail_mass_N: torch.Tensor
    tail_ids_NS: torch.Tensor
    tail_logprobs_NS: torch.Tensor


class ResponseTargets(NamedTuple):
    """What N positions should predict. A weight of 0 leaves the position out of that term.

    `label_ids_N` are the next tokens; `sparse` is the teacher, None where a stage has none.
    """

    label_ids_N: torch.Tensor
    ce_weights_N: torch.Tensor
    kl_weights_N: torch.Tensor
    sparse: SparseTargetTensors | None


class ResponseLoss(NamedTuple):
    """`total` = Σ ce_weight · CE + Σ kl_weight · KL (differentiable); the rest are unweighted values per position."""

    total: torch.Tensor
    cross_entropy_N: torch.Tensor
    kl_N: torch.Tensor


def response_loss(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    targets: ResponseTargets,
    tail: Tail = "sampled",
    chunk_positions: int | None = None,
) -> ResponseLoss:
    """Weighted cross-entropy and forward KL of N positions.

    The KL of a position is Σ_v p_v (log p_v - log q_v) with p the teacher and q the student. Over the K head ids the
    sum is exact. Outside them, with tail mass m:

    - `sampled`: each of the S draws stands for m / S, so the sum and its gradient are unbiased (Sparse Logit
      Sampling, arXiv 2503.16870);
    - `bucket`: m is one bucket against the student's whole mass outside the head: m (log m - log u). A lower bound
      of the full KL, without variance.

    `chunk_positions` bounds how many rows of logits exist at a time; it does not change the result.
    """
    chunk = chunk_positions or max(16, CHUNK_ELEMENTS.get(hidden_ND.device.type, 2**24) // head_VD.shape[0])
    total, cross_entropy_N, kl_N = _apply(hidden_ND, head_VD, targets, tail, chunk)
    return ResponseLoss(total, cross_entropy_N, kl_N)


def _apply(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return cast(Any, _ChunkedLoss).apply(*arguments)


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients in one pass over chunks of positions; backward only scales what is there."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, head_VD: torch.Tensor, targets: ResponseTargets, tail: Tail, chunk: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        N = hidden_ND.shape[0]
        exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        cross_entropy_N = hidden_ND.new_zeros(N, dtype=exact)
        kl_N = torch.zeros_like(cross_entropy_N)
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_head_VD = torch.zeros_like(head_VD) if wants_head else None
        head_cast_VD = head_VD.to(hidden_ND.dtype)
        for start in range(0, N, chunk):
            part = slice(start, min(start + chunk, N))
            logits_nV = (hidden_ND[part] @ head_cast_VD.T).to(exact)
            chunk_targets = _cut(targets, part)
            cross_entropy_N[part], kl_N[part], slope_nV = _chunk(logits_nV, chunk_targets, tail)
            slope_nV = slope_nV.to(hidden_ND.dtype)
            if grad_hidden_ND is not None:
                torch.mm(slope_nV, head_cast_VD, out=grad_hidden_ND[part])
            if grad_head_VD is not None:
                _add_product(grad_head_VD, slope_nV.T, hidden_ND[part])
            del logits_nV, slope_nV
        total = cross_entropy_N @ targets.ce_weights_N.to(exact) + kl_N @ targets.kl_weights_N.to(exact)
        ctx.save_for_backward(grad_hidden_ND, grad_head_VD)
        ctx.mark_non_differentiable(cross_entropy_N, kl_N)
        return total, cross_entropy_N, kl_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor, *_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = [grad if grad is None else _scaled(grad, grad_total) for grad in ctx.saved_tensors]
        return *grads, None, None, None


def _scaled(grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The head's gradient is as large as the head: the usual factor of 1 must not copy it."""
    return grad if bool(factor == 1) else grad * factor.to(grad.dtype)


def _add_product(total_VD: torch.Tensor, left_Vn: torch.Tensor, right_nD: torch.Tensor) -> None:
    if total_VD.dtype == left_Vn.dtype:
        total_VD.addmm_(left_Vn, right_nD)
    else:
        total_VD += left_Vn @ right_nD


def _cut(targets: ResponseTargets, part: slice) -> ResponseTargets:
    sparse = targets.sparse
    return ResponseTargets(
        targets.label_ids_N[part],
        targets.ce_weights_N[part],
        targets.kl_weights_N[part],
        None if sparse is None else SparseTargetTensors(*(values[part] for values in sparse)),
    )


def _chunk(
    logits_nV: torch.Tensor, targets: ResponseTargets, tail: Tail
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """CE [n], KL [n] and the gradient of their weighted sum with respect to the logits [n, V], which it overwrites."""
    labels_n1 = targets.label_ids_N[:, None]
    label_logits_n = logits_nV.gather(1, labels_n1)[:, 0]
    ce_weights_n = targets.ce_weights_N.to(logits_nV.dtype)
    if targets.sparse is None:
        log_sum_n, sum_n = _exponentials_(logits_nV)
        slope_nV = logits_nV.mul_((ce_weights_n / sum_n)[:, None])
        slope_nV.scatter_add_(1, labels_n1, -ce_weights_n[:, None])
        cross_entropy_n = log_sum_n - label_logits_n
        return cross_entropy_n, torch.zeros_like(cross_entropy_n), slope_nV

    kl_weights_n = targets.kl_weights_N.to(logits_nV.dtype)
    ids_nJ, mass_nJ, logprobs_nJ = _kept(targets.sparse, tail, logits_nV.dtype)
    kept_logits_nJ = logits_nV.gather(1, ids_nJ)
    bucket = _bucket(logits_nV, targets.sparse) if tail == "bucket" else None
    log_sum_n, sum_n = _exponentials_(logits_nV)
    kl_n = (mass_nJ * (logprobs_nJ - kept_logits_nJ + log_sum_n[:, None])).sum(dim=-1)
    rise_n = ce_weights_n + kl_weights_n * mass_nJ.sum(dim=-1)
    slope_nV = logits_nV.mul_((rise_n / sum_n)[:, None])
    slope_nV.scatter_add_(
        1, torch.cat([labels_n1, ids_nJ], 1), -torch.cat([ce_weights_n[:, None], kl_weights_n[:, None] * mass_nJ], 1)
    )
    if bucket is not None:
        value_n, bucket_slope_nV = bucket
        kl_n = kl_n + value_n
        slope_nV.addcmul_(bucket_slope_nV, kl_weights_n[:, None])
    return log_sum_n - label_logits_n, kl_n, slope_nV


def _exponentials_(logits_nV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn logits, in their memory, into exp(logit - largest); their log-sum-exp and the sum of what they became."""
    largest_n = logits_nV.amax(dim=-1)
    sum_n = logits_nV.sub_(largest_n[:, None]).exp_().sum(dim=-1)
    return largest_n + sum_n.log(), sum_n


def _kept(
    sparse: SparseTargetTensors, tail: Tail, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, probability that each stands for, and teacher log-probs [n, J] of what is stored; empty draws weigh 0."""
    head_logprobs_nK = sparse.head_logprobs_NK.to(dtype)
    if tail == "bucket" or sparse.tail_ids_NS.shape[1] == 0:
        return sparse.head_ids_NK, head_logprobs_nK.exp(), head_logprobs_nK
    drawn_nS = sparse.tail_ids_NS >= 0
    share_n1 = (sparse.tail_mass_N / sparse.tail_ids_NS.shape[1])[:, None].to(dtype)
    tail_logprobs_nS = sparse.tail_logprobs_NS.to(dtype).masked_fill(~drawn_nS, 0.0)
    ids_nJ = torch.cat([sparse.head_ids_NK, sparse.tail_ids_NS.clamp(min=0)], dim=1)
    mass_nJ = torch.cat([head_logprobs_nK.exp(), share_n1 * drawn_nS], dim=1)
    return ids_nJ, mass_nJ, torch.cat([head_logprobs_nK, tail_logprobs_nS], dim=1)


def _bucket(logits_nV: torch.Tensor, sparse: SparseTargetTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """m (log m - log u) [n] and its gradient [n, V]; u is the student's mass outside the head.

    log u is a log-sum-exp over the other logits, not log(1 - Σ head), which would be lost to rounding where the
    student is sure.
    """
    mass_n = sparse.tail_mass_N.to(logits_nV.dtype)
    log_sum_n = logits_nV.logsumexp(dim=-1)
    outside_nV = logits_nV.scatter(1, sparse.head_ids_NK, float("-inf"))
    log_outside_n = outside_nV.logsumexp(dim=-1)
    mass_n = mass_n.masked_fill(log_outside_n == float("-inf"), 0.0)  # the head is the whole vocabulary
    log_outside_n = log_outside_n.nan_to_num(neginf=0.0)
    value_n = torch.xlogy(mass_n, mass_n) - mass_n * (log_outside_n - log_sum_n)
    inside_nV = (logits_nV - log_sum_n[:, None]).exp_()
    slope_nV = inside_nV.sub_(outside_nV.sub_(log_outside_n[:, None]).exp_())
    return value_n, slope_nV.mul_(mass_n[:, None])
