"""A preference step against the formula: every answer alone through the stock forward, with plain loops."""

import math

import pytest
import torch

from sparsight.config import StageConfig
from sparsight.distill.loop import StageTrainer
from sparsight.distill.pair_rows import PairRow
from sparsight.errors import CheckpointError
from sparsight.model.routing import trace_routers
from sparsight.records import Turn
from tests.parity.preference_case import QUESTION, pair_trainer, stage
from tests.parity.training_case import weights

VARIANTS = [("dpo", "teacher"), ("kto_pair", "teacher"), ("dpo", "student"), ("kto_pair", "student")]


def answer_logprob(case: StageTrainer, row: PairRow, answer: int) -> torch.Tensor:
    """log π(answer | picture, question) by one forward of the stock model over this answer alone."""
    student = case.student
    text = student.chat.decode(row.answers.answer_ids(answer).tolist())
    chat = student.chat.encode([Turn(QUESTION, text)], student.visual_tokens())
    ((start, end),) = chat.answer_spans
    assert chat.input_ids[start:end] == row.answers.answer_ids(answer).tolist()
    pixels = case.pictures.load([row.content_hash]).values
    logits_TV = student.model(input_ids=torch.tensor([chat.input_ids]), pixel_values_videos=pixels[None]).logits[0]
    logprobs_TV = logits_TV.log_softmax(dim=-1)
    return torch.stack([logprobs_TV[position - 1, chat.input_ids[position]] for position in range(start, end)]).sum()


def slow_loss(case: StageTrainer, reference: dict[str, tuple[float, float]]) -> torch.Tensor:
    """Preference and cross-entropy of the current global batch, without balance."""
    settings = case.stage
    assert settings.preference is not None
    beta, sigmoid = settings.preference.beta, torch.sigmoid
    rows = [case.rows[number] for number in case.order.batch(case.step)]
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    nats, tokens = torch.zeros(()), 0
    for row in rows:
        assert isinstance(row, PairRow)
        chosen, rejected = answer_logprob(case, row, 0), answer_logprob(case, row, 1)
        pairs.append((chosen - reference[row.id][0], rejected - reference[row.id][1]))
        nats, tokens = nats - chosen, tokens + row.chosen_tokens
    z_c = max(0.0, sum(float(chosen.detach()) for chosen, _ in pairs) / len(pairs))
    z_r = max(0.0, sum(float(rejected.detach()) for _, rejected in pairs) / len(pairs))
    total = torch.zeros(())
    for chosen, rejected in pairs:
        if settings.preference.loss == "dpo":
            total = total - torch.log(sigmoid(beta * (chosen - rejected)))
        else:
            total = total + (1 - sigmoid(beta * (chosen - z_r)) + 1 - sigmoid(beta * (z_c - rejected))) / 2
    return settings.terms.preference * total / len(pairs) + settings.terms.cross_entropy * nats / tokens


def without_balance(settings: StageConfig) -> StageConfig:
    return settings.model_copy(update={"terms": settings.terms.model_copy(update={"balance": 0.0})})


def references(case: StageTrainer) -> dict[str, tuple[float, float]]:
    """By row: the teacher's, or the student's own at this moment."""
    assert case.stage.preference is not None
    found: dict[str, tuple[float, float]] = {}
    for row in case.rows:
        assert isinstance(row, PairRow)
        found[row.id] = row.teacher_logprobs
        if case.stage.preference.reference == "student":
            with torch.no_grad():
                found[row.id] = (float(answer_logprob(case, row, 0)), float(answer_logprob(case, row, 1)))
    return found


@pytest.mark.parametrize(("loss", "reference"), VARIANTS)
def test_a_steps_loss_and_gradient_are_those_of_the_formula(loss: str, reference: str) -> None:
    case = pair_trainer(without_balance(stage(loss, reference)))
    start = references(case)
    for _ in range(2):  # away from the start, where the student is its own reference
        case.train_step()
    ours, theirs = case.module(case.batch()).loss, slow_loss(case, start)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    our_grads = torch.autograd.grad(ours, case.parameters)
    for mine, slow in zip(our_grads, torch.autograd.grad(theirs, case.parameters), strict=True):
        torch.testing.assert_close(mine, slow, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("loss", "value"), [("dpo", math.log(2)), ("kto_pair", 0.5)])
