"""The balance loss: 1 at perfect balance, blind to padding, equal to a loop anyone can read."""

import pytest
import torch

from sparsight.distill.balance import balance_loss


def slow_balance(logits: dict[int, torch.Tensor], chosen: dict[int, torch.Tensor], mask_T: torch.Tensor) -> float:
    layers: list[float] = []
    for layer, logits_TE in logits.items():
        E = logits_TE.shape[1]
        tokens = [index for index in range(len(mask_T)) if mask_T[index]]
        share, mean = [0.0] * E, [0.0] * E
        for token in tokens:
            probs = logits_TE[token].softmax(dim=0).tolist()
            for expert in range(E):
                mean[expert] += probs[expert] / len(tokens)
            for expert in chosen[layer][token].tolist():
                share[expert] += 1 / (len(tokens) * chosen[layer].shape[1])
        layers.append(E * sum(f * p for f, p in zip(share, mean, strict=True)))
    return sum(layers) / len(layers)


def routed(T: int, E: int, A: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(seed))
    return logits_TE, logits_TE.topk(A).indices


def test_equals_the_loop() -> None:
    pairs = {0: routed(20, 4, 2, 1), 2: routed(20, 4, 2, 2)}
    logits, chosen = {k: v[0] for k, v in pairs.items()}, {k: v[1] for k, v in pairs.items()}
    mask_T = torch.tensor([1] * 13 + [0] * 7)
    balance = balance_loss(logits, chosen, mask_T)
    assert float(balance.loss) == pytest.approx(slow_balance(logits, chosen, mask_T), abs=1e-6)
    assert float(balance.value) == pytest.approx(float(balance.loss), abs=1e-6)
    assert balance.load_LE.sum(dim=1).tolist() == pytest.approx([1.0, 1.0])


def test_is_one_at_perfect_balance_and_the_number_of_experts_at_collapse() -> None:
    even_TE = torch.eye(4).repeat(3, 1) * 5
    neighbours_TA = torch.stack([torch.arange(12) % 4, (torch.arange(12) + 1) % 4], dim=1)
    mask_T = torch.ones(12)
    assert float(balance_loss({0: even_TE}, {0: neighbours_TA}, mask_T).value) == pytest.approx(1.0)
    collapsed_TE = torch.zeros(12, 4)
    collapsed_TE[:, 0] = 100.0
    first_TA = torch.zeros(12, 1, dtype=torch.long)
    assert float(balance_loss({0: collapsed_TE}, {0: first_TA}, mask_T).value) == pytest.approx(4.0)


def test_padding_never_matters() -> None:
    logits_TE, chosen_TA = routed(10, 4, 2, 3)
    logits_TE.requires_grad_()
    mask_T = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0, 0, 1])
    loss = balance_loss({0: logits_TE}, {0: chosen_TA}, mask_T).loss
    (grad_TE,) = torch.autograd.grad(loss, logits_TE)
    kept = mask_T.bool()
    alone = balance_loss({0: logits_TE[kept]}, {0: chosen_TA[kept]}, torch.ones(6)).loss
    torch.testing.assert_close(loss, alone)
    assert float(grad_TE[~kept].abs().max()) == 0.0
    assert float(grad_TE[kept].abs().min()) > 0.0
