"""Sparse targets against their slow twin: the full softmax, kept whole."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from sparsight.records import SparseTargets
from sparsight.teacher.targets import sparse_targets, tail_uniforms, targets_of_hidden

V, N = 97, 40


def densify(targets: SparseTargets, vocabulary: int) -> npt.NDArray[np.float64]:
    """The estimate of the full distributions, [n, V]: exact in the head, each draw worth tail mass / S.

    Its expectation over draws is the teacher's distribution. Without draws the tail mass is left out.
    """
    n = len(targets)
    probs_nV = np.zeros((n, vocabulary))
    rows_n1 = np.arange(n)[:, None]
    probs_nV[rows_n1, targets.head_ids_nK] = np.exp(targets.head_logprobs_nK.astype(np.float64))
    draws = targets.tail_ids_nS.shape[1]
    if draws:
        drawn_nS = targets.tail_ids_nS >= 0
        worth_nS = np.where(drawn_nS, targets.tail_mass_n[:, None] / draws, 0.0)
        np.add.at(probs_nV, (rows_n1, np.where(drawn_nS, targets.tail_ids_nS, 0)), worth_nS)
    return probs_nV


@pytest.fixture
def logits_nV() -> torch.Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(0)) * 2.0


def test_head_tail_mass_and_labels_are_those_of_the_full_softmax(logits_nV: torch.Tensor) -> None:
    labels_n = torch.arange(N) % V
    targets, label_logprobs_n = sparse_targets(logits_nV, labels_n, 12, torch.zeros(N, 0, dtype=torch.float64))
    full_nV = torch.log_softmax(logits_nV.double(), dim=-1).numpy()
    order_nV = np.argsort(-full_nV, axis=1)
    np.testing.assert_array_equal(targets.head_ids_nK, order_nV[:, :12])
    np.testing.assert_allclose(targets.head_logprobs_nK, np.take_along_axis(full_nV, order_nV[:, :12], 1), rtol=1e-5)
    outside_n = np.exp(np.take_along_axis(full_nV, order_nV[:, 12:], 1)).sum(axis=1)
    np.testing.assert_allclose(targets.tail_mass_n, outside_n, rtol=1e-5)
    np.testing.assert_allclose(label_logprobs_n, full_nV[np.arange(N), np.arange(N) % V], rtol=1e-5)
    assert targets.tail_ids_nS.shape == (N, 0)


def test_a_head_of_the_whole_vocabulary_is_the_distribution(logits_nV: torch.Tensor) -> None:
    targets, _ = sparse_targets(logits_nV, torch.zeros(N, dtype=torch.long), V, torch.full((N, 3), 0.5).double())
    np.testing.assert_allclose(densify(targets, V), logits_nV.softmax(dim=-1).numpy(), atol=1e-6)
    assert (targets.tail_ids_nS == -1).all()
    assert (targets.tail_mass_n == 0).all()


def test_draws_lie_outside_the_head_with_their_own_log_probabilities(logits_nV: torch.Tensor) -> None:
    uniforms = torch.from_numpy(tail_uniforms(0, "a", N, 64))
    targets, _ = sparse_targets(logits_nV, torch.zeros(N, dtype=torch.long), 12, uniforms)
    for head_K, tail_S in zip(targets.head_ids_nK, targets.tail_ids_nS, strict=True):
        assert not set(head_K) & set(tail_S)
    full_nV = torch.log_softmax(logits_nV, dim=-1).numpy()
    np.testing.assert_allclose(targets.tail_logprobs_nS, np.take_along_axis(full_nV, targets.tail_ids_nS, 1), rtol=1e-5)


def test_draws_are_the_slow_inversion_of_the_tails_distribution(logits_nV: torch.Tensor) -> None:
    uniforms_nS = tail_uniforms(3, "row", N, 16)
    targets, _ = sparse_targets(logits_nV, torch.zeros(N, dtype=torch.long), 5, torch.from_numpy(uniforms_nS))
    probs_nV = logits_nV.softmax(dim=-1).double().numpy()
    for row in range(N):
        tail = [(token, probs_nV[row, token]) for token in range(V) if token not in targets.head_ids_nK[row]]
        mass = sum(probability for _, probability in tail)
        for uniform, drawn in zip(uniforms_nS[row], targets.tail_ids_nS[row], strict=True):
            below, slow = 0.0, -1
            for token, probability in tail:
                if below <= uniform * mass:
                    slow = token
                below += probability
            assert slow == drawn


def test_the_estimate_is_unbiased(logits_nV: torch.Tensor) -> None:
    """The mean of independent estimates lies within five standard errors of the full distribution everywhere."""
    one_nV, draws, repeats = logits_nV[:1], 8, 20_000
    many_nV = one_nV.expand(repeats, V)
    uniforms = torch.from_numpy(tail_uniforms(1, "b", repeats, draws))
    targets, _ = sparse_targets(many_nV, torch.zeros(repeats, dtype=torch.long), 12, uniforms)
    estimate_V = densify(targets, V).mean(axis=0)
    exact_V = one_nV.softmax(dim=-1).double().numpy()[0]
    mass = float(targets.tail_mass_n[0])
    error_V = np.sqrt(np.maximum(exact_V * mass, 1e-12) / (repeats * draws))
    assert (np.abs(estimate_V - exact_V) < 5 * error_V + 1e-6).all()


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_unit_interval_draw_tokens_that_have_mass(uniform: float) -> None:
    logits_nV = torch.tensor([[5.0, 1.0, -200.0, 0.0, -200.0]])
    targets, _ = sparse_targets(logits_nV, torch.zeros(1, dtype=torch.long), 1, torch.full((1, 1), uniform).double())
    assert targets.tail_ids_nS.item() == (1 if uniform == 0.0 else 3)


def test_a_sure_teacher_has_no_tail() -> None:
    logits_nV = torch.tensor([[0.0, 500.0, 0.0]])
    targets, label_logprobs_n = sparse_targets(logits_nV, torch.tensor([1]), 1, torch.full((1, 4), 0.3).double())
    assert targets.tail_mass_n.item() == 0.0
    assert (targets.tail_ids_nS == -1).all()
    assert label_logprobs_n.item() == 0.0


def test_chunks_change_nothing() -> None:
    head_VD = torch.randn(V, 8, generator=torch.Generator().manual_seed(1))
    hidden_nD = torch.randn(N, 8, generator=torch.Generator().manual_seed(2))
    labels_n, uniforms_nS = np.arange(N, dtype=np.int32), tail_uniforms(0, "c", N, 4)

    def run(chunk_elements: int) -> tuple[SparseTargets, np.ndarray]:
        return targets_of_hidden(
            hidden_nD, lambda hidden: hidden @ head_VD.T, V, labels_n, 6, uniforms_nS, chunk_elements
        )

    whole, whole_labels_n = run(N * V)
    parts, part_labels_n = run(7 * V)
    np.testing.assert_array_equal(whole.head_ids_nK, parts.head_ids_nK)
    np.testing.assert_array_equal(whole.tail_ids_nS, parts.tail_ids_nS)
    np.testing.assert_allclose(whole.head_logprobs_nK, parts.head_logprobs_nK, atol=1e-6)
    np.testing.assert_allclose(whole_labels_n, part_labels_n, atol=1e-6)


def test_a_samples_stream_is_its_own() -> None:
    np.testing.assert_array_equal(tail_uniforms(0, "a", 5, 3), tail_uniforms(0, "a", 5, 3))
    assert not np.array_equal(tail_uniforms(0, "a", 5, 3), tail_uniforms(0, "b", 5, 3))
    assert not np.array_equal(tail_uniforms(0, "a", 5, 3), tail_uniforms(1, "a", 5, 3))
