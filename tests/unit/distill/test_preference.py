"""Preference losses: their known values, and gradients against formulas written out in float64."""

import math

import pytest
import torch

from sparsight.distill.preference import Baselines, dpo, kto_baselines, kto_pair, preference
from sparsight.stages import PreferenceConfig

DPO = PreferenceConfig(loss="dpo", beta=0.3)
KTO = PreferenceConfig(loss="kto_pair", beta=0.3)


def ratios(seed: int = 0, pairs: int = 7, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, pairs, generator=generator, dtype=torch.float64) * 4 + shift
    return drawn[0].requires_grad_(), drawn[1].requires_grad_()


@pytest.mark.parametrize(("settings", "value"), [(DPO, math.log(2)), (KTO, 0.5)])
def test_equal_policies_have_the_known_loss(settings: PreferenceConfig, value: float) -> None:
    zeros_B = torch.zeros(5, dtype=torch.float64)
    found = preference(zeros_B, zeros_B, settings)
    assert found.losses_B.tolist() == pytest.approx([value] * 5, abs=1e-15)
    assert found.margins_B.tolist() == [0.0] * 5
    assert found.accurate_B.tolist() == [0.0] * 5


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_and_its_gradient_are_the_formula(smoothing: float) -> None:
    chosen_B, rejected_B = ratios()
    losses_B = dpo(chosen_B, rejected_B, 0.3, smoothing)
    grads = torch.autograd.grad(losses_B.sum(), [chosen_B, rejected_B])
    losses = losses_B.tolist()
    for index, (c, r) in enumerate(zip(chosen_B.tolist(), rejected_B.tolist(), strict=True)):
        up, down = 1 / (1 + math.exp(-0.3 * (c - r))), 1 / (1 + math.exp(0.3 * (c - r)))
        assert losses[index] == pytest.approx(-(1 - smoothing) * math.log(up) - smoothing * math.log(down))
        slope = 0.3 * (smoothing * up - (1 - smoothing) * down)
        assert float(grads[0][index]) == pytest.approx(slope)
        assert float(grads[1][index]) == pytest.approx(-slope)


@pytest.mark.parametrize("shift", [-20.0, 0.0, 5.0])
def test_kto_pair_and_its_gradient_are_the_formula_with_constant_baselines(shift: float) -> None:
    chosen_B, rejected_B = ratios(shift=shift)
    losses_B = preference(chosen_B, rejected_B, KTO).losses_B
    grads = torch.autograd.grad(losses_B.sum(), [chosen_B, rejected_B])
    losses = losses_B.tolist()
    z_c = max(0.0, sum(chosen_B.tolist()) / 7)
    z_r = max(0.0, sum(rejected_B.tolist()) / 7)
    for index, (c, r) in enumerate(zip(chosen_B.tolist(), rejected_B.tolist(), strict=True)):
        good, bad = 1 / (1 + math.exp(-0.3 * (c - z_r))), 1 / (1 + math.exp(-0.3 * (z_c - r)))
        assert losses[index] == pytest.approx(((1 - good) + (1 - bad)) / 2)
        assert float(grads[0][index]) == pytest.approx(-0.3 * good * (1 - good) / 2, rel=1e-6, abs=1e-12)
        assert float(grads[1][index]) == pytest.approx(0.3 * bad * (1 - bad) / 2, rel=1e-6, abs=1e-12)


def test_baselines_are_means_that_are_never_negative_and_never_differentiated() -> None:
    chosen_B, rejected_B = torch.tensor([1.0, 4.0]).requires_grad_(), torch.tensor([-3.0, 2.0]).requires_grad_()
    baselines = kto_baselines(chosen_B, rejected_B)
    assert [float(z) for z in baselines] == [2.5, 0.0]
    assert not any(z.requires_grad for z in baselines)


def test_a_better_chosen_answer_costs_less() -> None:
    zero_B = torch.zeros(1)
    none = Baselines(torch.zeros(()), torch.zeros(()))
    for loss in (lambda c, r: dpo(c, r, 0.1), lambda c, r: kto_pair(c, r, 0.1, none)):
        better, worse = loss(zero_B + 2, zero_B), loss(zero_B, zero_B + 2)
        assert float(better) < float(loss(zero_B, zero_B)) < float(worse)


def test_far_from_the_reference_everything_stays_finite() -> None:
    far_B = torch.tensor([-4000.0, 4000.0], requires_grad=True)
    for settings in (DPO, KTO):
        losses_B = preference(far_B, -far_B, settings).losses_B
        (grad_B,) = torch.autograd.grad(losses_B.sum(), [far_B])
        assert bool(losses_B.isfinite().all())
        assert bool(grad_B.isfinite().all())


def test_margin_and_accuracy_are_of_the_log_ratios() -> None:
    found = preference(torch.tensor([-5.0, 1.0, 2.0]), torch.tensor([-9.0, 3.0, 2.0]), DPO)
    assert found.margins_B.tolist() == pytest.approx([1.2, -0.6, 0.0])
    assert found.accurate_B.tolist() == [1.0, 0.0, 0.0]
