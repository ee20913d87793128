"""Which blocks a question needs: scores of all blocks in one layer, and the choice among them.

Pure functions on tensors, and three choices: `BestAndRecent`, which ReKV makes (internal retrieval: the layer's own
queries against its own mean keys) with the newest frames always included; `ByEmbedding`, from vectors of another model
(external retrieval); `ByNumber`, given from outside (the oracle). It moves no page and knows no bank.
Called by `answerer`, once a layer.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sparsight.errors import StreamError
from sparsight.kv.bank import BlockIndex

Similarity = Literal["cosine", "dot"]
_TINIEST = torch.finfo(torch.float32).tiny


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

    `group` neighbours share the mean of their scores (ReKV's b). `around` = (before, after) are the neighbours that a
    block chosen by its score brings along, out of the same number: what was there just before a thing has no word in a
    question about it. With `mass`, a layer stops earlier: at the block with which those it takes, the newest among
    them, have that share of its estimated attention (as V-Rex does, arXiv 2512.12284). Without it, the number chosen
    depends on the number of blocks only, so every layer has a context of the same length.
    """

    best: int
    recent: int = 0
    similarity: Similarity = "cosine"
    group: int = 1
    mass: float | None = None
    around: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        _check_choice(self.best, self.recent, self.group, self.around)
        if self.mass is not None and not 0 < self.mass <= 1:
            raise StreamError(f"a share of {self.mass:g} of the attention is impossible: choose one in (0, 1].")

    def select(self, layer: int, queries_HTC: Tensor, index: BlockIndex) -> Selection:
        mean_keys_NGC = index.mean_keys_LNGC[layer]
        scores_N = score_blocks(queries_HTC, mean_keys_NGC, self.similarity, index.norms_LN[layer])
        shares_N = None if self.mass is None else attention_shares(queries_HTC, mean_keys_NGC)
        return select_blocks(scores_N, self.best, self.recent, self.group, shares_N, self.mass or 1.0, self.around)


@dataclass(frozen=True, eq=False)
class ByEmbedding:
    """External retrieval (ReKV, section 3.2): the same blocks in every layer, by the cosine of a frame's embedding and
    the question's, from any model that embeds both.

    `frames_ND[n]` belongs to block number n; `group` and `around` are those of `BestAndRecent`.
    """

    frames_ND: Tensor
    question_D: Tensor
    best: int
    recent: int = 0
    group: int = 1
    around: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        _check_choice(self.best, self.recent, self.group, self.around)
        if self.question_D.shape != self.frames_ND.shape[1:]:
            raise StreamError(
                f"a question's embedding of {tuple(self.question_D.shape)} cannot be compared with frames' of "
                f"{tuple(self.frames_ND.shape)}: embed both with one model."
            )

    def select(self, layer: int, queries_HTC: Tensor, index: BlockIndex) -> Selection:
        last = int(index.numbers_N[-1])
        if last >= len(self.frames_ND):
            raise StreamError(f"block {last} has no embedding among {len(self.frames_ND)}: embed every frame.")
        scores_N = self._scores_N[index.numbers_N]
        return select_blocks(scores_N, self.best, self.recent, self.group, around=self.around)

    @cached_property
    def _scores_N(self) -> Tensor:
        """Of every frame; all layers share them."""
        return functional.cosine_similarity(self.frames_ND.float(), self.question_D.float()[None], dim=1)


@dataclass(frozen=True)
class ByNumber:
    """Oracle retrieval: these blocks in every layer, in time order, as far as the index has them.

    All have the score 1; ranks follow the order in which the numbers are given.
    """

    numbers: tuple[int, ...]

    def select(self, layer: int, queries_HTC: Tensor, index: BlockIndex) -> Selection:
        place_of = {number: place for place, number in enumerate(dict.fromkeys(self.numbers))}
        places_N = [place_of.get(number, -1) for number in index.numbers_N.tolist()]
        rows_R = (torch.tensor(places_N) >= 0).nonzero().flatten()
        if len(rows_R) == 0:
            raise StreamError(f"none of the blocks {list(self.numbers)} can be seen: give numbers from the index.")
        order_R = torch.tensor(places_N)[rows_R].argsort()
        return Selection(rows_R, torch.ones(len(rows_R)), order_R.argsort())


