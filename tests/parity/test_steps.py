"""One training step's loss and gradient against the stock model's whole logits, position by position."""

from dataclasses import replace

import pytest
import torch

from sparsight.config import TermsConfig
from sparsight.distill.batches import collate
from sparsight.distill.loop import StageTrainer
from sparsight.distill.response_objective import ResponseStep
from sparsight.model.routing import trace_routers
from tests.parity.training_case import STAGE, trainer


def slow_loss(case: StageTrainer) -> torch.Tensor:
    """The loss of the current global batch: every row alone, through the stock forward, with plain loops."""
    rows = [case.rows[index] for index in case.order.batch(case.step)]
    terms, student = case.stage.terms, case.student
    response_tokens = sum(len(row.positions_n) for row in rows)
    total = torch.zeros(())
    router_probs: dict[int, list[torch.Tensor]] = {}
    chosen: dict[int, list[torch.Tensor]] = {}
    for row in rows:
        pixels = case.pictures.load([row.content_hash]).values
        ids_BT = torch.from_numpy(row.input_ids.astype("int64"))[None]
        with trace_routers(student) as trace:
            logits_TV = student.model(input_ids=ids_BT, pixel_values_videos=pixels[None]).logits[0]
        assert row.targets is not None
        for n, position in enumerate(row.positions_n.tolist()):
            logprobs_V = logits_TV[position - 1].log_softmax(dim=-1)  # what predicts this token
            if row.is_truth_n[n]:
                total = total - terms.cross_entropy * logprobs_V[int(row.input_ids[position])]
            for token, logprob in zip(row.targets.head_ids_nK[n], row.targets.head_logprobs_nK[n], strict=True):
                p = float(torch.tensor(logprob).exp())
                total = total + terms.forward_kl * p * (float(logprob) - logprobs_V[int(token)])
            share = float(row.targets.tail_mass_n[n]) / row.targets.tail_ids_nS.shape[1]
            for token, logprob in zip(row.targets.tail_ids_nS[n], row.targets.tail_logprobs_nS[n], strict=True):
                total = total + terms.forward_kl * share * (float(logprob) - logprobs_V[int(token)])
        for layer in trace.logits:
            router_probs.setdefault(layer, []).append(trace.logits[layer].softmax(dim=-1))
            chosen.setdefault(layer, []).append(trace.chosen[layer])
    return total / response_tokens + terms.balance * slow_balance(router_probs, chosen)


def slow_balance(router_probs: dict[int, list[torch.Tensor]], chosen: dict[int, list[torch.Tensor]]) -> torch.Tensor:
    layers: list[torch.Tensor] = []
    for layer, probs in router_probs.items():
        probs_TE, chosen_TA = torch.cat(probs), torch.cat(chosen[layer])
        share_E = torch.nn.functional.one_hot(chosen_TA, probs_TE.shape[1]).float().mean(dim=(0, 1))
        layers.append(probs_TE.shape[1] * (share_E * probs_TE.mean(dim=0)).sum())
    return torch.stack(layers).mean()


@pytest.mark.parametrize("step", [0, 3])
def test_a_steps_loss_and_gradient_are_those_of_the_formula(step: int) -> None:
    case = trainer()
    case.step = step
    ours = case.module(case.batch()).loss
    theirs = slow_loss(case)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    our_grads = torch.autograd.grad(ours, case.parameters)
    for mine, slow in zip(our_grads, torch.autograd.grad(theirs, case.parameters), strict=True):
        torch.testing.assert_close(mine, slow, atol=2e-6, rtol=1e-3)


def test_the_first_response_token_is_predicted_from_the_position_before_it() -> None:
    case = trainer()
    row = case.rows[0]
    batch = collate([row], case.pictures, case.student.chat.pad_id, 1.0, 1.0)
    assert batch.selected_N.tolist() == (row.positions_n - 1).tolist()
    assert batch.targets.label_ids_N.tolist() == row.label_ids_n.tolist()


def test_a_head_longer_than_the_teachers_is_cut_for_the_loss() -> None:
    case = trainer()
    known = case.student.head_VD.shape[0] - 40
    taught = case.batch()
    batch = taught.answers
    assert batch.targets.sparse is not None
    sparse = batch.targets.sparse._replace(
        head_ids_NK=batch.targets.sparse.head_ids_NK.clamp(max=known - 1),
        tail_ids_NS=batch.targets.sparse.tail_ids_NS.clamp(max=known - 1),
    )
    targets = batch.targets._replace(sparse=sparse, label_ids_N=batch.targets.label_ids_N.clamp(max=known - 1))
    head = case.student.model.get_output_embeddings().weight
    unknown = [token for token in range(known, known + 40) if token not in set(batch.input_ids_BT.flatten().tolist())]
    assert unknown
    plain = STAGE.model_copy(update={"terms": TermsConfig(cross_entropy=0.5, forward_kl=1.0)})
    for vocabulary in (None, known):
        step = ResponseStep(case.student, plain, vocabulary)
        cut = taught._replace(answers=replace(batch, targets=targets))
        (grad_VD,) = torch.autograd.grad(step(cut).loss, [head])
        assert (float(grad_VD[unknown].abs().max()) == 0.0) == (vocabulary is not None)
