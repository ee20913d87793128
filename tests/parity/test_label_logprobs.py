"""Label log-probs and their gradients in chunks against a log-softmax over whole logits, in float64."""

import pytest
import torch

from sparsight.model.label_logprobs import label_logprobs

V, D, N = 23, 6, 9


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels_N = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    return rand(N, D, seed=1).requires_grad_(), rand(V, D, seed=2).requires_grad_(), labels_N


def slow(hidden_ND: torch.Tensor, head_VD: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    return (hidden_ND @ head_VD.T).log_softmax(dim=-1).gather(1, labels_N[:, None])[:, 0]


@pytest.mark.parametrize("chunk", [1, 4, N, None])
def test_values_and_gradients_are_those_of_whole_logits(chunk: int | None) -> None:
    hidden_ND, head_VD, labels_N = problem()
    weights_N = rand(N, seed=5)
    ours_N, slow_N = label_logprobs(hidden_ND, head_VD, labels_N, chunk), slow(hidden_ND, head_VD, labels_N)
    torch.testing.assert_close(ours_N, slow_N)
    # weights that depend on the log-probs themselves, as those of a preference loss do
    ours = torch.autograd.grad((ours_N.sum().sigmoid() * (weights_N * ours_N).sum()), [hidden_ND, head_VD])
    theirs = torch.autograd.grad((slow_N.sum().sigmoid() * (weights_N * slow_N).sum()), [hidden_ND, head_VD])
    torch.testing.assert_close(ours, theirs)


def test_gradients_agree_with_finite_differences() -> None:
    hidden_ND, head_VD, labels_N = problem()
    assert torch.autograd.gradcheck(lambda h, w: label_logprobs(h, w, labels_N, 4), (hidden_ND, head_VD))


def test_only_what_trains_gets_a_gradient() -> None:
    hidden_ND, head_VD, labels_N = problem()
    (whole_ND,) = torch.autograd.grad(label_logprobs(hidden_ND, head_VD, labels_N).sum(), [hidden_ND])
    frozen_head = label_logprobs(hidden_ND, head_VD.detach(), labels_N, 4)
    torch.testing.assert_close(torch.autograd.grad(frozen_head.sum(), [hidden_ND])[0], whole_ND)
    frozen_hidden = label_logprobs(hidden_ND.detach(), head_VD, labels_N, 4)
    expected = torch.autograd.grad(slow(hidden_ND, head_VD, labels_N).sum(), [head_VD])
    torch.testing.assert_close(torch.autograd.grad(frozen_hidden.sum(), [head_VD]), expected)
    with torch.no_grad():
        assert not label_logprobs(hidden_ND, head_VD, labels_N).requires_grad


def test_sums_are_float32_whatever_the_model_is() -> None:
    hidden_ND, head_VD, labels_N = problem()
    half = label_logprobs(hidden_ND.detach().bfloat16(), head_VD.detach(), labels_N)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), slow(hidden_ND, head_VD, labels_N).detach(), atol=0.1, rtol=0.1)
