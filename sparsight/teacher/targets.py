"""Next-token distributions without their vocabulary axis: logits to sparse targets, and back for checking.

The K most probable tokens are kept exactly; the rest is represented by its total mass and S independent draws from
it, renormalised, so that any sum over the tail has an unbiased estimate (Sparse Logit Sampling, arXiv 2503.16870,
with the head taken out first, which removes most of the variance). Pure functions, called by `flow.py`.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparsight.records import SparseTargets

CHUNK_ELEMENTS = 1 << 24
"""Logits that exist at one time: 64 MiB in float32."""


def tail_uniforms(seed: int, sample_id: str, positions: int, tail_samples: int) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), [n, S], of a sample's own random stream: equal wherever it is labelled."""
    key = hashlib.blake2b(f"{seed}\n{sample_id}".encode(), digest_size=16).digest()
    stream = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return stream.random((positions, tail_samples))


def sparse_targets(
    logits_nV: torch.Tensor, label_ids_n: torch.Tensor, head: int, uniforms_nS: torch.Tensor
) -> tuple[SparseTargets, npt.NDArray[np.float32]]:
    """Sparse targets of n distributions, and the log-probability of each label.

    `head` exact log-probabilities (float32, most probable first), the mass outside them, and one draw from that
    remainder for each uniform number, by inversion of its cumulative distribution (in float64: a vocabulary's tail
    is many small numbers). Where no mass is left, draws have id -1 and log-probability 0.
    """
    logprobs_nV = logits_nV.float().log_softmax(dim=-1)
    label_logprobs_n = logprobs_nV.gather(1, label_ids_n[:, None])[:, 0]
    head_logprobs_nK, head_ids_nK = logprobs_nV.topk(min(head, logits_nV.shape[1]), dim=-1)
    tail_nV = logprobs_nV.exp().scatter_(1, head_ids_nK, 0.0)
    cumulative_nV = tail_nV.cumsum(dim=-1, dtype=torch.float64)
    mass_n = cumulative_nV[:, -1].contiguous()
    below_n = torch.nextafter(mass_n, torch.zeros_like(mass_n))  # keeps u * mass under the mass after rounding
    wanted_nS = torch.minimum(uniforms_nS * mass_n[:, None], below_n[:, None])
    tail_ids_nS = torch.searchsorted(cumulative_nV, wanted_nS, right=True)
    empty_n1 = mass_n[:, None] <= 0.0
    tail_ids_nS = tail_ids_nS.masked_fill(empty_n1, 0)
    tail_logprobs_nS = logprobs_nV.gather(1, tail_ids_nS).masked_fill(empty_n1, 0.0)
    targets = SparseTargets(
        head_ids_nK=_numpy(head_ids_nK.int()),
        head_logprobs_nK=_numpy(head_logprobs_nK),
        tail_mass_n=_numpy(mass_n.float()),
        tail_ids_nS=_numpy(tail_ids_nS.masked_fill(empty_n1, -1).int()),
        tail_logprobs_nS=_numpy(tail_logprobs_nS),
    )
    return targets, _numpy(label_logprobs_n)


def targets_of_hidden(
    hidden_nD: torch.Tensor,
    head_of: Callable[[torch.Tensor], torch.Tensor],
    vocabulary: int,
    label_ids_n: npt.NDArray[np.int32],
    head: int,
    uniforms_nS: npt.NDArray[np.float64],
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[SparseTargets, npt.NDArray[np.float32]]:
    """`sparse_targets` of hidden states through the model's head, a chunk of positions at a time."""
    device = hidden_nD.device
    labels_n = torch.from_numpy(label_ids_n.astype(np.int64)).to(device)
    uniforms = torch.from_numpy(uniforms_nS).to(device)
    rows = max(1, chunk_elements // vocabulary)
    parts: list[SparseTargets] = []
    labels: list[npt.NDArray[np.float32]] = []
    for start in range(0, max(1, len(labels_n)), rows):  # no positions give empty tables, not none
        chunk = slice(start, start + rows)
        targets, label_logprobs = sparse_targets(head_of(hidden_nD[chunk]), labels_n[chunk], head, uniforms[chunk])
        parts.append(targets)
        labels.append(label_logprobs)
    return _joined(parts), np.concatenate(labels)


def cut(targets: SparseTargets, start: int, end: int) -> SparseTargets:
    """The targets of positions start to end."""
    return SparseTargets(
        targets.head_ids_nK[start:end],
        targets.head_logprobs_nK[start:end],
        targets.tail_mass_n[start:end],
        targets.tail_ids_nS[start:end],
        targets.tail_logprobs_nS[start:end],
    )


def _joined(parts: list[SparseTargets]) -> SparseTargets:
    if len(parts) == 1:
        return parts[0]
    return SparseTargets(
        np.concatenate([part.head_ids_nK for part in parts]),
        np.concatenate([part.head_logprobs_nK for part in parts]),
        np.concatenate([part.tail_mass_n for part in parts]),
        np.concatenate([part.tail_ids_nS for part in parts]),
        np.concatenate([part.tail_logprobs_nS for part in parts]),
    )


def _numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    return tensor.cpu().numpy()
