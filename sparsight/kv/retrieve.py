"""Which blocks a question needs: scores of all blocks in one layer, and the choice among them.

Pure functions on tensors, and `BestAndRecent`, the choice that ReKV makes (internal retrieval: the layer's own queries
against its own mean keys) with the newest frames always included. It moves no page and knows no bank.
Called by `answerer`, once a layer.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from sparsight.errors import StreamError
from sparsight.kv.bank import BlockIndex

Similarity = Literal["cosine", "dot"]


class Selection(NamedTuple):
    """Chosen rows of an index, in time order, each with its score and its rank among all rows (0 is the best)."""

    rows_R: Tensor
    scores_R: Tensor
    ranks_R: Tensor


class Retriever(Protocol):
    """Chooses the blocks that one layer attends to."""

    def select(self, layer: int, queries_HTC: Tensor, index: BlockIndex) -> Selection:
        """`queries_HTC` are the layer's un-rotated queries of the T question tokens. At least one row is chosen."""
        ...


@dataclass(frozen=True)
class BestAndRecent:
    """The `best` best-scored blocks and, besides, the `recent` newest; all blocks when there are no more than that.

    The number chosen depends on the number of blocks only, so every layer has a context of the same length.
    """

    best: int
    recent: int = 0
    similarity: Similarity = "cosine"

    def __post_init__(self) -> None:
        if min(self.best, self.recent) < 0 or self.best + self.recent == 0:
            raise StreamError(
                f"retrieving {self.best} best and {self.recent} recent blocks leaves none to attend to: "
                "ask for at least one."
            )

    def select(self, layer: int, queries_HTC: Tensor, index: BlockIndex) -> Selection:
        scores_N = score_blocks(queries_HTC, index.mean_keys_LNGC[layer], self.similarity)
        return select_blocks(scores_N, self.best, self.recent)


def score_blocks(queries_HTC: Tensor, mean_keys_NGC: Tensor, similarity: Similarity = "cosine") -> Tensor:
    """Score [N], in float32, of every block for the mean of T queries (ReKV, section 3.2).

    The score compares the heads' mean queries, laid end to end, with each block's mean keys, repeated for the queries
    of a group. Here the queries of a group are summed instead: the same dot product without the repetition.
    `cosine` is the paper's similarity; `dot`, its published code's, favours blocks with long keys.
    """
    mean_HC = queries_HTC.float().mean(dim=1).to(mean_keys_NGC.device)
    G = mean_keys_NGC.shape[1]
    group = mean_HC.shape[0] // G
    grouped_GC = mean_HC.unflatten(0, (G, group)).sum(dim=1)
    dots_N = mean_keys_NGC.flatten(1) @ grouped_GC.flatten()
    if similarity == "dot":
        return dots_N
    expanded_norms_N = mean_keys_NGC.flatten(1).norm(dim=1) * group**0.5
    return dots_N / (expanded_norms_N * mean_HC.norm()).clamp_min(torch.finfo(torch.float32).tiny)


def select_blocks(scores_N: Tensor, best: int, recent: int) -> Selection:
    """The last `recent` of N blocks, and the `best` best-scored of the others; of equal scores the earlier wins."""
    N = scores_N.shape[0]
    order_N = torch.sort(scores_N, descending=True, stable=True).indices
    ranks_N = torch.empty_like(order_N)
    ranks_N[order_N] = torch.arange(N, device=order_N.device)
    chosen_N = torch.zeros(N, dtype=torch.bool, device=order_N.device)
    chosen_N[max(0, N - recent) :] = True
    chosen_N[order_N[~chosen_N[order_N]][:best]] = True
    rows_R = chosen_N.nonzero().flatten()
    return Selection(rows_R, scores_N[rows_R], ranks_N[rows_R])
