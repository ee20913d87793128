"""Choosing blocks: groups of neighbours, a share of the attention, embeddings from outside, given numbers."""

import pytest
import torch
from torch import Tensor

from sparsight.errors import StreamError
from sparsight.kv.answerer import StreamAnswerer
from sparsight.kv.bank import BlockIndex
from sparsight.kv.retrieve import (
    BestAndRecent,
    ByEmbedding,
    ByNumber,
    Similarity,
    attention_shares,
    group_means,
    score_blocks,
    select_blocks,
)
from tests.unit.kv.tiny_stream import PROMPT_IDS, bank_of, encode, frames_of, tiny_stream

QUERIES_HTC = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(7))


def index_of(blocks: int, first: int = 0, seed: int = 3) -> BlockIndex:
    generator = torch.Generator().manual_seed(seed)
    numbers_N = torch.arange(first, first + blocks)
    spans_s_N2 = torch.stack((2.0 * numbers_N, 2.0 * numbers_N + 2), dim=1).double()
    mean_keys_LNGC = torch.randn(2, blocks, 2, 8, generator=generator)
    return BlockIndex(numbers_N, spans_s_N2, mean_keys_LNGC, mean_keys_LNGC.flatten(2).norm(dim=2))


def ordered(scores: list[float], group: int) -> list[int]:
    """All rows, best first."""
    rows = range(len(scores))
    members = {row: [other for other in rows if other // group == row // group] for row in rows}
    mean = {row: sum(scores[other] for other in members[row]) / len(members[row]) for row in rows}
    return sorted(rows, key=lambda row: (-mean[row], row // group, -scores[row], row))


def slowly(scores: list[float], best: int, recent: int, group: int) -> list[int]:
    """The rows that `select_blocks` should choose, one after the other."""
    chosen = set(range(len(scores))[max(0, len(scores) - recent) :])
    return sorted(chosen | set([row for row in ordered(scores, group) if row not in chosen][:best]))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 20])
@pytest.mark.parametrize(("best", "recent"), [(1, 0), (4, 0), (5, 2), (0, 3), (30, 1)])
@pytest.mark.parametrize("blocks", [1, 7, 12, 13])
def test_groups_are_chosen_as_one_would_by_hand(blocks: int, best: int, recent: int, group: int) -> None:
    generator = torch.Generator().manual_seed(blocks)
    scores_N = torch.randint(0, 6, (blocks,), generator=generator) / 4  # exact in binary, and often equal
    found = select_blocks(scores_N, best, recent, group)
    assert found.rows_R.tolist() == slowly(scores_N.tolist(), best, recent, group)
    assert len(found.rows_R) == min(blocks, best + recent), "as many in every layer, whatever the scores"
    if best >= blocks:
        assert sorted(found.ranks_R.tolist()) == list(range(blocks))
        assert found.ranks_R.dtype == torch.long


def slowly_around(scores: list[float], best: int, recent: int, group: int, around: tuple[int, int]) -> list[int]:
    """Down the order of scores, each row and its neighbours, nearest first, until there are enough."""
    old = range(max(0, len(scores) - recent))
    order = [row for row in ordered(scores, group) if row in old]
    chosen: list[int] = []
    for row in order:
        steps = [0, *(-step for step in range(1, around[0] + 1)), *range(1, around[1] + 1)]
        chosen += [row + step for step in steps if row + step in old and row + step not in chosen]
    return sorted({*chosen[:best], *range(len(old), len(scores))})


@pytest.mark.parametrize("around", [(1, 0), (0, 1), (2, 1), (0, 3), (30, 30)])
@pytest.mark.parametrize(
    ("best", "recent", "group"), [(1, 0, 1), (4, 0, 1), (5, 2, 1), (5, 2, 3), (0, 3, 1), (30, 1, 1)]
)
@pytest.mark.parametrize("blocks", [1, 7, 13, 40])
def test_neighbours_come_along_as_one_would_take_them_by_hand(
    blocks: int, best: int, recent: int, group: int, around: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(blocks)
    for _ in range(20):
        scores_N = torch.randint(0, 6, (blocks,), generator=generator) / 4
        found = select_blocks(scores_N, best, recent, group, around=around)
        assert found.rows_R.tolist() == slowly_around(scores_N.tolist(), best, recent, group, around)
        assert len(found.rows_R) == min(blocks, best + recent), "as many in every layer, whatever the scores"
        order = ordered(scores_N.tolist(), group)
        assert found.ranks_R.tolist() == [order.index(row) for row in found.rows_R.tolist()]


def test_neighbours_are_taken_only_while_attention_is_missing() -> None:
    scores_N = torch.tensor([0.0, 1.0, 9.0, 2.0, 3.0, 0.0])
    shares_N = torch.tensor([0.1, 0.1, 0.5, 0.1, 0.1, 0.1])
    for mass, rows in ((0.5, [2]), (0.55, [1, 2]), (0.65, [1, 2, 3]), (0.75, [1, 2, 3, 4])):
        assert select_blocks(scores_N, 6, 0, 1, shares_N, mass, around=(1, 1)).rows_R.tolist() == rows


def test_both_kinds_of_retrieval_bring_neighbours_along() -> None:
    index = index_of(12)
    frames_ND = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    retrievers = BestAndRecent(3, around=(2, 0)), ByEmbedding(frames_ND, frames_ND[6], 3, around=(2, 0))
    for retriever in retrievers:
        best = int(retriever.select(1, QUERIES_HTC, index).ranks_R.argmin())
        rows = retriever.select(1, QUERIES_HTC, index).rows_R.tolist()
        assert best == 2, "the block found is the last of the three, both before it come along"
        assert rows == [rows[2] - 2, rows[2] - 1, rows[2]]


def test_the_last_group_is_averaged_over_what_it_has() -> None:
    assert group_means(torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]), 2).tolist() == [2.0, 2.0, 6.0, 6.0, 9.0]
    found = select_blocks(torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]), best=2, recent=0, group=2)
    assert found.rows_R.tolist() == [3, 4]
    assert found.scores_R.tolist() == [6.0, 9.0]
    assert found.ranks_R.tolist() == [1, 0]


