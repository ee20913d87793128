"""The relation loss through Wᵀ W against one on whole logits that anyone can read, in float64."""

import pytest
import torch

from sparsight.distill.relation import centre, relation_loss
from sparsight.model.relation_matrix import BLOCK_WIDTH, BLOCKS, factors_of_gram, head_gram, relation_matrix

V, D = 31, 6
LENGTHS = [5, 0, 1, 9, 5]
N = sum(LENGTHS)


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A student's hidden states and head, and a teacher's logits; all logits have a mean that dominates."""
    hidden_ND = (rand(N, D, seed=1) + 2.0).requires_grad_()
    return hidden_ND, rand(V, D, seed=2).requires_grad_(), rand(N, V, seed=3) + 1.0


def relations(logits_NV: torch.Tensor, lengths: list[int] = LENGTHS) -> list[torch.Tensor]:
    return [logits_nV @ logits_nV.T for logits_nV in logits_NV.split(lengths)]


def slow_losses(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, centred: bool, lengths: list[int] = LENGTHS
) -> torch.Tensor:
    """1 - cos of the relations of whole logits, sample by sample."""
    losses: list[torch.Tensor] = []
    for student_nV, teacher_nV in zip(student_NV.split(lengths), teacher_NV.split(lengths), strict=True):
        if centred and len(student_nV):
            student_nV = student_nV - student_nV.mean(dim=0)
            teacher_nV = teacher_nV - teacher_nV.mean(dim=0)
        if bool((student_nV == 0).all()):  # no positions, or one that is its own mean
            losses.append(student_nV.sum())
            continue
        student, teacher = (student_nV @ student_nV.T).flatten(), (teacher_nV @ teacher_nV.T).flatten()
        losses.append(1.0 - student @ teacher / (student.norm() * teacher.norm()))
    return torch.stack(losses)


@pytest.mark.parametrize("centred", [False, True])
def test_losses_and_gradients_are_those_of_whole_logits(centred: bool) -> None:
    hidden_ND, head_VD, teacher_NV = problem()
    weights_B = torch.tensor([0.5, 3.0, 2.0, 1.0, 0.7], dtype=torch.float64)
    ours_B = relation_loss(hidden_ND, head_gram(head_VD), LENGTHS, relations(teacher_NV), centred)
    slow_B = slow_losses(hidden_ND @ head_VD.T, teacher_NV, centred)
    torch.testing.assert_close(ours_B, slow_B)
    assert float(ours_B[0].detach()) > 0.01
    assert float(ours_B[1].detach()) == 0.0
    ours = torch.autograd.grad(weights_B @ ours_B, [hidden_ND, head_VD])
    slow = torch.autograd.grad(weights_B @ slow_B, [hidden_ND, head_VD])
    torch.testing.assert_close(ours, slow)


@pytest.mark.parametrize("centred", [False, True])
def test_a_frozen_head_leaves_the_gradient_of_the_hidden_states(centred: bool) -> None:
    hidden_ND, head_VD, teacher_NV = problem()
    gram_DD = head_gram(head_VD.detach())
    assert not gram_DD.requires_grad
    ours = relation_loss(hidden_ND, gram_DD, LENGTHS, relations(teacher_NV), centred).sum()
    slow = slow_losses(hidden_ND @ head_VD.T, teacher_NV, centred).sum()
    torch.testing.assert_close(torch.autograd.grad(ours, hidden_ND), torch.autograd.grad(slow, hidden_ND))


def test_a_head_tied_to_the_embeddings_is_taught_by_both_ways() -> None:
    _, head_VD, teacher_NV = problem()
    hidden_ND = (head_VD[torch.arange(N) % V] @ rand(D, D, seed=5)).tanh()
    ours = relation_loss(hidden_ND, head_gram(head_VD), LENGTHS, relations(teacher_NV), True).sum()
    slow = slow_losses(hidden_ND @ head_VD.T, teacher_NV, True).sum()
    torch.testing.assert_close(
        torch.autograd.grad(ours, head_VD, retain_graph=True), torch.autograd.grad(slow, head_VD)
    )


@pytest.mark.parametrize("width", [D, BLOCK_WIDTH + 1, BLOCKS * BLOCK_WIDTH + 1])
def test_gram_and_its_gradient_are_those_of_the_full_product(width: int) -> None:
    head_VD = rand(V, width, seed=1).requires_grad_()
    grad_DD = rand(width, width, seed=2)  # of no symmetry
    gram_DD = head_gram(head_VD)
    assert torch.equal(gram_DD, gram_DD.T)
    torch.testing.assert_close(gram_DD, head_VD.T @ head_VD)
    torch.testing.assert_close(
        torch.autograd.grad(gram_DD, head_VD, grad_DD), torch.autograd.grad(head_VD.T @ head_VD, head_VD, grad_DD)
    )


@pytest.mark.parametrize("chunk_rows", [1, 7, V, 1000])
def test_chunk_size_does_not_matter(chunk_rows: int) -> None:
    head_VD, grad_DD = rand(V, D, seed=1).requires_grad_(), rand(D, D, seed=2)
    ours_DD, whole_DD = head_gram(head_VD, chunk_rows), head_gram(head_VD)
    torch.testing.assert_close(ours_DD, whole_DD)
    torch.testing.assert_close(
        torch.autograd.grad(ours_DD, head_VD, grad_DD), torch.autograd.grad(whole_DD, head_VD, grad_DD)
    )


def test_centring_the_matrix_is_centring_the_logits() -> None:
    _, _, logits_NV = problem()
    averaging_NN = torch.eye(N, dtype=torch.float64) - 1.0 / N
    centred_NN = centre(logits_NV @ logits_NV.T)
    torch.testing.assert_close(centred_NN, averaging_NN @ (logits_NV @ logits_NV.T) @ averaging_NN)
    centred_NV = logits_NV - logits_NV.mean(dim=0)
    torch.testing.assert_close(centred_NN, centred_NV @ centred_NV.T)


@pytest.mark.parametrize("centred", [False, True])
def test_identical_models_have_no_loss_and_no_gradient(centred: bool) -> None:
    hidden_ND, head_VD, _ = problem()
    gram_DD = head_gram(head_VD)
    teacher = [relation_matrix(hidden_nD, gram_DD).detach() for hidden_nD in hidden_ND.split(LENGTHS)]
    losses_B = relation_loss(hidden_ND, gram_DD, LENGTHS, teacher, centred)
    assert float(losses_B.detach().max()) < 1e-26
    for grad in torch.autograd.grad(losses_B.sum(), [hidden_ND, head_VD]):
        assert float(grad.abs().max()) < 1e-12


@pytest.mark.parametrize("centred", [False, True])
def test_the_scale_of_the_logits_does_not_matter(centred: bool) -> None:
    hidden_ND, head_VD, teacher_NV = problem()
    losses_B = relation_loss(hidden_ND, head_gram(head_VD), LENGTHS, relations(teacher_NV), centred)
    for scale in (1e-3, 1e3):
        scaled = (
            relation_loss(scale * hidden_ND, head_gram(head_VD), LENGTHS, relations(teacher_NV), centred),
            relation_loss(hidden_ND, head_gram(scale * head_VD), LENGTHS, relations(teacher_NV), centred),
            relation_loss(hidden_ND, head_gram(head_VD), LENGTHS, relations(scale * teacher_NV), centred),
        )
        for other_B in scaled:
            torch.testing.assert_close(other_B, losses_B)


@pytest.mark.parametrize("centred", [False, True])
def test_the_order_of_positions_does_not_matter_where_both_share_it(centred: bool) -> None:
    hidden_ND, head_VD, teacher_NV = problem()
    order_N = torch.randperm(N, generator=torch.Generator().manual_seed(6))
    gram_DD = head_gram(head_VD)
    (loss,) = relation_loss(hidden_ND, gram_DD, [N], relations(teacher_NV, [N]), centred)
    (same,) = relation_loss(hidden_ND[order_N], gram_DD, [N], relations(teacher_NV[order_N], [N]), centred)
    (other,) = relation_loss(hidden_ND[order_N], gram_DD, [N], relations(teacher_NV, [N]), centred)
    torch.testing.assert_close(same, loss)
    assert abs(float((other - loss).detach())) > 0.01


def test_a_loss_does_not_depend_on_the_rest_of_the_batch() -> None:
    hidden_ND, head_VD, teacher_NV = problem()
    gram_DD, teacher = head_gram(head_VD), relations(teacher_NV * torch.linspace(1.0, 9.0, N)[:, None])
    together = relation_loss(hidden_ND, gram_DD, LENGTHS, teacher, False).mean()
    alone = [
        relation_loss(hidden_nD, gram_DD, [len(hidden_nD)], [teacher_nn], False)
        for hidden_nD, teacher_nn in zip(hidden_ND.split(LENGTHS), teacher, strict=True)
    ]
    mean = torch.cat(alone).mean()
    torch.testing.assert_close(together, mean)
    torch.testing.assert_close(
        torch.autograd.grad(together, [hidden_ND, head_VD], retain_graph=True),
        torch.autograd.grad(mean, [hidden_ND, head_VD]),
    )


def test_small_losses_keep_their_digits_in_float32() -> None:
    hidden_ND, head_VD, _ = problem()
    teacher_NV = (hidden_ND + 1e-4 * rand(N, D, seed=7)).detach() @ head_VD.detach().T
    gram_DD = head_gram(head_VD.detach().float())
    teacher = [relation_nn.float() for relation_nn in relations(teacher_NV, [N])]
    (loss,) = relation_loss(hidden_ND.detach().float(), gram_DD, [N], teacher, False)
    (slow,) = slow_losses((hidden_ND @ head_VD.T).detach(), teacher_NV, False, [N])
    assert loss.dtype == torch.float32
    assert float(slow) < torch.finfo(torch.float32).eps  # a float32 cosine would be 1
    assert float(loss) == pytest.approx(float(slow), rel=1e-2)


def test_a_half_precision_head_is_summed_in_float32() -> None:
    hidden_ND, head_VD, teacher_NV = problem()
    half_VD = head_VD.detach().bfloat16().requires_grad_()
    twin_VD = half_VD.detach().double().requires_grad_()
    hidden_ND = hidden_ND.detach().bfloat16().requires_grad_()
    gram_DD = head_gram(half_VD, chunk_rows=7)
    assert gram_DD.dtype == torch.float32
    torch.testing.assert_close(gram_DD.double(), twin_VD.T @ twin_VD, rtol=1e-5, atol=1e-5)
    losses_B = relation_loss(hidden_ND, gram_DD, LENGTHS, relations(teacher_NV), True)
    slow_B = slow_losses(hidden_ND.double() @ twin_VD.T, teacher_NV, True)
    torch.testing.assert_close(losses_B.double(), slow_B, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(losses_B.sum(), [hidden_ND, half_VD])
    slow = torch.autograd.grad(slow_B.sum(), [hidden_ND, twin_VD])
    for mine, exact in zip(ours, slow, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.double(), exact.double(), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("centred", [False, True])
def test_zero_matrices_have_a_loss_and_no_gradient(centred: bool) -> None:
    hidden_ND = torch.cat([rand(4, D, seed=1), torch.zeros(8, D, dtype=torch.float64)]).requires_grad_()
    head_VD = rand(V, D, seed=2).requires_grad_()
    some, nothing = relations(rand(4, V, seed=3), [4])[0], torch.zeros(4, 4, dtype=torch.float64)
    losses_B = relation_loss(hidden_ND, head_gram(head_VD), [4, 4, 4], [nothing, some, nothing], centred)
    torch.testing.assert_close(losses_B, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    for grad in torch.autograd.grad(losses_B.sum(), [hidden_ND, head_VD]):
        assert float(grad.abs().max()) < 1e-15
    silent_VD = torch.zeros(V, D, dtype=torch.float64, requires_grad=True)
    losses_B = relation_loss(hidden_ND, head_gram(silent_VD), [4, 4, 4], [nothing, some, nothing], centred)
    torch.testing.assert_close(losses_B, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    for grad in torch.autograd.grad(losses_B.sum(), [hidden_ND, silent_VD]):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_a_batch_without_pictures_has_no_loss_and_zero_gradient() -> None:
    hidden_ND = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    head_VD = rand(V, D, seed=2).requires_grad_()
    empty = [torch.zeros(0, 0)] * 2
    losses_B = relation_loss(hidden_ND, head_gram(head_VD), [0, 0], empty, True)
    grads = torch.autograd.grad(losses_B.sum(), [hidden_ND, head_VD])
    assert losses_B.tolist() == [0.0, 0.0]
    assert torch.equal(grads[1], torch.zeros_like(head_VD))


@pytest.mark.parametrize("vocabulary", [V, D - 2])
def test_factors_of_the_gram_have_the_products_of_logits(vocabulary: int) -> None:
    """Also where the head has fewer rows than the states are wide, so that its Gram matrix has no full rank."""
    hidden_ND, head_VD = rand(7, D, seed=1), rand(vocabulary, D, seed=2)
    factors_ND = hidden_ND @ factors_of_gram(head_gram(head_VD))
    logits_NV = hidden_ND @ head_VD.T
    torch.testing.assert_close(factors_ND @ factors_ND.T, logits_NV @ logits_NV.T, rtol=1e-9, atol=1e-9)
