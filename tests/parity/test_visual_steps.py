"""A step with terms at pictures against the stock model's whole logits and attention, row by row and loop by loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsight.config import TermsConfig
from sparsight.distill.loop import StageTrainer
from sparsight.errors import AlignmentError
from sparsight.model.visual_attention import layer_groups
from sparsight.records import VisualSignal
from tests.parity.visual_case import TEACHER_LAYERS, Signals, case, stage

TERMS = TermsConfig(cross_entropy=0.5, forward_kl=1.0, visual_kl=0.7, relation=0.5, attention=0.3)


def slow_loss(trained: StageTrainer) -> torch.Tensor:
    """The loss of the current global batch: every row alone, through the stock forward."""
    rows = [trained.rows[index] for index in trained.order.batch(trained.step)]
    side, student, settings = trained.objective._side, trained.student, trained.stage  # type: ignore[attr-defined]
    tokens = sum(len(row.positions_n) for row in rows)
    total = torch.zeros(())
    for row in rows:
        ((_, visual),) = side.of([row])
        pixels = trained.pictures.load([row.content_hash]).values
        ids_BT = torch.from_numpy(row.input_ids.astype("int64"))[None]
        outputs = student.model(input_ids=ids_BT, pixel_values_videos=pixels[None], output_attentions=True)
        logprobs_TV = outputs.logits[0].log_softmax(dim=-1)
        terms = settings.terms
        for n, position in enumerate(row.positions_n.tolist()):
            logprobs_V = logprobs_TV[position - 1]
            if row.is_truth_n[n]:
                total = total - terms.cross_entropy / tokens * logprobs_V[int(row.input_ids[position])]
            total = total + terms.forward_kl / tokens * slow_kl(row.targets, n, logprobs_V)
        places = np.flatnonzero(row.input_ids == student.chat.visual_id).tolist()
        share = 1 / len(rows)
        for n, position in enumerate(places):
            kl = slow_kl(visual.targets, n, logprobs_TV[position])
            total = total + terms.visual_kl * share / len(places) * kl
        logits_NV = outputs.logits[0][places]
        total = total + terms.relation * share * slow_relation(logits_NV, visual, settings.relation_centred)
        if terms.attention:
            text = [place for place in range(len(row.input_ids)) if place > places[0] and place not in set(places)]
            attended = [layer[0][:, text][:, :, places].mean(dim=(0, 1)) for layer in outputs.attentions]
            losses = [
                1 - torch.cosine_similarity(attended[ours], torch.from_numpy(visual.attention_LN[theirs].mean(0)), 0)
                for ours, theirs in layer_groups(len(attended), TEACHER_LAYERS)
            ]
            total = total + terms.attention * share * torch.stack(losses).mean()
    return total


def slow_kl(targets: object, n: int, logprobs_V: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(())
    for token, logprob in zip(targets.head_ids_nK[n], targets.head_logprobs_nK[n], strict=True):  # type: ignore[attr-defined]
        total = total + float(np.exp(logprob)) * (float(logprob) - logprobs_V[int(token)])
    share = float(targets.tail_mass_n[n]) / targets.tail_ids_nS.shape[1]  # type: ignore[attr-defined]
    for token, logprob in zip(targets.tail_ids_nS[n], targets.tail_logprobs_nS[n], strict=True):  # type: ignore[attr-defined]
        total = total + share * (float(logprob) - logprobs_V[int(token)])
    return total


def slow_relation(logits_NV: torch.Tensor, visual: VisualSignal, centred: bool) -> torch.Tensor:
    assert visual.relation is not None
    teacher_NN = torch.from_numpy(visual.relation.to_matrix()).double()
    logits_NV = logits_NV.double()
    if centred:
        logits_NV = logits_NV - logits_NV.mean(dim=0)
        C = torch.eye(len(teacher_NN), dtype=torch.float64) - 1 / len(teacher_NN)
        teacher_NN = C @ teacher_NN @ C
    student_NN = logits_NV @ logits_NV.T
    return (1 - torch.cosine_similarity(student_NN.flatten(), teacher_NN.flatten(), dim=0)).float()


@pytest.mark.parametrize(
    ("terms", "settings"),
    [
        (TERMS, {}),
        (TERMS, {"relation_centred": True}),
        (TermsConfig(cross_entropy=1.0, visual_kl=1.0), {}),
        (TermsConfig(forward_kl=1.0, relation=0.5), {"trainable": ["projector"]}),
        (TermsConfig(visual_kl=1.0, relation=1.0), {"trainable": ["embeddings"]}),
    ],
)
@pytest.mark.parametrize("clips", [1, 3])
def test_loss_and_gradient_are_those_of_the_formulas(
    terms: TermsConfig, settings: dict[str, object], clips: int
) -> None:
    trained = case(stage(terms, **settings), clips)
    if not terms.attention:
        trained.student.use_eager_attention()  # the slow twin asks for attention
    ours, theirs = trained.module(trained.batch()).loss, slow_loss(trained)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    wanted = torch.autograd.grad(theirs, trained.parameters, allow_unused=True)
    for mine, slow in zip(torch.autograd.grad(ours, trained.parameters, allow_unused=True), wanted, strict=True):
        assert (mine is None) == (slow is None)
        if mine is not None:
            torch.testing.assert_close(mine, slow, atol=5e-6, rtol=2e-3)


def test_terms_at_pictures_of_a_batch_are_the_mean_of_its_rows_alone() -> None:
    trained = case(stage(TermsConfig(visual_kl=0.7, relation=0.5)), clips=3)
    numbers = trained.order.batch(0)
    whole = trained.module(trained.objective.batch(numbers, numbers)).loss
    alone = [trained.module(trained.objective.batch(one, one)).loss for one in numbers.reshape(-1, 1)]
    torch.testing.assert_close(whole, torch.stack(alone).mean(), atol=1e-6, rtol=1e-6)


def test_a_step_says_how_far_the_student_is_in_every_term_of_its_stage() -> None:
    trained = case(stage(TERMS.model_copy(update={"balance": 0.01})), sparse=True)
    named = set[str]().union(*(trained.train_step() for _ in range(trained.total_steps)))
    assert {"cross_entropy", "forward_kl", "visual_kl", "relation", "attention", "balance"} <= named
    trained = case(stage(TermsConfig(forward_kl=1.0, visual_kl=1.0)))
    assert not {"cross_entropy", "relation", "attention"} & trained.train_step().keys()


def test_a_picture_of_other_tokens_is_refused_by_its_row() -> None:
    trained = case(stage(TERMS))
    signals: Signals = trained.objective._side._visual  # type: ignore[attr-defined]
    row = trained.rows[int(trained.order.batch(0)[0])].id
    visual = signals[row]
    assert visual.attention_LN is not None
    signals[row] = replace(visual, attention_LN=visual.attention_LN[:, 1:])
    with pytest.raises(AlignmentError, match=rf"row '{row}' .* takes 4 tokens for the teacher, 5 for the student"):
        trained.batch()
