"""Chunked agreement against the textbook expression on whole tables."""

import pytest
import torch

from sparsight.evaluate.agreement import agreement

N, V = 50, 70


def states(seed: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, width, generator=generator), torch.randn(V, width, generator=generator) / width**0.5


def test_chunks_give_what_the_whole_table_gives() -> None:
    (teacher_nD, teacher_VD), (student_nD, student_VD) = states(0, 8), states(1, 12)
    teacher_nV = (teacher_nD @ teacher_VD.T).softmax(dim=-1)
    student_nV = (student_nD @ student_VD.T).softmax(dim=-1)
    kl = (teacher_nV * (teacher_nV / student_nV).log()).sum(dim=-1).mean()
    top1 = (teacher_nV.argmax(dim=-1) == student_nV.argmax(dim=-1)).float().mean()
    for chunk_bytes in (1, 16 * V * 7, 10**9):
        found = agreement(teacher_nD, teacher_VD, student_nD, student_VD, chunk_bytes)
        assert found is not None
        assert found.kl_nats == pytest.approx(float(kl), rel=1e-5)
        assert found.top1 == pytest.approx(float(top1))
        assert found.positions == N


def test_a_model_agrees_with_itself() -> None:
    states_nD, head_VD = states(0, 8)
    found = agreement(states_nD, head_VD, states_nD, head_VD)
    assert found is not None
    assert found.kl_nats == pytest.approx(0.0, abs=1e-6)
    assert found.top1 == 1.0


def test_padding_rows_of_a_longer_head_do_not_count() -> None:
    states_nD, head_VD = states(0, 8)
    padded_VD = torch.cat([head_VD, 100.0 * torch.ones(6, 8)])
    found = agreement(states_nD, head_VD, states_nD, padded_VD)
    assert found is not None
    assert found.kl_nats == pytest.approx(0.0, abs=1e-6)


def test_nothing_to_compare_is_no_agreement() -> None:
    _, head_VD = states(0, 8)
    assert agreement(torch.zeros(0, 8), head_VD, torch.zeros(0, 8), head_VD) is None


def test_unequal_positions_are_refused() -> None:
    states_nD, head_VD = states(0, 8)
    with pytest.raises(ValueError, match="positions"):
        agreement(states_nD, head_VD, states_nD[1:], head_VD)
