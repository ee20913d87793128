"""Learning from answers: cross-entropy on ground truth and forward KL to the teacher, at response positions.

The mimic stages of LLaVA-MoD and plain supervised training; `losses` has the formulas. Used by the loop.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sparsight.config import StageConfig
from sparsight.distill.batches import Batch, collate
from sparsight.distill.losses import Tail, response_loss
from sparsight.distill.pictures import Pictures
from sparsight.distill.rows import TrainingRow
from sparsight.distill.step import Numbers, StepOutput, forward_student, with_balance
from sparsight.distill.workers import worker_count
from sparsight.model.vision_language import VisionLanguageModel


class ResponseStep(nn.Module):
    """Batch in, weighted loss out. Sums: CE, KL, CE positions, KL positions, input tokens."""

    def __init__(self, student: VisionLanguageModel, balance_weight: float, tail: Tail, vocabulary: int | None) -> None:
        super().__init__()
        self.stock: nn.Module = student.model
        self._student = student
        self._balance_weight = balance_weight
        self._tail: Tail = tail
        self._vocabulary = vocabulary

    def forward(self, batch: Batch) -> StepOutput:
        hidden_BTD, trace = forward_student(
            self._student, batch.input_ids_BT, batch.mask_BT, batch.clips, batch.packing
        )
        hidden_ND = hidden_BTD.flatten(0, 1)[batch.selected_N]
        response = response_loss(hidden_ND, self._student.head_VD[: self._vocabulary], batch.targets, self._tail)
        ce_here_N, kl_here_N = batch.targets.ce_weights_N > 0, batch.targets.kl_weights_N > 0
        ce, kl = response.cross_entropy_N[ce_here_N].sum(), response.kl_N[kl_here_N].sum()
        counts = [ce_here_N.sum(), kl_here_N.sum(), batch.mask_BT.sum()]
        sums = torch.stack([ce, kl, *(count.to(ce.dtype) for count in counts)])
        return with_balance(response.total, sums, trace, batch.mask_BT, self._balance_weight)


class ResponseObjective:
    """The objective of stages over samples. `vocabulary` cuts the head to the ids that the teacher knows."""

    def __init__(
        self,
        student: VisionLanguageModel,
        stage: StageConfig,
        rows: Sequence[TrainingRow],
        pictures: Pictures,
        vocabulary: int | None,
    ) -> None:
        self._student, self._terms, self._rows, self._pictures = student, stage.terms, rows, pictures
        self.module: nn.Module = ResponseStep(student, stage.terms.balance, stage.tail, vocabulary)

    def batch(self, everything: Numbers, share: Numbers) -> Batch:
        """Every term is a sum over positions divided by the response tokens of the whole global batch; the factor
        `workers` undoes the averaging of gradients over workers."""
        tokens = sum(len(self._rows[number].positions_n) for number in everything)
        rows = [self._rows[number] for number in share]
        terms, scale = self._terms, worker_count() / max(1, tokens)
        ce_weight, kl_weight = terms.cross_entropy * scale, terms.forward_kl * scale
        batch = collate(rows, self._pictures, self._student.chat.pad_id, ce_weight, kl_weight)
        return batch.to(self._student.device)

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        ce, kl, ce_positions, kl_positions = sums
        found: dict[str, float] = {}
        if ce_positions:
            found["cross_entropy"] = ce / ce_positions
        if kl_positions:
            found["forward_kl"] = kl / kl_positions
        return found

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """There is nothing beside weights and optimiser."""
