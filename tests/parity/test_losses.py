"""The chunked sparse losses against full-vocabulary ones that anyone can read."""

import itertools

import pytest
import torch

from sparsight.distill.losses import ResponseTargets, SparseTargetTensors, Tail, response_loss

V, D, N = 40, 6, 9


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full_losses(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, labels_N: torch.Tensor, teacher_NV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """CE and forward KL of every position, from whole logits."""
    student_NV = (hidden_ND @ head_VD.T).log_softmax(dim=-1)
    ce_N = torch.nn.functional.nll_loss(student_NV, labels_N, reduction="none")
    return ce_N, (teacher_NV.exp() * (teacher_NV - student_NV)).sum(dim=-1)


def head_of(teacher_NV: torch.Tensor, K: int, S: int = 0, seed: int = 0) -> SparseTargetTensors:
    """What a teacher stores: exact top K, the mass outside, and S draws from there."""
    logprobs_NK, ids_NK = teacher_NV.topk(K, dim=-1)
    rest_NV = teacher_NV.exp().scatter(1, ids_NK, 0.0)
    mass_N = rest_NV.sum(dim=-1)
    if S == 0 or teacher_NV.shape[1] == K:
        empty = torch.full((len(teacher_NV), S), -1)
        return SparseTargetTensors(ids_NK, logprobs_NK, mass_N, empty, empty.double())
    drawn_NS = torch.multinomial(rest_NV, S, replacement=True, generator=torch.Generator().manual_seed(seed))
    return SparseTargetTensors(ids_NK, logprobs_NK, mass_N, drawn_NS, teacher_NV.gather(1, drawn_NS))


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden_ND, head_VD = rand(N, D, seed=1).requires_grad_(), rand(V, D, seed=2).requires_grad_()
    labels_N = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    return hidden_ND, head_VD, labels_N, rand(N, V, seed=4).log_softmax(dim=-1)


def targets(labels_N: torch.Tensor, sparse: SparseTargetTensors | None, ce: float = 0.0, kl: float = 1.0):
    weights_N = torch.linspace(0.5, 1.5, len(labels_N), dtype=torch.float64)
    return ResponseTargets(labels_N, ce * weights_N, kl * weights_N.flip(0), sparse)


@pytest.mark.parametrize("tail", ["sampled", "bucket"])
def test_whole_vocabulary_kept_gives_the_full_losses_and_gradients(tail: Tail) -> None:
    hidden_ND, head_VD, labels_N, teacher_NV = problem()
    wanted = targets(labels_N, head_of(teacher_NV, V, S=3), ce=0.7, kl=1.3)
    ours = response_loss(hidden_ND, head_VD, wanted, tail, chunk_positions=4)
    ce_N, kl_N = full_losses(hidden_ND, head_VD, labels_N, teacher_NV)
    full = (wanted.ce_weights_N * ce_N + wanted.kl_weights_N * kl_N).sum()
    torch.testing.assert_close(ours.total, full)
    torch.testing.assert_close(ours.cross_entropy_N, ce_N.detach())
    torch.testing.assert_close(ours.kl_N, kl_N.detach())
    for mine, slow in zip(
        torch.autograd.grad(3.0 * ours.total, [hidden_ND, head_VD]),
        torch.autograd.grad(3.0 * full, [hidden_ND, head_VD]),
        strict=True,
    ):
        torch.testing.assert_close(mine, slow)


def test_cross_entropy_alone_needs_no_teacher() -> None:
    hidden_ND, head_VD, labels_N, teacher_NV = problem()
    wanted = targets(labels_N, None, ce=1.0, kl=0.0)
    ours = response_loss(hidden_ND, head_VD, wanted)
    slow = (wanted.ce_weights_N * full_losses(hidden_ND, head_VD, labels_N, teacher_NV)[0]).sum()
    torch.testing.assert_close(ours.total, slow)
    torch.testing.assert_close(
        torch.autograd.grad(ours.total, [hidden_ND, head_VD]), torch.autograd.grad(slow, [hidden_ND, head_VD])
    )


@pytest.mark.parametrize("tail", ["sampled", "bucket"])
def test_identical_teacher_and_student_have_zero_kl_and_zero_gradient(tail: Tail) -> None:
    hidden_ND, head_VD, labels_N, _ = problem()
    teacher_NV = (hidden_ND @ head_VD.T).detach().log_softmax(dim=-1)
    loss = response_loss(hidden_ND, head_VD, targets(labels_N, head_of(teacher_NV, V)), tail)
    grads = torch.autograd.grad(loss.total, [hidden_ND, head_VD])
    assert float(loss.kl_N.abs().max()) < 1e-13
    assert all(float(grad.abs().max()) < 1e-13 for grad in grads)


def test_a_bucket_of_an_identical_student_is_zero_too() -> None:
    hidden_ND, head_VD, labels_N, _ = problem()
    teacher_NV = (hidden_ND @ head_VD.T).detach().log_softmax(dim=-1)
    loss = response_loss(hidden_ND, head_VD, targets(labels_N, head_of(teacher_NV, 5)), "bucket")
    grads = torch.autograd.grad(loss.total, [hidden_ND, head_VD])
    assert float(loss.kl_N.abs().max()) < 1e-13
    assert all(float(grad.abs().max()) < 1e-13 for grad in grads)


def test_the_bucket_rises_to_the_full_kl_as_more_is_kept() -> None:
    hidden_ND, head_VD, labels_N, teacher_NV = problem()
    _, full_N = full_losses(hidden_ND, head_VD, labels_N, teacher_NV)
    values = [
        response_loss(hidden_ND, head_VD, targets(labels_N, head_of(teacher_NV, K)), "bucket").kl_N
        for K in (1, 2, 4, 8, 16, 32, 39, 40)
    ]
    for less_N, more_N in itertools.pairwise(values):
        assert bool((less_N <= more_N + 1e-12).all())
    torch.testing.assert_close(values[-1], full_N.detach())
    assert float((full_N.detach() - values[0]).mean()) > 0.1


def test_the_error_of_the_sampled_tail_falls_to_zero_as_more_is_kept() -> None:
    hidden_ND, head_VD, labels_N, teacher_NV = problem()
    _, full_N = full_losses(hidden_ND, head_VD, labels_N, teacher_NV)

    def spread(K: int) -> float:
        draws = [
            response_loss(hidden_ND, head_VD, targets(labels_N, head_of(teacher_NV, K, S=4, seed=seed))).kl_N
            for seed in range(200)
        ]
        return float((torch.stack(draws) - full_N.detach()).pow(2).mean().sqrt())

    errors = [spread(K) for K in (2, 8, 20, 34, 40)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12


def test_the_sampled_tail_is_unbiased_in_value_and_gradient() -> None:
    hidden_ND, head_VD, labels_N, teacher_NV = problem()
    wanted = targets(labels_N, None)
    _, kl_N = full_losses(hidden_ND, head_VD, labels_N, teacher_NV)
    full = (wanted.kl_weights_N * kl_N).sum()
    full_grad = torch.autograd.grad(full, [hidden_ND, head_VD])
    values: list[torch.Tensor] = []
    for seed in range(1500):
        ours = response_loss(hidden_ND, head_VD, targets(labels_N, head_of(teacher_NV, 4, S=3, seed=seed)))
        grads = torch.autograd.grad(ours.total, [hidden_ND, head_VD])
        values.append(torch.cat([ours.total.detach()[None], *(grad.flatten() for grad in grads)]))
    drawn = torch.stack(values)
    expected = torch.cat([full.detach()[None], *(grad.flatten() for grad in full_grad)])
    standard_error = drawn.std(dim=0) / len(drawn) ** 0.5
    scores = (drawn.mean(dim=0) - expected) / standard_error.clamp(min=1e-12)
    assert float(scores.abs().max()) < 4.5  # of some 300 numbers; the draws are seeded
    assert 0.8 < float(scores.std()) < 1.2


@pytest.mark.parametrize("tail", ["sampled", "bucket"])
def test_chunk_size_does_not_matter(tail: Tail) -> None:
    hidden_ND, head_VD, labels_N, teacher_NV = problem()
    wanted = targets(labels_N, head_of(teacher_NV, 5, S=4), ce=0.5)
    results: list[torch.Tensor] = []
    for chunk in (1, 4, N, 100):
        loss = response_loss(hidden_ND, head_VD, wanted, tail, chunk)
        grads = torch.autograd.grad(loss.total, [hidden_ND, head_VD])
        results.append(torch.cat([loss.total.detach()[None], *(grad.flatten() for grad in grads)]))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("tail", ["sampled", "bucket"])
def test_gradients_agree_with_finite_differences(tail: Tail) -> None:
    hidden_ND, head_VD, labels_N, teacher_NV = problem()
    wanted = targets(labels_N, head_of(teacher_NV, 6, S=3), ce=0.5)
    assert torch.autograd.gradcheck(
        lambda hidden, head: response_loss(hidden, head, wanted, tail, 4).total, (hidden_ND, head_VD)
    )


def test_only_what_is_trained_gets_a_gradient() -> None:
    hidden_ND, head_VD, labels_N, teacher_NV = problem()
    frozen_VD = head_VD.detach()
    wanted = targets(labels_N, head_of(teacher_NV, 6))
    loss = response_loss(hidden_ND, frozen_VD, wanted).total
    whole = response_loss(hidden_ND, head_VD, wanted).total
    torch.testing.assert_close(torch.autograd.grad(loss, hidden_ND), torch.autograd.grad(whole, hidden_ND))


def test_a_sure_student_keeps_the_bucket_finite() -> None:
    head_VD = torch.eye(8)
    hidden_ND = torch.zeros(1, 8)
    hidden_ND[0, 0] = 200.0  # everything else underflows in float32
    sparse = SparseTargetTensors(
        torch.tensor([[0]]), torch.tensor([[-0.1]]), torch.tensor([0.1]), torch.zeros(1, 0).long(), torch.zeros(1, 0)
    )
    wanted = ResponseTargets(torch.tensor([0]), torch.zeros(1), torch.ones(1), sparse)
    hidden_ND.requires_grad_()
    loss = response_loss(hidden_ND, head_VD, wanted, "bucket")
    (grad,) = torch.autograd.grad(loss.total, hidden_ND)
    assert abs(float(loss.kl_N[0]) - 0.1 * 200) < 1.5
    assert float(grad[0, 0]) == pytest.approx(0.1, abs=1e-4)
