"""How positions relate to each other through the head's logits, without the logits.

With Z = H Wᵀ [N, V] the head's logits at N positions, their relation is R = Z Zᵀ [N, N] (LLaVA-KD, arXiv 2410.16236).
It equals H (Wᵀ W) Hᵀ, so nothing of vocabulary width is made but W's own gradient, and Wᵀ W serves every picture of a
step. Teachers make what is stored of it, the training step makes the student's; the loss is `distill.relation`.
"""

from typing import Any, cast

import torch

CHUNK_ROWS = 4096
"""Of the head at a time, by default: a float32 copy of a bfloat16 head of width 1152 then takes 18 MiB."""
BLOCKS = 8
"""Stripes that the symmetric product is cut into, at most: it costs (1 + 1 / BLOCKS) / 2 of the full one."""
BLOCK_WIDTH = 128
"""Narrower stripes would be slow products."""


def head_gram(head_VD: torch.Tensor, chunk_rows: int = CHUNK_ROWS) -> torch.Tensor:
    """Wᵀ W [D, D] of a head, exactly symmetric, in float32 (float64 for a float64 head), differentiable.

    It depends on the head alone: a frozen head needs it once, a head that trains once a step, for all pictures.
    `chunk_rows` bounds how much of a half-precision head is cast at a time; it does not change the result.
    """
    return cast(Any, _HeadGram).apply(head_VD, chunk_rows)


def relation_matrix(hidden_ND: torch.Tensor, gram_DD: torch.Tensor) -> torch.Tensor:
    """R = H (Wᵀ W) Hᵀ [N, N] in the precision of `gram_DD`: the dot products of N positions' logits."""
    hidden_ND = hidden_ND.to(gram_DD.dtype)
    return hidden_ND @ gram_DD @ hidden_ND.T


def factors_of_gram(gram_DD: torch.Tensor) -> torch.Tensor:
    """A symmetric [D, D] root F of a Gram matrix, F F = Wᵀ W: rows of H F have the dot products of rows of H Wᵀ."""
    values_D, vectors_DD = torch.linalg.eigh(gram_DD.double())
    root_DD = (vectors_DD * values_D.clamp(min=0.0).sqrt()) @ vectors_DD.T
    return root_DD.to(gram_DD.dtype)


class _HeadGram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head_VD: torch.Tensor, chunk_rows: int) -> torch.Tensor:
        D = head_VD.shape[1]
        block = max(BLOCK_WIDTH, -(-D // BLOCKS))
        upper_DD = head_VD.new_zeros(D, D, dtype=_exact(head_VD))
        for rows_nD in head_VD.split(chunk_rows):
            rows_nD = rows_nD.to(upper_DD.dtype)
            for start in range(0, D, block):
                stripe = slice(start, start + block)
                upper_DD[stripe, start:].addmm_(rows_nD[:, stripe].T, rows_nD[:, start:])
        ctx.chunk_rows = chunk_rows
        ctx.save_for_backward(head_VD)
        return upper_DD.triu() + upper_DD.triu(1).T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_DD: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (head_VD,) = ctx.saved_tensors
        both_DD = grad_DD + grad_DD.T
        grad_VD = torch.empty_like(head_VD)
        for rows_nD, grad_nD in zip(head_VD.split(ctx.chunk_rows), grad_VD.split(ctx.chunk_rows), strict=True):
            grad_nD.copy_(rows_nD.to(both_DD.dtype) @ both_DD)
        return grad_VD, None


def _exact(head_VD: torch.Tensor) -> torch.dtype:
    return torch.float64 if head_VD.dtype == torch.float64 else torch.float32
