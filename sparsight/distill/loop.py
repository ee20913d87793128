"""The training loop of one stage, in plain PyTorch: one `StageTrainer` a worker, one `train_step` an optimiser step.

With an initialised torch.distributed group the workers share every global batch and end each step with the same
weights as one worker would have. Checkpoints hold what changes (trainable weights, optimiser, step); random numbers
are drawn from streams seeded by seed, step and rank, and the data order by seed and step, so the step is also the
cursor of both. Ray, files and progress bars are the pipelines' business.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparsight.config import StageConfig
from sparsight.distill.batches import BatchOrder, steps_of
from sparsight.distill.optim import learning_rate_scale, make_optimizer, set_learning_rate
from sparsight.distill.pair_objective import PairObjective
from sparsight.distill.pair_rows import PairRow
from sparsight.distill.pictures import Pictures
from sparsight.distill.response_objective import ResponseObjective
from sparsight.distill.rows import Row, TrainingRow
from sparsight.distill.step import Objective, StepOutput
from sparsight.distill.taught import StoredSide, TeacherSide
from sparsight.distill.telemetry import PAIRS_EVERY_STEPS, routing_metrics
from sparsight.distill.workers import sum_over_workers, worker_count, worker_rank
from sparsight.errors import CheckpointError, ConfigError
from sparsight.model.parameters import set_trainable
from sparsight.model.routing import routers
from sparsight.model.vision_language import VisionLanguageModel


class StageTrainer:
    """Trains one stage of one student on the rows given; every worker is given the same rows.

    `vocabulary` cuts the head to the ids that the teacher knows, where its head is shorter than the student's. `side`
    gives the teacher's side of rows; None takes what the rows themselves hold.
    """

    def __init__(
        self,
        student: VisionLanguageModel,
        stage: StageConfig,
        rows: Sequence[Row],
        pictures: Pictures,
        seed: int,
        vocabulary: int | None = None,
        side: TeacherSide | None = None,
    ) -> None:
        if stage.batch_samples < worker_count():
            raise ConfigError(
                f"stage '{stage.name}': batch_samples {stage.batch_samples} is less than {worker_count()} workers"
            )
        self.student, self.stage, self.rows, self.pictures, self.seed = student, stage, rows, pictures, seed
        self.total_steps = steps_of(len(rows), stage.batch_samples, stage.epochs, stage.steps)
        self.order = BatchOrder([len(row) for row in rows], stage.batch_samples, self.total_steps, seed)
        self.step = 0
        student.model.train()
        self.parameters = set_trainable(student, stage.trainable)
        if not self.parameters:
            raise ConfigError(
                f"stage '{stage.name}': the student has no weights in the groups {', '.join(stage.trainable)}: name "
                "others in trainable (only an up-cycled student has routers)"
            )
        self.optimizer = make_optimizer(self.parameters, stage)
        self.sparse_layers = sorted(routers(student))
        self.objective = _objective(student, stage, rows, pictures, side or StoredSide(), vocabulary)
        self.module: nn.Module = self.objective.module
        if worker_count() > 1:
            self.module = DistributedDataParallel(self.module, forward_sync_buffers=False, gradient_as_bucket_view=True)
        self._last_s = time.perf_counter()

    @property
    def done(self) -> bool:
        return self.step >= self.total_steps

    def train_step(self) -> dict[str, float]:
        """One optimiser step over the global batch; returns its metrics, the same on every worker."""
        torch.manual_seed((self.seed * 1_000_003 + self.step) * 4096 + worker_rank())
        scale = learning_rate_scale(self.step, self.total_steps, self.stage.warmup_fraction)
        set_learning_rate(self.optimizer, self.stage.learning_rate * scale)
        self.optimizer.zero_grad(set_to_none=True)
        output: StepOutput = self.module(self.batch())
        output.loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.stage.clip_norm, error_if_nonfinite=True)
        self.optimizer.step()
        self.step += 1
        return self._metrics(output, float(norm), self.stage.learning_rate * scale)

    def batch(self) -> Any:
        """This worker's share of the current step, weighted so that the workers' mean is the global batch's loss."""
        share = self.order.share(self.step, worker_rank(), worker_count())
        return self.objective.batch(self.order.batch(self.step), share)

    def state_dict(self) -> dict[str, Any]:
        weights = {name: value for name, value in self.student.model.named_parameters() if value.requires_grad}
        state = {"step": self.step, "weights": weights, "optimizer": self.optimizer.state_dict()}
        return state | {"objective": self.objective.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of the same stage. Raises `CheckpointError` if it is of another one."""
        ours = {name: value for name, value in self.student.model.named_parameters() if value.requires_grad}
        theirs: dict[str, torch.Tensor] = state["weights"]
        if ours.keys() != theirs.keys() or any(ours[name].shape != theirs[name].shape for name in ours):
            raise CheckpointError(
                f"the checkpoint is not of stage '{self.stage.name}': delete it and run the stage again"
            )
        with torch.no_grad():
            for name, value in ours.items():
                value.copy_(theirs[name])
        self.objective.load_state(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])

    def _metrics(self, output: StepOutput, norm: float, rate: float) -> dict[str, float]:
        loss = output.loss.detach().to(output.sums.dtype) / worker_count()
        counts = [] if output.pairs_LEE is None else [output.pairs_LEE.flatten().to(output.sums.dtype)]
        totals = sum_over_workers(torch.cat([output.sums.detach(), loss[None], *counts]))
        named = len(output.sums) + 1
        *sums, tokens, loss_value = totals[:named].tolist()
        now_s = time.perf_counter()
        metrics = {"loss": loss_value, "learning_rate": rate, "gradient_norm": norm}
        metrics["tokens_per_s"] = tokens / (now_s - self._last_s)
        self._last_s = now_s
        metrics |= self.objective.figures(sums)
        if output.balance is not None and output.pairs_LEE is not None:
            metrics["balance"] = float(output.balance)
            pairs = self.step % PAIRS_EVERY_STEPS == 0 or self.done
            metrics |= routing_metrics(totals[named:].view_as(output.pairs_LEE), self.sparse_layers, pairs)
        return metrics


def _objective(
    student: VisionLanguageModel,
    stage: StageConfig,
    rows: Sequence[Row],
    pictures: Pictures,
    side: TeacherSide,
    vocabulary: int | None,
) -> Objective:
    if stage.rows == "pairs":
        pairs = [row for row in rows if isinstance(row, PairRow)]
        assert len(pairs) == len(rows), "a stage over pairs needs rows of pairs"
        return PairObjective(student, stage, pairs, pictures, vocabulary)
    answers = [row for row in rows if isinstance(row, TrainingRow)]
    assert len(answers) == len(rows), "a stage over samples needs rows of samples"
    return ResponseObjective(student, stage, answers, pictures, side, vocabulary)