def score_blocks(
    queries_HTC: Tensor, mean_keys_NGC: Tensor, similarity: Similarity = "cosine", norms_N: Tensor | None = None
) -> Tensor:
    """Score [N], in float32, of every block for the mean of T queries (ReKV, section 3.2).

    The score compares the heads' mean queries, laid end to end, with each block's mean keys, repeated for the queries
    of a group. Here the queries of a group are summed instead: the same dot product without the repetition.
    `cosine` is the paper's similarity; `dot`, its published code's, favours blocks with long keys. `norms_N` are the
    lengths of the mean keys; who has them spares half of what a cosine reads.
    """
    mean_HC = queries_HTC.float().mean(dim=1).to(mean_keys_NGC.device)
    G = mean_keys_NGC.shape[1]
    group = mean_HC.shape[0] // G
    query_GC = mean_HC.unflatten(0, (G, group)).sum(dim=1)
    if similarity == "dot":
        return mean_keys_NGC.flatten(1) @ query_GC.flatten()
    query_GC = query_GC / (mean_HC.norm() * group**0.5).clamp_min(_TINIEST)  # the norm of all heads, groups repeated
    norms_N = mean_keys_NGC.flatten(1).norm(dim=1) if norms_N is None else norms_N
    return mean_keys_NGC.flatten(1) @ query_GC.flatten() / norms_N.clamp_min(_TINIEST)


