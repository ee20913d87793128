"""Retrieval against its definition: heads expanded, blocks taken one by one, the question in a pass of its own."""

import pytest
import torch
from torch import Tensor

from sparsight.kv.answerer import StreamAnswerer
from sparsight.kv.bank import RamBank
from sparsight.kv.block import KvBlock
from sparsight.kv.reference import full_attention_answer
from sparsight.kv.retrieve import BestAndRecent, Similarity, score_blocks, select_blocks
from tests.unit.kv.tiny_stream import (
    ARCHITECTURES,
    PROMPT_IDS,
    SINK_IDS,
    TinyStream,
    bank_of,
    encode,
    frames_of,
    tiny_stream,
)


def expanded_scores(queries_HTC: Tensor, keys_NGSC: Tensor, similarity: Similarity) -> list[float]:
    """Mean query of all heads, end to end, against mean keys repeated for every head of their group."""
    group = queries_HTC.shape[0] // keys_NGSC.shape[1]
    query = torch.cat([head_TC.double().mean(0) for head_TC in queries_HTC])
    scores = []
    for keys_GSC in keys_NGSC:
        key = torch.cat([head_SC.double().mean(0) for head_SC in keys_GSC for _ in range(group)])
        score = query @ key
        scores.append(float(score / (query.norm() * key.norm()) if similarity == "cosine" else score))
    return scores


