"""The training loop of one stage, in plain PyTorch: one `StageTrainer` a worker, one `train_step` an optimiser step.

With an initialised torch.distributed group the workers share every global batch and end each step with the same
weights as one worker would have. Checkpoints hold what changes (trainable weights, optimiser, step); random numbers
are drawn from streams seeded by seed, step and rank, and the data order by seed and step, so the step is also the
cursor of both. Ray, files and progress bars are the pipelines' business.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparsight.config import StageConfig
from sparsight.distill.balance import balance_loss
from sparsight.distill.batches import Batch, BatchOrder, collate, steps_of
from sparsight.distill.losses import Tail, response_loss
from sparsight.distill.optim import learning_rate_scale, make_optimizer, set_learning_rate
from sparsight.distill.pictures import Clips, Pictures
from sparsight.distill.rows import TrainingRow
from sparsight.distill.telemetry import PAIRS_EVERY_STEPS, pair_counts, routing_metrics
from sparsight.distill.workers import sum_over_workers, worker_count, worker_rank
from sparsight.errors import CheckpointError, ConfigError
from sparsight.model.parameters import set_trainable
from sparsight.model.routing import RouterTrace, routers, trace_routers
from sparsight.model.vision_language import VisionLanguageModel


class StepOutput(NamedTuple):
    """`loss` to differentiate; `sums` = local sums of CE, KL, CE positions, KL positions, input tokens; the balance
    value (0-d) of the global batch and the local `pair_counts` [L, E, E], None for a dense student."""

    loss: torch.Tensor
    sums: torch.Tensor
    balance: torch.Tensor | None
    pairs_LEE: torch.Tensor | None


class StudentStep(nn.Module):
    """Batch in, weighted loss out: the module that data-parallel training wraps."""

    def __init__(self, student: VisionLanguageModel, balance_weight: float, tail: Tail, vocabulary: int | None) -> None:
        super().__init__()
        self.stock: nn.Module = student.model
        self._student = student
        self._balance_weight = balance_weight
        self._tail: Tail = tail
        self._vocabulary = vocabulary

    def forward(self, batch: Batch) -> StepOutput:
        student = self._student
        visual_ND = _visual_embeds(student, batch.clips)
        with trace_routers(student) as trace:
            hidden_BTD = student.hidden(batch.input_ids_BT, batch.mask_BT, visual_ND, batch.packing)
        hidden_ND = hidden_BTD.flatten(0, 1)[batch.selected_N]
        head_VD = student.head_VD if self._vocabulary is None else student.head_VD[: self._vocabulary]
        response = response_loss(hidden_ND, head_VD, batch.targets, self._tail)
        ce_here_N, kl_here_N = batch.targets.ce_weights_N > 0, batch.targets.kl_weights_N > 0
        ce, kl = response.cross_entropy_N[ce_here_N].sum(), response.kl_N[kl_here_N].sum()
        counts = [ce_here_N.sum(), kl_here_N.sum(), batch.mask_BT.sum()]
        sums = torch.stack([ce, kl, *(count.to(ce.dtype) for count in counts)])
        if not trace.logits:
            return StepOutput(response.total, sums, None, None)
        return self._with_balance(response.total, sums, trace, batch.mask_BT.flatten())

    def _with_balance(
        self, loss: torch.Tensor, sums: torch.Tensor, trace: RouterTrace, mask_T: torch.Tensor
    ) -> StepOutput:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._balance_weight > 0):
            balance = balance_loss(trace.logits, trace.chosen, mask_T)
        if self._balance_weight > 0:
            loss = loss + self._balance_weight * balance.loss
        experts = next(iter(trace.logits.values())).shape[1]
        return StepOutput(loss, sums, balance.value.detach(), pair_counts(trace.chosen, experts, mask_T))


def _visual_embeds(student: VisionLanguageModel, clips: Clips) -> torch.Tensor:
    """Embeddings of all clips' visual tokens in reading order [N, D]; the tower runs only on pixels."""
    values = clips.values.to(student.device)
    trains = any(parameter.requires_grad for parameter in student.model.model.vision_tower.parameters())
    if trains and clips.are_features:
        raise ConfigError("a stage that trains the tower cannot use precomputed features")
    features_NPD = values if clips.are_features else student.features(values, gradient=trains)
    if len(set(clips.frames)) == 1:
        return student.clip_embeds(features_NPD.unflatten(0, (-1, clips.frames[0]))).flatten(0, 1)
    split = features_NPD.split(clips.frames)
    return torch.cat([student.clip_embeds(clip_FPD[None])[0] for clip_FPD in split])