def test_shares_are_the_attention_to_blocks_of_one_token() -> None:
    """With one token a block and one question token, the estimate is the heads' mean attention itself."""
    keys_NGC = index_of(9).mean_keys_LNGC[0]
    query_H1C = QUERIES_HTC[:, :1]
    expanded_HNC = keys_NGC.repeat_interleave(2, dim=1).transpose(0, 1)
    attention_HN = (query_H1C @ expanded_HNC.mT * 8**-0.5).softmax(-1)[:, 0]
    torch.testing.assert_close(attention_shares(query_H1C, keys_NGC), attention_HN.mean(0))


@pytest.mark.parametrize("recent", [0, 2])
@pytest.mark.parametrize("mass", [0.05, 0.3, 0.7, 1.0])
def test_no_more_is_taken_than_the_share_needs(mass: float, recent: int) -> None:
    index = index_of(20)
    shares_N = attention_shares(QUERIES_HTC, index.mean_keys_LNGC[0])
    fixed = BestAndRecent(12, recent, "dot").select(0, QUERIES_HTC, index)
    found = BestAndRecent(12, recent, "dot", mass=mass).select(0, QUERIES_HTC, index)
    assert set(found.rows_R.tolist()) <= set(fixed.rows_R.tolist())
    newest = found.rows_R >= 20 - recent
    reached = float(shares_N[found.rows_R].sum())
    assert reached >= mass or len(found.rows_R) == len(fixed.rows_R)
    others = sorted(zip(found.ranks_R[~newest].tolist(), found.rows_R[~newest].tolist(), strict=True))
    if others and len(found.rows_R) > 1:
        assert reached - float(shares_N[others[-1][1]]) < mass, "the last one taken was needed"


