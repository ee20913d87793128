"""Expert telemetry against sums done by hand and a loop over tokens."""

import math

import pytest
import torch

from sparsight.distill.telemetry import LayerHistory, layer_routing, pair_counts, read_history, routing_metrics
from sparsight.model.routing import chosen_together, load_entropy

CHOSEN_TA = torch.tensor([[0, 1], [1, 0], [0, 2], [2, 3]])  # four tokens, two experts each; the last is padding
MASK_T = torch.tensor([1, 1, 1, 0])


def test_pairs_are_counted_by_hand() -> None:
    counts_EE = chosen_together(CHOSEN_TA, 4, MASK_T)
    assert counts_EE.tolist() == [[3, 2, 1, 0], [2, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


def test_pairs_equal_a_loop_over_tokens() -> None:
    E, A = 6, 3
    chosen_TA = torch.randn(50, E, generator=torch.Generator().manual_seed(0)).topk(A).indices
    slow_EE = [[0] * E for _ in range(E)]
    for experts in chosen_TA.tolist():
        for one in experts:
            for other in experts:
                slow_EE[one][other] += 1
    assert chosen_together(chosen_TA, E).tolist() == slow_EE


def test_a_layers_figures_by_hand() -> None:
    routing = layer_routing(chosen_together(CHOSEN_TA, 4, MASK_T).tolist())
    assert routing.load_E == pytest.approx([1 / 2, 1 / 3, 1 / 6, 0])
    assert routing.together_EE[0] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    nats = math.log(2) / 2 + math.log(3) / 3 + math.log(6) / 6
    assert routing.entropy == pytest.approx(nats / math.log(4))
    assert routing.dead == [3]


@pytest.mark.parametrize(
    ("load", "entropy"), [([0.25] * 4, 1.0), ([1.0, 0.0, 0.0, 0.0], 0.0), ([0.5, 0.5, 0.0, 0.0], 0.5), ([0.0] * 4, 0.0)]
)
def test_entropy_at_its_edges(load: list[float], entropy: float) -> None:
    assert load_entropy(load) == pytest.approx(entropy, abs=1e-12)


@pytest.mark.parametrize(("share", "dead"), [(0.0251, []), (0.0249, [3]), (0.0, [3])])
def test_an_expert_is_dead_below_a_tenth_of_an_even_share(share: float, dead: list[int]) -> None:
    counts_EE = torch.diag(torch.tensor([1.0 - share, 0.0, 0.0, share]) * 10_000)
    counts_EE[1, 1] = counts_EE[2, 2] = counts_EE[0, 0] / 3
    counts_EE[0, 0] /= 3
    assert layer_routing(counts_EE.tolist()).dead == dead


def test_no_token_no_share() -> None:
    routing = layer_routing(chosen_together(CHOSEN_TA, 4, torch.zeros(4)).tolist())
    assert (routing.load_E, routing.entropy) == ([0.0] * 4, 0.0)


def test_what_is_written_is_read_back() -> None:
    counts_LEE = pair_counts({3: CHOSEN_TA.flip(0), 1: CHOSEN_TA}, 4, torch.ones(4))
    rows = [
        {"step": 1, "loss": 1.0},
        {"step": 9, "loss": 1.0, **routing_metrics(counts_LEE, [1, 3], pairs=False)},
        {"step": 10, "loss": 1.0, **routing_metrics(counts_LEE, [1, 3], pairs=True)},
    ]
    history = read_history(rows)
    assert list(history) == [1, 3]
    assert history[1].steps == [9, 10]
    assert history[1].load_nE[0] == pytest.approx([3 / 8, 2 / 8, 2 / 8, 1 / 8])
    assert history[1].entropy_n[0] == rows[1]["entropy/layer_1"]
    table = [[0, 2 / 4, 1 / 4, 0], [2 / 4, 0, 0, 0], [1 / 4, 0, 0, 1 / 4], [0, 0, 1 / 4, 0]]
    assert history[1].together_mEE == [[pytest.approx(row) for row in table]]
    assert rows[1]["dead_experts/layer_1"] == 0
    assert read_history([{"step": 1, "loss": 1.0}]) == {}


def test_one_active_expert_has_no_pairs() -> None:
    counts_LEE = pair_counts({0: CHOSEN_TA[:, :1]}, 4, torch.ones(4))
    metrics = routing_metrics(counts_LEE, [0], pairs=True)
    assert metrics["load/layer_0/expert_0"] == pytest.approx(0.5)
    assert not [name for name in metrics if name.startswith("together")]


def test_stages_join_and_the_end_is_averaged() -> None:
    first = LayerHistory([1, 2], [[0.5, 0.5]] * 2, [1.0, 1.0], [[[0.0, 1.0], [1.0, 0.0]]] * 5)
    tables = [[[0.0, share], [share, 0.0]] for share in [0.0] * 13 + [0.2, 0.6]]
    first.extend(LayerHistory([1], [[1.0, 0.0]], [0.0], tables), offset=2)
    assert (first.steps, first.load_nE[-1], first.entropy_n) == ([1, 2, 3], [1.0, 0.0], [1.0, 1.0, 0.0])
    assert first.last_together()[0] == pytest.approx([0.0, 0.4])