def attention_shares(queries_HTC: Tensor, mean_keys_NGC: Tensor) -> Tensor:
    """Share [N] of a layer's attention that each block gets, estimated before rotation from mean query and mean keys.

    A softmax over blocks in each head, averaged over the heads: blocks of one stream have equally many tokens.
    """
    H, _, C = queries_HTC.shape
    G = mean_keys_NGC.shape[1]
    queries_GQC = queries_HTC.float().mean(dim=1).to(mean_keys_NGC.device).view(G, H // G, C)
    logits_NGQ = torch.einsum("gqc,ngc->ngq", queries_GQC, mean_keys_NGC) * C**-0.5
    return logits_NGQ.softmax(dim=0).mean(dim=(1, 2))


def select_blocks(
    scores_N: Tensor,
    best: int,
    recent: int,
    group: int = 1,
    shares_N: Tensor | None = None,
    mass: float = 1.0,
    around: tuple[int, int] = (0, 0),
) -> Selection:
    """The last `recent` of N blocks, and the `best` best-scored of the others; of equal scores the earlier wins.

    Blocks are taken in the order of their group's mean score, and inside a group in that of their own: the last group
    may be smaller than `group`, and one that does not fit any more gives its best blocks. With `around`, each is
    followed by its neighbours, as far as they are not taken yet. With `shares_N`, no more are taken than it needs for
    their shares to reach `mass`.
    """
    N = scores_N.shape[0]
    means_N = scores_N if group == 1 else group_means(scores_N, group)
    oldest_recent = max(0, N - recent)
    if any(around):
        rows_R, ranks_R = _best_and_around(scores_N, means_N, group, best, oldest_recent, around)
    else:
        rows_R, ranks_R = _best(scores_N, means_N, group, best, recent)
    if shares_N is not None:
        before_R = shares_N[oldest_recent:].sum() + shares_N[rows_R].cumsum(0) - shares_N[rows_R]
        enough_R = before_R >= mass
        enough_R[: 1 if recent == 0 else 0] = False  # something must be attended to
        rows_R, ranks_R = rows_R[~enough_R], ranks_R[~enough_R]
    in_time_R = rows_R.argsort()
    rows_R = torch.cat((rows_R[in_time_R], torch.arange(oldest_recent, N, device=rows_R.device)))
    ranks_R = torch.cat((ranks_R[in_time_R], _ranks_from(oldest_recent, scores_N, means_N, group)))
    return Selection(rows_R, means_N[rows_R], ranks_R)


def _best(scores_N: Tensor, means_N: Tensor, group: int, best: int, recent: int) -> tuple[Tensor, Tensor]:
    """Rows and ranks of the `best`, as they are taken. Only rows that may be chosen are sorted; all others are compared
    with them."""
    N = scores_N.shape[0]
    lowest = means_N.topk(min(N, max(1, best + recent))).values[-1]
    first_K = _in_order((~(means_N < lowest)).nonzero().flatten(), scores_N, means_N, group)  # whole groups, NaN too
    ranks_R = (first_K < N - recent).nonzero().flatten()[:best]
    return first_K[ranks_R], ranks_R


def _best_and_around(
    scores_N: Tensor, means_N: Tensor, group: int, best: int, end: int, around: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The same of rows before `end`, each followed by its neighbours before, then after it, nearest first.

    A row that a better one has brought along brings its own, too.
    """
    before, after = around
    rows_N = _in_order(torch.arange(len(scores_N), device=scores_N.device), scores_N, means_N, group)
    steps_B = torch.tensor([0, *range(-1, -before - 1, -1), *range(1, after + 1)], device=rows_N.device)
    spread_K = (rows_N[rows_N < end][:best, None] + steps_B).flatten()
    spread_K = spread_K[(spread_K >= 0) & (spread_K < end)]
    kinds_U, kind_K = spread_K.unique(return_inverse=True)
    places_K = torch.arange(len(spread_K), device=rows_N.device)
    first_U = places_K.new_full(kinds_U.shape, len(spread_K)).scatter_reduce(0, kind_K, places_K, "amin")
    rows_R = kinds_U[first_U.argsort()][:best]
    return rows_R, rows_N.argsort()[rows_R]


def _ranks_from(first: int, scores_N: Tensor, means_N: Tensor, group: int) -> Tensor:
    """The ranks among all N rows of those from `first` on."""
    start = first // group * group  # rows before it are in earlier groups than all of these
    tail_K = torch.arange(start, len(scores_N), device=scores_N.device)
    places_K = _in_order(tail_K, scores_N, means_N, group).argsort()
    means = means_N.detach().cpu().float().numpy()
    earlier = [np.count_nonzero(means[:start] >= mean) for mean in means[start:]]  # faster than torch's sum
    return (torch.tensor(earlier, dtype=torch.long, device=places_K.device) + places_K)[first - start :]


def _in_order(rows_K: Tensor, scores_N: Tensor, means_N: Tensor, group: int) -> Tensor:
    """Rows of whole groups as they are taken: by their group's mean score, groups in time order, by their own score."""
    rows_K = rows_K[scores_N[rows_K].sort(descending=True, stable=True).indices]
    rows_K = rows_K[(rows_K // group).sort(stable=True).indices]
    return rows_K[means_N[rows_K].sort(descending=True, stable=True).indices]


def group_means(scores_N: Tensor, group: int) -> Tensor:
    """The mean score [N] of the group of neighbours that each block belongs to; the last group may be smaller."""
    groups_N = torch.arange(len(scores_N), device=scores_N.device) // group
    sums = scores_N.new_zeros(int(groups_N[-1]) + 1).index_add(0, groups_N, scores_N)
    return (sums / groups_N.bincount())[groups_N]


def _check_choice(best: int, recent: int, group: int, around: tuple[int, int]) -> None:
    if min(best, recent) < 0 or best + recent == 0 or group < 1:
        raise StreamError(
            f"retrieving {best} best and {recent} recent blocks in groups of {group} leaves none to attend to: "
            "ask for at least one."
        )
    if min(around) < 0:
        raise StreamError(
            f"{around[0]} neighbours before and {around[1]} after a block are impossible: ask for 0 or more."
        )
