"""Rows of text alone: what they teach is the stock model's, whatever pictures they meet in a batch."""

import numpy as np
import pytest
import torch

from sparsight.config import TermsConfig
from sparsight.distill.loop import StageTrainer
from sparsight.distill.rows import TrainingRow
from sparsight.model.parameters import group_of
from tests.parity.text_only_case import MIXED, mixed_samples, mixed_trainer, text_alone
from tests.parity.training_case import weights

ANSWERS = TermsConfig(cross_entropy=0.5, forward_kl=1.0)
ALL = ANSWERS.model_copy(update={"visual_kl": 0.7, "relation": 0.5, "attention": 0.3})


def trained_on(terms: TermsConfig, batch_samples: int = 6) -> StageTrainer:
    return mixed_trainer(MIXED.model_copy(update={"terms": terms, "batch_samples": batch_samples}))


def slow_loss(case: StageTrainer, row: TrainingRow) -> torch.Tensor:
    """The sum over a row's answer tokens, through the stock forward of this row alone."""
    pixels = case.pictures.load([row.content_hash]).values
    shown = {"pixel_values_videos": pixels[None]} if len(pixels) else {}
    ids_BT = torch.from_numpy(row.input_ids.astype("int64"))[None]
    logprobs_TV = case.student.model(input_ids=ids_BT, **shown).logits[0].log_softmax(dim=-1)
    assert row.targets is not None
    targets, total = row.targets, torch.zeros(())
    for n, position in enumerate(row.positions_n.tolist()):
        logprobs_V = logprobs_TV[position - 1]
        total = total - case.stage.terms.cross_entropy * logprobs_V[int(row.input_ids[position])]
        share = float(targets.tail_mass_n[n]) / targets.tail_ids_nS.shape[1]
        head = zip(targets.head_ids_nK[n], targets.head_logprobs_nK[n], strict=True)
        tail = zip(targets.tail_ids_nS[n], targets.tail_logprobs_nS[n], strict=True)
        for p, (token, logprob) in [(np.exp(one[1]), one) for one in head] + [(share, one) for one in tail]:
            total = total + case.stage.terms.forward_kl * float(p) * (float(logprob) - logprobs_V[int(token)])
    return total


def test_a_mixed_batchs_loss_and_gradient_are_those_of_its_rows_alone() -> None:
    case = trained_on(ANSWERS)
    case.step = 2
    numbers = case.order.batch(case.step)
    assert set(text_alone(case, numbers)) == {True, False}
    rows = [case.rows[number] for number in numbers]
    ours = case.module(case.batch()).loss
    theirs = torch.stack([slow_loss(case, row) for row in rows]).sum() / sum(len(row.positions_n) for row in rows)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    our_grads = torch.autograd.grad(ours, case.parameters)
    for mine, slow in zip(our_grads, torch.autograd.grad(theirs, case.parameters), strict=True):
        torch.testing.assert_close(mine, slow, atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("terms", [ANSWERS, ALL])
def test_a_batch_is_the_sum_of_its_rows(terms: TermsConfig) -> None:
    """With terms at pictures, too: they give rows without one nothing but their place in the mean."""
    case = trained_on(terms)
    case.step = 2
    numbers = case.order.batch(case.step)
    whole = case.module(case.batch())
    alone = [case.module(case.objective.batch(numbers, np.array([number]))) for number in numbers]
    torch.testing.assert_close(whole.loss, torch.stack([part.loss for part in alone]).sum(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.sums, torch.stack([part.sums for part in alone]).sum(dim=0), atol=1e-4, rtol=1e-5)
    for part, is_text in zip(alone, text_alone(case, numbers), strict=True):
        assert bool((part.sums[2:5] == 0.0).all()) == (is_text or terms is ANSWERS)


@pytest.mark.parametrize("trainable", [["projector"], ["tower", "projector", "text"]])
def test_a_step_without_pictures_leaves_what_only_pictures_teach(trainable: list[str]) -> None:
    """Every gradient is there, and zero for tower and projector: workers wait for all of them."""
    texts = [sample for sample in mixed_samples() if not sample.frames]
    stage = MIXED.model_copy(update={"terms": ALL, "trainable": trainable, "weight_decay": 0.0})
    case = mixed_trainer(stage, texts)
    before = weights(case)
    case.train_step()
    for name, value in case.student.model.named_parameters():
        if value.requires_grad:
            assert value.grad is not None, name
            if group_of(name) in ("tower", "projector"):
                assert torch.equal(value, before[name]), name
    assert ("text" in trainable) == any(not torch.equal(value, before[name]) for name, value in weights(case).items())
