"""What has no order of its own changes nothing: queries of a group, key/value heads with theirs, rows of an index."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsight.kv.answerer import Answer, StreamAnswerer
from sparsight.kv.attention import KvTextModel
from sparsight.kv.bank import BlockIndex
from sparsight.kv.retrieve import BestAndRecent, Selection, Similarity, score_blocks
from tests.unit.kv.tiny_stream import ARCHITECTURES, PROMPT_IDS, TinyStream, bank_of, encode, frames_of, tiny_stream

BLOCKS = 12
LAYERS, WIDTH = 2, 8
QUESTION = slice(0, 4)
RETRIEVERS = [
    BestAndRecent(4),
    BestAndRecent(3, recent=2),
    BestAndRecent(4, similarity="dot"),
    BestAndRecent(4, group=3),
    BestAndRecent(4, recent=1, around=(2, 1)),
    BestAndRecent(9, mass=0.6),
]


def random_index(groups: int, generator: torch.Generator) -> BlockIndex:
    numbers_N = torch.arange(BLOCKS)
    mean_keys_LNGC = torch.randn(LAYERS, BLOCKS, groups, WIDTH, generator=generator)
    return index_with(numbers_N, mean_keys_LNGC)


def index_with(numbers_N: Tensor, mean_keys_LNGC: Tensor) -> BlockIndex:
    spans_s_N2 = torch.stack((2.0 * numbers_N, 2.0 * numbers_N + 2), dim=1).double()
    return BlockIndex(numbers_N, spans_s_N2, mean_keys_LNGC, mean_keys_LNGC.flatten(2).norm(dim=2))


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(
    seed=st.integers(0, 2**31),
    group_order=st.sampled_from([1, 2, 3, 5]).flatmap(lambda groups: st.permutations(range(groups))),
    query_order=st.sampled_from([1, 2, 4, 7]).flatmap(lambda queries: st.permutations(range(queries))),
    retriever=st.sampled_from(RETRIEVERS),
)
def test_heads_in_another_order_choose_the_same_blocks(
    seed: int, group_order: list[int], query_order: list[int], retriever: BestAndRecent
) -> None:
    """Key/value heads change places together with their queries, and these among each other."""
    generator = torch.Generator().manual_seed(seed)
    groups, queries = len(group_order), len(query_order)
    queries_HTC = torch.randn(groups * queries, 5, WIDTH, generator=generator)
    index = random_index(groups, generator)
    other_HTC = queries_HTC.unflatten(0, (groups, queries))[group_order][:, query_order].flatten(0, 1)
    other = index_with(index.numbers_N, index.mean_keys_LNGC[:, :, group_order])
    for layer in range(LAYERS):
        found, again = retriever.select(layer, queries_HTC, index), retriever.select(layer, other_HTC, other)
        assert again.rows_R.tolist() == found.rows_R.tolist()
        assert again.ranks_R.tolist() == found.ranks_R.tolist()
        torch.testing.assert_close(again.scores_R, found.scores_R, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_heads_that_leave_their_queries_score_otherwise(similarity: Similarity) -> None:
    generator = torch.Generator().manual_seed(1)
    queries_HTC = torch.randn(6, 5, WIDTH, generator=generator)
    keys_NGC = random_index(2, generator).mean_keys_LNGC[0]
    scores_N = score_blocks(queries_HTC, keys_NGC, similarity)
    for one in (
        score_blocks(queries_HTC, keys_NGC.flip(1), similarity),
        score_blocks(queries_HTC[[0, 1, 3, 2, 4, 5]], keys_NGC, similarity),  # one query of either group
    ):
        assert not torch.allclose(one, scores_N, atol=1e-2)


def with_heads_in_another_order(stream: TinyStream, group_order: list[int], query_order: list[int]) -> TinyStream:
    """The same function of its input, from other heads of the same layers."""
    groups, queries, width = len(group_order), len(query_order), stream.kv_model.head_width
    heads = torch.arange(groups * queries).view(groups, queries)[group_order][:, query_order].flatten().tolist()
    with torch.no_grad():
        for layer in stream.text_model.get_submodule("layers").children():
            attention = layer.get_submodule("self_attn")
            for name, order in (("q_proj", heads), ("k_proj", group_order), ("v_proj", group_order)):
                for parameter in attention.get_submodule(name).parameters():
                    parameter.copy_(parameter.unflatten(0, (len(order), width))[order].flatten(0, 1))
            output = attention.get_submodule("o_proj").get_parameter("weight")
            output.copy_(output.unflatten(1, (len(heads), width))[:, heads].flatten(1, 2))
    return TinyStream(stream.text_model, stream.head, KvTextModel(stream.text_model))


def ask(stream: TinyStream, retriever: "BestAndRecent | InAnotherOrder") -> Answer:
    bank = bank_of(*encode(stream, frames_of(stream, BLOCKS), window_tokens=23))
    answerer = StreamAnswerer(stream.kv_model, stream.head)
    return answerer.ask(bank, PROMPT_IDS, retriever, max_new_tokens=5, question=QUESTION)


def assert_the_same(found: Answer, expected: Answer) -> None:
    assert (found.ids, found.finish) == (expected.ids, expected.finish)
    for layer, expected_layer in zip(found.evidence, expected.evidence, strict=True):
        assert layer.numbers == expected_layer.numbers
        assert layer.spans_s == expected_layer.spans_s
        assert layer.ranks == expected_layer.ranks
        assert layer.scores == pytest.approx(expected_layer.scores, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize(("group_order", "query_order"), [([1, 0], [0, 1]), ([0, 1], [1, 0]), ([1, 0], [1, 0])])
def test_a_host_with_heads_in_another_order_answers_the_same(
    architecture: str, group_order: list[int], query_order: list[int]
) -> None:
    host = tiny_stream(architecture)
    first_keys = host.text_model.get_parameter("layers.0.self_attn.q_proj.weight").detach().clone()
    expected = ask(host, BestAndRecent(3, recent=1))
    other = with_heads_in_another_order(host, group_order, query_order)
    assert not torch.equal(other.text_model.get_parameter("layers.0.self_attn.q_proj.weight"), first_keys)
    assert_the_same(ask(other, BestAndRecent(3, recent=1)), expected)


class InAnotherOrder:
    """A `Retriever` that sees the index's rows shuffled, and says which rows of the index itself it chose."""

    def __init__(self, retriever: BestAndRecent, seed: int) -> None:
        self._retriever = retriever
        self._order_N = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(seed))

    def select(self, layer: int, queries_HTC: Tensor, index: BlockIndex) -> Selection:
        shuffled = index.rows(self._order_N)
        assert shuffled.numbers_N.tolist() != index.numbers_N.tolist()
        found = self._retriever.select(layer, queries_HTC, shuffled)
        rows_R = self._order_N[found.rows_R]
        in_time_R = rows_R.argsort()
        return Selection(rows_R[in_time_R], found.scores_R[in_time_R], found.ranks_R[in_time_R])


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize(
    "retriever", [BestAndRecent(4), BestAndRecent(4, similarity="dot"), BestAndRecent(9, mass=0.6)]
)
def test_rows_of_the_index_in_another_order_give_the_same_blocks(architecture: str, retriever: BestAndRecent) -> None:
    """Of equal rows; the newest blocks and groups of neighbours are taken by their place, by definition."""
    host = tiny_stream(architecture)
    expected = ask(host, retriever)
    assert len({layer.numbers for layer in expected.evidence}) > 1, "layers that all agree prove little"
    for seed in range(3):
        assert_the_same(ask(host, InAnotherOrder(retriever, seed)), expected)
