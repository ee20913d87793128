"""A run stopped and continued in new objects ends with exactly the weights of one that was never stopped."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsight.config import StageConfig
from sparsight.distill.loop import StageTrainer
from sparsight.errors import CheckpointError
from tests.parity.training_case import STAGE, sparse_student, trainer, training_rows, weights


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = trainer()
    whole_metrics = [whole.train_step() for _ in range(whole.total_steps)]
    stopped = trainer()
    for _ in range(3):
        stopped.train_step()
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(12345)
    resumed = trainer()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    metrics = [resumed.train_step() for _ in range(resumed.total_steps - resumed.step)]
    assert resumed.done
    assert [row["loss"] for row in metrics] == [row["loss"] for row in whole_metrics[3:]]
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_only_the_stages_groups_change() -> None:
    student = sparse_student()
    case = trainer()
    stage: StageConfig = STAGE.model_copy(update={"trainable": ["projector", "routers"]})
    before = {name: value.detach().clone() for name, value in student.model.named_parameters()}
    trained = StageTrainer(student, stage, training_rows(student), case.pictures, seed=0)
    trained.train_step()
    changed = {name for name, value in weights(trained).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("projector" in name or "image_newline" in name or ".mlp.gate." in name for name in changed)


def test_a_state_of_another_stage_is_refused() -> None:
    stopped = trainer()
    state = stopped.state_dict()
    state["weights"].pop(next(iter(state["weights"])))
    with pytest.raises(CheckpointError, match="mimic"):
        trainer().load_state_dict(state)


def test_without_a_teacher_only_true_answers_count() -> None:
    case = trainer()
    rows = [replace(row, targets=None) for row in case.rows]
    stage = STAGE.model_copy(update={"terms": STAGE.terms.model_copy(update={"forward_kl": 0.0})})
    trained = StageTrainer(sparse_student(), stage, rows, case.pictures, seed=5)
    batch = trained.batch().answers
    numbers = trained.order.batch(0)
    assert batch.targets.sparse is None
    assert len(batch.selected_N) == sum(int(rows[number].is_truth_n.sum()) for number in numbers)
    assert "forward_kl" not in trained.train_step()
