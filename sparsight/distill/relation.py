"""A loss that asks a student for its teacher's relations between the positions of a picture.

LLaVA-KD's relation distillation (RDist, arXiv 2410.16236): 1 - cos(vec(R of the teacher), vec(R of the student)), with
R made by `model.relation_matrix`, without the vocabulary. The published code flattens a whole batch into one vector;
here every sample has its cosine, so a loss does not depend on which samples meet. Called by the training step.
"""

from collections.abc import Sequence

import torch

from sparsight.model.relation_matrix import relation_matrix


def centre(relation_NN: torch.Tensor) -> torch.Tensor:
    """C R C with C = I - 1 1ᵀ / N: what R would be if the mean over positions were taken from the logits first."""
    centred_NN = relation_NN - relation_NN.mean(dim=0)
    return centred_NN - centred_NN.mean(dim=1, keepdim=True)


def relation_loss(
    hidden_ND: torch.Tensor,
    gram_DD: torch.Tensor,
    lengths: Sequence[int],
    teacher: Sequence[torch.Tensor],
    centred: bool,
) -> torch.Tensor:
    """1 - cos of the teacher's and the student's relations, per sample [B], in the precision of `gram_DD`.

    `hidden_ND` holds the visual positions of B ≥ 1 samples one after another, `lengths` of each; `teacher` has a raw
    [n, n] matrix for each. With `centred`, logits are compared without their mean over the sample's positions, which
    otherwise dominates R and leaves the cosine near 1. A sample without positions has loss 0 and no gradient. Where
    one matrix is zero, the loss is 1; where both are, 0.
    """
    losses: list[torch.Tensor] = []
    for hidden_nD, teacher_nn in zip(hidden_ND.split(list(lengths)), teacher, strict=True):
        assert teacher_nn.shape == (len(hidden_nD), len(hidden_nD)), "a teacher's matrix is of the sample's positions"
        hidden_nD, teacher_nn = hidden_nD.to(gram_DD.dtype), teacher_nn.to(gram_DD.dtype)
        if centred:  # the student's states, not its matrix: the same, and no large numbers cancel
            hidden_nD, teacher_nn = hidden_nD - hidden_nD.mean(dim=0), centre(teacher_nn)
        losses.append(_one_minus_cosine(relation_matrix(hidden_nD, gram_DD), teacher_nn))
    return torch.stack(losses)


def _one_minus_cosine(left_nn: torch.Tensor, right_nn: torch.Tensor) -> torch.Tensor:
    """As ½ ‖u - v‖² of unit vectors, which keeps its digits where the cosine is close to 1."""
    (u_nn, left_exists), (v_nn, right_exists) = _unit(left_nn), _unit(right_nn)
    return 0.5 * (u_nn - v_nn).square().sum() + 0.5 * (left_exists != right_exists)


def _unit(matrix_nn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix at Frobenius norm 1, and whether it has one: a zero matrix stays what it is."""
    squares = matrix_nn.square().sum()  # in pairs; `vector_norm` sums in a row, and loses two digits of float32
    exists = squares > 0
    return matrix_nn * squares.where(exists, 1.0).rsqrt(), exists