class StageTrainer:
    """Trains one stage of one student on the rows given; every worker is given the same rows.

    `vocabulary` cuts the head to the ids that the teacher knows, where its head is shorter than the student's.
    """

    def __init__(
        self,
        student: VisionLanguageModel,
        stage: StageConfig,
        rows: Sequence[TrainingRow],
        pictures: Pictures,
        seed: int,
        vocabulary: int | None = None,
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
        self.optimizer = make_optimizer(self.parameters, stage)
        self.sparse_layers = sorted(routers(student))
        self.module: nn.Module = StudentStep(student, stage.terms.balance, stage.tail, vocabulary)
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

    def batch(self) -> Batch:
        """This worker's share of the current step, weighted so that the workers' mean is the global batch's loss.

        Every term is a sum over positions divided by the response tokens of the whole global batch; the factor
        `workers` undoes the averaging of gradients over workers.
        """
        tokens = sum(len(self.rows[index].positions_n) for index in self.order.batch(self.step))
        share = [self.rows[index] for index in self.order.share(self.step, worker_rank(), worker_count())]
        terms, scale = self.stage.terms, worker_count() / max(1, tokens)
        batch = collate(
            share, self.pictures, self.student.chat.pad_id, terms.cross_entropy * scale, terms.forward_kl * scale
        )
        return _to_device(batch, self.student.device)

    def state_dict(self) -> dict[str, Any]:
        weights = {name: value for name, value in self.student.model.named_parameters() if value.requires_grad}
        return {"step": self.step, "weights": weights, "optimizer": self.optimizer.state_dict()}

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
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])

    def _metrics(self, output: StepOutput, norm: float, rate: float) -> dict[str, float]:
        loss = output.loss.detach().to(output.sums.dtype) / worker_count()
        counts = [] if output.pairs_LEE is None else [output.pairs_LEE.flatten().to(output.sums.dtype)]
        totals = sum_over_workers(torch.cat([output.sums.detach(), loss[None], *counts]))
        ce, kl, ce_positions, kl_positions, tokens, loss_value = totals[:6].tolist()
        now_s = time.perf_counter()
        metrics = {"loss": loss_value, "learning_rate": rate, "gradient_norm": norm}
        metrics["tokens_per_s"] = tokens / (now_s - self._last_s)
        self._last_s = now_s
        if ce_positions:
            metrics["cross_entropy"] = ce / ce_positions
        if kl_positions:
            metrics["forward_kl"] = kl / kl_positions
        if output.balance is not None and output.pairs_LEE is not None:
            metrics["balance"] = float(output.balance)
            pairs = self.step % PAIRS_EVERY_STEPS == 0 or self.done
            metrics |= routing_metrics(totals[6:].view_as(output.pairs_LEE), self.sparse_layers, pairs)
        return metrics


def _to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    sparse = batch.targets.sparse
    moved = None if sparse is None else type(sparse)(*(values.to(device) for values in sparse))
    targets = batch.targets._replace(
        label_ids_N=batch.targets.label_ids_N.to(device),
        ce_weights_N=batch.targets.ce_weights_N.to(device),
        kl_weights_N=batch.targets.kl_weights_N.to(device),
        sparse=moved,
    )
    return Batch(
        batch.input_ids_BT.to(device),
        batch.mask_BT.to(device),
        batch.clips,
        batch.selected_N.to(device),
        targets,
        batch.packing,
    )
