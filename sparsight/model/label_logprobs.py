"""The log-prob of a label at every position, with a gradient, without a [N, V] tensor.

For losses whose weights are known only once all log-probs are: what a position weighs in the loss arrives with the
gradient. Logits are made chunk by chunk. The gradient for the hidden states is kept from the forward pass, one row of
width D a position, and scaled on the way back; a head that trains costs a second pass over the chunks. Where the
weights are known beforehand, `distill.losses` needs one pass for both. Called by answer scoring and by preference
distillation.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch

CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}
"""Logits of one chunk, by default: 32 MiB in float32 on a CPU; a GPU needs taller products to be busy."""


def label_logprobs(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, labels_N: torch.Tensor, chunk_positions: int | None = None
) -> torch.Tensor:
    """log softmax(head · hidden_n)[label_n], [N], in float32 (float64 for float64 hidden states).

    `chunk_positions` bounds how many rows of logits exist at a time; it does not change the result.
    """
    chunk = chunk_positions or max(16, CHUNK_ELEMENTS.get(hidden_ND.device.type, 2**24) // head_VD.shape[0])
    return cast(Any, _LabelLogprobs).apply(hidden_ND, head_VD, labels_N, chunk, torch.is_grad_enabled())


class _LabelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, head_VD: torch.Tensor, labels_N: torch.Tensor, chunk: int, gradient: bool
    ) -> torch.Tensor:
        wants_hidden = gradient and ctx.needs_input_grad[0]
        head_cast_VD = head_VD.to(hidden_ND.dtype)
        logprobs_N = hidden_ND.new_empty(len(labels_N), dtype=_exact(hidden_ND))
        slope_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        for part in _parts(len(labels_N), chunk):
            logits_nV = (hidden_ND[part] @ head_cast_VD.T).to(logprobs_N.dtype)
            log_sum_n = logits_nV.logsumexp(dim=-1)
            logprobs_N[part] = logits_nV.gather(1, labels_N[part, None])[:, 0] - log_sum_n
            if slope_ND is not None:  # how the log-prob rises with the hidden state
                probs_nV = logits_nV.sub_(log_sum_n[:, None]).exp_().to(hidden_ND.dtype)
                torch.sub(head_cast_VD[labels_N[part]], probs_nV @ head_cast_VD, out=slope_ND[part])
        ctx.chunk = chunk
        ctx.save_for_backward(slope_ND, *((hidden_ND, head_VD, labels_N) if ctx.needs_input_grad[1] else ()))
        return logprobs_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        slope_ND, *rest = ctx.saved_tensors
        grad_hidden_ND = None if slope_ND is None else slope_ND * grad_N[:, None].to(slope_ND.dtype)
        grad_head_VD = _head_gradient(rest, grad_N, ctx.chunk) if rest else None
        return grad_hidden_ND, grad_head_VD, None, None, None


def _head_gradient(saved: Sequence[torch.Tensor], grad_N: torch.Tensor, chunk: int) -> torch.Tensor:
    hidden_ND, head_VD, labels_N = saved
    head_cast_VD = head_VD.to(hidden_ND.dtype)
    total_VD = torch.zeros_like(head_VD)
    for part in _parts(len(labels_N), chunk):
        probs_nV = (hidden_ND[part] @ head_cast_VD.T).to(grad_N.dtype).softmax(dim=-1)
        slope_nV = probs_nV.mul_(-grad_N[part, None]).scatter_add_(1, labels_N[part, None], grad_N[part, None])
        total_VD += (slope_nV.to(hidden_ND.dtype).T @ hidden_ND[part]).to(total_VD.dtype)
    return total_VD


def _exact(hidden_ND: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32


def _parts(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]