def test_a_student_starts_level_with_itself(loss: str, value: float) -> None:
    metrics = pair_trainer(stage(loss, "student")).train_step()
    assert metrics["preference"] == pytest.approx(value, abs=1e-5)
    assert metrics["reward_margin"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["chosen_log_ratio"] == pytest.approx(0.0, abs=1e-5)


def test_the_metrics_are_those_of_the_pairs() -> None:
    case = pair_trainer(stage("dpo", "student"))
    start = references(case)
    for _ in range(3):
        case.train_step()
    rows = [case.rows[number] for number in case.order.batch(case.step)]
    ratios: list[tuple[float, float]] = []
    below, nats, tokens = 0.0, 0.0, 0
    for row in rows:
        assert isinstance(row, PairRow)
        with torch.no_grad():
            chosen, rejected = (float(answer_logprob(case, row, answer)) for answer in (0, 1))
        ratios.append((chosen - start[row.id][0], rejected - start[row.id][1]))
        below, nats, tokens = below + row.teacher_logprobs[0] - chosen, nats - chosen, tokens + row.chosen_tokens
    metrics = case.train_step()
    count = len(rows)
    assert metrics["reward_margin"] == pytest.approx(0.3 * sum(c - r for c, r in ratios) / count, abs=1e-4)
    assert metrics["reward_accuracy"] == pytest.approx(sum(c > r for c, r in ratios) / count)
    assert metrics["chosen_log_ratio"] == pytest.approx(sum(c for c, _ in ratios) / count, abs=1e-4)
    assert metrics["rejected_log_ratio"] == pytest.approx(sum(r for _, r in ratios) / count, abs=1e-4)
    assert metrics["chosen_below_teacher"] == pytest.approx(below / tokens, abs=1e-4)
    assert metrics["cross_entropy"] == pytest.approx(nats / tokens, abs=1e-4)
    assert metrics["balance"] > 0


def test_preference_is_learned() -> None:
    case = pair_trainer(stage("dpo", "student", cross_entropy=0.0).model_copy(update={"steps": 30}))
    metrics = [case.train_step() for _ in range(case.total_steps)]
    assert metrics[-1]["preference"] < 0.6 * metrics[0]["preference"]
    assert metrics[-1]["reward_accuracy"] == 1.0
    assert metrics[-1]["reward_margin"] > 0.5


def test_router_balance_counts_both_answers_and_the_shared_prompt_once() -> None:
    case = pair_trainer(stage())
    batch = case.batch()
    with trace_routers(case.student) as trace:
        output = case.module(batch)
    assert output.pairs_LEE is not None
    active = next(iter(trace.chosen.values())).shape[1]
    tokens = sum(len(case.rows[number]) for number in case.order.batch(0))
    assert int(output.pairs_LEE[0].diagonal().sum()) == tokens * active


def test_only_the_stages_groups_change() -> None:
    case = pair_trainer(stage())
    before = weights(case)
    case.train_step()
    changed = {name for name, value in weights(case).items() if not torch.equal(value, before[name])}
    assert any(".mlp.experts." in name for name in changed)
    assert all("projector" in name or "image_newline" in name or ".mlp." in name for name in changed)


@pytest.mark.parametrize(("loss", "reference"), [("kto_pair", "teacher"), ("dpo", "student")])
def test_resumed_equals_uninterrupted(loss: str, reference: str) -> None:
    settings = stage(loss, reference)
    whole = pair_trainer(settings)
    whole_metrics = [whole.train_step() for _ in range(whole.total_steps)]
    stopped = pair_trainer(settings)
    for _ in range(3):
        stopped.train_step()
    resumed = pair_trainer(settings)
    resumed.load_state_dict(stopped.state_dict())
    metrics = [resumed.train_step() for _ in range(resumed.total_steps - resumed.step)]
    assert [row["loss"] for row in metrics] == [row["loss"] for row in whole_metrics[3:]]
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_a_state_without_the_students_reference_is_refused() -> None:
    stopped = pair_trainer(stage(reference="teacher"))
    stopped.train_step()
    with pytest.raises(CheckpointError, match="preference"):
        pair_trainer(stage(reference="student")).load_state_dict(stopped.state_dict())