def picked(scores: list[float], best: int, recent: int) -> list[int]:
    """One by one: the newest, then the best of those that are left, the earlier of equals."""
    left = list(range(len(scores)))
    taken = left[max(0, len(left) - recent) :]
    left = left[: max(0, len(left) - recent)]
    for _ in range(min(best, len(left))):
        taken.append(max(left, key=lambda block: (scores[block], -block)))
        left.remove(taken[-1])
    return sorted(taken)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_grouped_scores_equal_expanded_ones(similarity: Similarity, heads: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(heads)
    queries_HTC = torch.randn(heads, 5, 8, generator=generator)
    keys_NGSC = torch.randn(11, groups, 7, 8, generator=generator) + 0.3
    scores_N = score_blocks(queries_HTC, keys_NGSC.mean(2), similarity)
    expected_N = torch.tensor(expanded_scores(queries_HTC, keys_NGSC, similarity))
    torch.testing.assert_close(scores_N, expected_N, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("best", [0, 1, 4, 20])
@pytest.mark.parametrize("recent", [0, 1, 3, 20])
@pytest.mark.parametrize("blocks", [1, 4, 12])
def test_the_choice_equals_picking_one_by_one(best: int, recent: int, blocks: int) -> None:
    generator = torch.Generator().manual_seed(7)
    for _ in range(20):
        scores_N = torch.randint(0, 5, (blocks,), generator=generator).float()  # many ties
        rows_R, scores_R, ranks_R = select_blocks(scores_N, best, recent)
        assert rows_R.tolist() == picked(scores_N.tolist(), best, recent)
        assert torch.equal(scores_R, scores_N[rows_R])
        order = sorted(range(blocks), key=lambda block: (-scores_N[block].item(), block))
        assert ranks_R.tolist() == [order.index(row) for row in rows_R.tolist()]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_choice_does_not_depend_on_the_order_of_blocks(similarity: Similarity) -> None:
    generator = torch.Generator().manual_seed(11)
    queries_HTC, mean_keys_NGC = torch.randn(6, 5, 8, generator=generator), torch.randn(30, 2, 8, generator=generator)
    order_N = torch.randperm(30, generator=generator)
    rows_R, _, _ = select_blocks(score_blocks(queries_HTC, mean_keys_NGC, similarity), 7, 0)
    shuffled_R, _, _ = select_blocks(score_blocks(queries_HTC, mean_keys_NGC[order_N], similarity), 7, 0)
    assert sorted(order_N[shuffled_R].tolist()) == rows_R.tolist()


@pytest.mark.parametrize("levels", [2, 40, 1_000_000])
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize(("best", "recent"), [(64, 8), (5, 40), (0, 3), (3, 0)])
def test_the_choice_among_many_equals_sorting_them_all(best: int, recent: int, group: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    scores_N = torch.randint(0, levels, (1000,), generator=generator).float()
    scores: list[float] = scores_N.tolist()
    parts = [scores[start : start + group] for start in range(0, 1000, group)]
    means = [sum(parts[row // group]) / len(parts[row // group]) for row in range(1000)]
    order = sorted(range(1000), key=lambda row: (-means[row], row // group, -scores[row], row))
    newest = range(1000 - recent, 1000)
    expected = sorted([*newest, *[row for row in order if row not in newest][:best]])
    rows_R, scores_R, ranks_R = select_blocks(scores_N, best, recent, group)
    assert rows_R.tolist() == expected
    torch.testing.assert_close(scores_R, torch.tensor([means[row] for row in expected]))
    assert ranks_R.tolist() == [order.index(row) for row in expected]


def test_scores_by_the_indexs_norms_are_those_by_its_keys() -> None:
    stream = tiny_stream()
    index = bank_of(*encode(stream, frames_of(stream, 12))).index()
    queries_HTC = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(5))
    for layer, mean_keys_NGC in enumerate(index.mean_keys_LNGC):
        scores_N = score_blocks(queries_HTC, mean_keys_NGC, "cosine", index.norms_LN[layer])
        torch.testing.assert_close(scores_N, score_blocks(queries_HTC, mean_keys_NGC, "cosine"))


class QuestionPass:
    """ReKV's first pass: the question alone, each layer attending to what it retrieves from every block's full keys."""

    def __init__(self, stream: TinyStream, sink: KvBlock, blocks: list[KvBlock], retriever: BestAndRecent) -> None:
        self.taken: list[list[int]] = []
        self._stream = stream
        self._sink = sink
        self._blocks = blocks
        self._retriever = retriever

    def attend(self, layer: int, queries_HTC: Tensor, keys_GTC: Tensor, values_GTC: Tensor, scale: float) -> Tensor:
        keys_NGSC = torch.stack([block.keys_LGSC[layer] for block in self._blocks])
        scores = expanded_scores(queries_HTC, keys_NGSC, self._retriever.similarity)
        self.taken.append(picked(scores, self._retriever.best, self._retriever.recent))
        memory = [self._sink, *(self._blocks[number] for number in self.taken[-1])]
        keys_GKC = torch.cat([*(block.keys_LGSC[layer] for block in memory), keys_GTC], dim=1)
        values_GKC = torch.cat([*(block.values_LGSC[layer] for block in memory), values_GTC], dim=1)
        K, T, group = keys_GKC.shape[1], keys_GTC.shape[1], len(queries_HTC) // len(keys_GTC)
        rotary = self._stream.kv_model.rotary
        rotated_HKC = rotary.rotate(keys_GKC, 0).repeat_interleave(group, 0)
        logits_HTK = rotary.rotate(queries_HTC, K - T) @ rotated_HKC.mT * scale
        future_TK = torch.ones(T, K, dtype=torch.bool).triu(K - T + 1)
        weights_HTK = logits_HTK.masked_fill(future_TK, -torch.inf).softmax(-1)
        return weights_HTK @ values_GKC.repeat_interleave(group, 0)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize(
    "retriever", [BestAndRecent(3), BestAndRecent(2, recent=1), BestAndRecent(3, similarity="dot")]
)
def test_one_pass_retrieves_what_a_pass_over_the_question_alone_does(
    architecture: str, retriever: BestAndRecent
) -> None:
    stream = tiny_stream(architecture)
    frames_FSD = frames_of(stream, 12)
    sink, blocks = encode(stream, frames_FSD, window_tokens=23)
    question = slice(0, 4)
    alone = QuestionPass(stream, sink, blocks, retriever)
    hidden_TD = stream.kv_model.run(stream.kv_model.embed(PROMPT_IDS[question]), alone)
    answerer = StreamAnswerer(stream.kv_model, stream.head)
    turn = answerer.begin(bank_of(sink, blocks), PROMPT_IDS, retriever, question=question, room_tokens=0)
    assert [list(layer.numbers) for layer in turn.evidence] == alone.taken
    assert len({tuple(taken) for taken in alone.taken}) > 1, "layers that all agree prove little"

    only = answerer.begin(bank_of(sink, blocks), PROMPT_IDS[question], retriever, room_tokens=0)
    torch.testing.assert_close(only.logits_V, stream.head(hidden_TD[-1]).detach(), atol=5e-5, rtol=5e-5)

    twice = answerer.begin(
        bank_of(sink, blocks), PROMPT_IDS, retriever, question=question, room_tokens=0, two_pass=True
    )
    assert [list(layer.numbers) for layer in twice.evidence] == alone.taken
    torch.testing.assert_close(twice.logits_V, turn.logits_V, atol=5e-5, rtol=5e-5)


def test_in_two_passes_the_bare_question_retrieves_and_the_whole_prompt_is_answered() -> None:
    """The question stands inside the prompt; what is before it and behind it has no part in retrieval."""
    stream = tiny_stream()
    frames_FSD = frames_of(stream, 12)
    sink, blocks = encode(stream, frames_FSD)
    question = slice(2, 5)
    alone = QuestionPass(stream, sink, blocks, BestAndRecent(3))
    stream.kv_model.run(stream.kv_model.embed(PROMPT_IDS[question]), alone)
    answerer = StreamAnswerer(stream.kv_model, stream.head, torch.randn(1, stream.kv_model.width))
    turn = answerer.begin(
        bank_of(sink, blocks), PROMPT_IDS, BestAndRecent(3), question=question, room_tokens=0, two_pass=True
    )
    assert [list(layer.numbers) for layer in turn.evidence] == alone.taken

    whole = StreamAnswerer(stream.kv_model, stream.head).ask(
        bank_of(sink, blocks), PROMPT_IDS, BestAndRecent(12), max_new_tokens=4, question=question, two_pass=True
    )
    expected = full_attention_answer(stream.text_model, stream.head, SINK_IDS, frames_FSD, PROMPT_IDS, 4)
    assert whole.ids == expected


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_planted_block_is_found(similarity: Similarity) -> None:
    """A block whose keys look like the question's queries is the best in its layer, wherever it stands."""
    generator = torch.Generator().manual_seed(3)
    queries_HTC = torch.randn(4, 6, 32, generator=generator)
    sink = KvBlock.from_page(-1, 0.0, 0.0, torch.randn(1, 2, 2, 3, 32, generator=generator))
    for planted in (0, 17, 99):
        bank = RamBank(sink, 2**24)
        for number in range(100):
            page_L2GSC = torch.randn(1, 2, 2, 5, 32, generator=generator)
            if number == planted:
                page_L2GSC[0, 0] += queries_HTC.mean(1).unflatten(0, (2, 2)).mean(1)[:, None]
            bank.put(KvBlock.from_page(number, float(number), float(number), page_L2GSC))
        rows_R, _, ranks_R = BestAndRecent(1, similarity=similarity).select(0, queries_HTC, bank.index())
        assert (rows_R.tolist(), ranks_R.tolist()) == ([planted], [0])


def test_long_keys_win_by_dot_only() -> None:
    query_H1C = torch.tensor([[[1.0, 0.0]]])
    mean_keys_NGC = torch.tensor([[[1.0, 0.0]], [[4.0, 4.0]]])
    assert select_blocks(score_blocks(query_H1C, mean_keys_NGC, "cosine"), 1, 0).rows_R.tolist() == [0]
    assert select_blocks(score_blocks(query_H1C, mean_keys_NGC, "dot"), 1, 0).rows_R.tolist() == [1]