def test_layers_may_take_different_numbers_and_answer() -> None:
    stream = tiny_stream()
    bank = bank_of(*encode(stream, frames_of(stream, 10)))
    answerer = StreamAnswerer(stream.kv_model, stream.head)
    some = answerer.ask(bank, PROMPT_IDS, BestAndRecent(9, recent=1, mass=0.5), max_new_tokens=3)
    assert 1 < min(len(layer.numbers) for layer in some.evidence) < 10
    whole = answerer.ask(bank, PROMPT_IDS, BestAndRecent(9, recent=1, mass=1.0), max_new_tokens=3)
    assert whole.ids == answerer.ask(bank, PROMPT_IDS, BestAndRecent(10), max_new_tokens=3).ids


def embeddings_of(frames: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(frames, 6, generator=generator), torch.randn(6, generator=generator)


def test_embeddings_choose_the_same_blocks_in_every_layer() -> None:
    frames_ND, question_D = embeddings_of(12)
    retriever = ByEmbedding(frames_ND, question_D, best=3, recent=1)
    cosines_N = torch.stack([frame_D @ question_D / frame_D.norm() / question_D.norm() for frame_D in frames_ND])
    index = index_of(8, first=3)
    expected = slowly(cosines_N[3:11].tolist(), 3, 1, 1)
    for layer in (0, 1):
        found = retriever.select(layer, QUERIES_HTC * layer, index)
        assert found.rows_R.tolist() == expected
        torch.testing.assert_close(found.scores_R, cosines_N[3:11][expected])
    longer = ByEmbedding(frames_ND * 9, question_D / 7, best=3, recent=1).select(0, QUERIES_HTC, index)
    assert longer.rows_R.tolist() == expected


def test_given_blocks_are_sorted_by_time_and_seen_once() -> None:
    found = ByNumber((9, 4, 9, 6, 30)).select(0, QUERIES_HTC, index_of(8, first=3))
    assert found.rows_R.tolist() == [1, 3, 6]
    assert found.ranks_R.tolist() == [1, 2, 0]
    assert found.scores_R.tolist() == [1.0, 1.0, 1.0]


def test_the_right_blocks_given_answer_as_the_same_blocks_found() -> None:
    stream = tiny_stream()
    bank = bank_of(*encode(stream, frames_of(stream, 8)))
    answerer = StreamAnswerer(stream.kv_model, stream.head)
    every = answerer.ask(bank, PROMPT_IDS, BestAndRecent(8), max_new_tokens=4)
    given = answerer.ask(bank, PROMPT_IDS, ByNumber((7, 6, 5, 4, 3, 2, 1, 0)), max_new_tokens=4)
    assert given.ids == every.ids
    with pytest.raises(StreamError, match=r"none of the blocks \[7\] can be seen"):
        answerer.ask(bank, PROMPT_IDS, ByNumber((7,)), max_new_tokens=4, until_s=12.0)


def test_impossible_choices_are_refused() -> None:
    frames_ND, question_D = embeddings_of(4)
    with pytest.raises(StreamError, match="in groups of 0 leaves none"):
        BestAndRecent(3, group=0)
    with pytest.raises(StreamError, match=r"a share of 1\.5 of the attention is impossible"):
        BestAndRecent(3, mass=1.5)
    with pytest.raises(StreamError, match="-1 neighbours before and 2 after a block are impossible"):
        BestAndRecent(3, around=(-1, 2))
    with pytest.raises(StreamError, match="ask for at least one"):
        ByEmbedding(frames_ND, question_D, best=0)
    with pytest.raises(StreamError, match="embed both with one model"):
        ByEmbedding(frames_ND, question_D[:5], best=1)
    with pytest.raises(StreamError, match="block 7 has no embedding among 4"):
        ByEmbedding(frames_ND, question_D, best=1).select(0, QUERIES_HTC, index_of(8))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_permuting_heads_together_changes_no_score(similarity: Similarity) -> None:
    keys_NGC = index_of(9).mean_keys_LNGC[1]
    grouped = QUERIES_HTC.unflatten(0, (2, 2))
    swapped = score_blocks(grouped.flip(0).flatten(0, 1), keys_NGC.flip(1), similarity)
    torch.testing.assert_close(swapped, score_blocks(QUERIES_HTC, keys_NGC, similarity))
