"""Learning from pairs: a preference loss on whole answers, and on the chosen ones cross-entropy if wanted.

Both answers of a pair stand in one packed sequence after the prompt that they share. What a token weighs in the loss
follows from both answers' log-probs, so those are computed first (`model.label_logprobs`), and the loss formulas are
`preference`'s. No teacher is in memory: its log-probs came with the pairs, and the student's own are taken before its
first step. The preference stage of LLaVA-MoD. Used by the loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from sparsight.config import StageConfig
from sparsight.distill.pair_rows import PairRow
from sparsight.distill.pictures import Clips, Pictures
from sparsight.distill.preference import preference
from sparsight.distill.step import Numbers, StepOutput, forward_student, visual_embeds, with_balance
from sparsight.distill.workers import sum_over_workers, worker_count, worker_rank
from sparsight.errors import CheckpointError
from sparsight.model.answer_scores import answer_sums, score_answers
from sparsight.model.label_logprobs import label_logprobs
from sparsight.model.packing import Packing, pack
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.stages import PreferenceConfig

REFERENCE_ROWS = 16
"""Pairs that are scored at a time when the student is its own reference: fixed, so that the numbers are too."""


@dataclass(frozen=True)
class PairBatch:
    """One worker's share of a step: B pairs, so 2 B answers, chosen and rejected in turn, with N tokens in all.

    `before_N` are the flat positions whose hidden states predict the answers' tokens `labels_N`; `lengths` are the
    answers' tokens. A pair weighs `pair_weight` and a token of a chosen answer `ce_weight`.
    """

    input_ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    clips: Clips
    before_N: torch.Tensor
    labels_N: torch.Tensor
    lengths: list[int]
    reference_B2: torch.Tensor
    teacher_B2: torch.Tensor
    pair_weight: float
    ce_weight: float
    packing: Packing | None

    def to(self, device: torch.device) -> "PairBatch":
        """The batch with what the step computes with on the device."""
        tensors = ("input_ids_BT", "mask_BT", "before_N", "labels_N", "reference_B2", "teacher_B2")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


class PairSums(NamedTuple):
    """Sums over a batch's pairs of what the step's metrics are made from; one tensor of them travels."""

    losses: Any
    margins: Any
    accurate: Any
    chosen_ratios: Any
    rejected_ratios: Any
    chosen_below_teacher: Any
    chosen_nats: Any
    chosen_tokens: Any
    pairs: Any


def collate_pairs(
    rows: Sequence[PairRow],
    reference_B2: torch.Tensor,
    pictures: Pictures,
    pad_id: int,
    pair_weight: float,
    ce_weight: float,
) -> PairBatch:
    """Right-padded tensors of pairs."""
    length = max(len(row) for row in rows)
    ids_BT = np.full((len(rows), length), pad_id, np.int64)
    mask_BT = np.zeros((len(rows), length), np.int64)
    for index, row in enumerate(rows):
        ids_BT[index, : len(row)] = row.answers.input_ids
        mask_BT[index, : len(row)] = 1
    before_N = np.concatenate([index * length + row.answers.before_n for index, row in enumerate(rows)])
    positions_N = np.concatenate([index * length + row.positions_n for index, row in enumerate(rows)])
    return PairBatch(
        torch.from_numpy(ids_BT),
        torch.from_numpy(mask_BT),
        pictures.load([row.content_hash for row in rows]),
        torch.from_numpy(before_N),
        torch.from_numpy(ids_BT.reshape(-1)[positions_N]),
        [end - start for row in rows for start, end in row.answers.answer_spans],
        reference_B2,
        torch.tensor([row.teacher_logprobs for row in rows], dtype=torch.float32),
        pair_weight,
        ce_weight,
        pack([row.answers.starts for row in rows], length),
    )


class PairStep(nn.Module):
    """Batch in, weighted loss out. Sums: `PairSums`, and the number of input tokens."""

    def __init__(
        self,
        student: VisionLanguageModel,
        settings: PreferenceConfig,
        balance_weight: float,
        vocabulary: int | None,
    ) -> None:
        super().__init__()
        self.stock: nn.Module = student.model
        self._student = student
        self._settings = settings
        self._balance_weight = balance_weight
        self._vocabulary = vocabulary

    def forward(self, batch: PairBatch) -> StepOutput:
        hidden_BTD, trace, _ = forward_student(
            self._student, batch.input_ids_BT, batch.mask_BT, batch.clips, batch.packing
        )
        hidden_ND = hidden_BTD.flatten(0, 1)[batch.before_N]
        logprobs_N = label_logprobs(hidden_ND, self._student.head_VD[: self._vocabulary], batch.labels_N)
        logprobs_B2 = answer_sums(logprobs_N, batch.lengths).unflatten(0, (-1, 2))
        ratios_B2 = logprobs_B2 - batch.reference_B2
        found = preference(ratios_B2[:, 0], ratios_B2[:, 1], self._settings)
        chosen_nats = -logprobs_B2[:, 0].sum()
        loss = batch.pair_weight * found.losses_B.sum() + batch.ce_weight * chosen_nats
        sums = PairSums(
            losses=found.losses_B.sum(),
            margins=found.margins_B.sum(),
            accurate=found.accurate_B.sum(),
            chosen_ratios=ratios_B2[:, 0].sum(),
            rejected_ratios=ratios_B2[:, 1].sum(),
            chosen_below_teacher=(batch.teacher_B2 - logprobs_B2)[:, 0].sum(),
            chosen_nats=chosen_nats,
            chosen_tokens=loss.new_tensor(sum(batch.lengths[0::2])),
            pairs=loss.new_tensor(len(batch.lengths) // 2),
        )
        tokens = batch.mask_BT.sum().to(loss.dtype)
        return with_balance(loss, torch.stack([*sums, tokens]), trace, batch.mask_BT, self._balance_weight)


class PairObjective:
    """The objective of stages over pairs. `vocabulary` cuts the head to the ids that the teacher knows."""

    def __init__(
        self,
        student: VisionLanguageModel,
        stage: StageConfig,
        rows: Sequence[PairRow],
        pictures: Pictures,
        vocabulary: int | None,
    ) -> None:
        assert stage.preference is not None, "the configuration asks for it"
        self._student, self._stage, self._rows, self._pictures = student, stage, rows, pictures
        self._vocabulary = vocabulary
        self._own = stage.preference.reference == "student"
        self._reference_R2: torch.Tensor | None = None
        if not self._own:
            self._reference_R2 = torch.tensor([row.teacher_logprobs for row in rows], dtype=torch.float32)
        self.module: nn.Module = PairStep(student, stage.preference, stage.terms.balance, vocabulary)

    def batch(self, everything: Numbers, share: Numbers) -> PairBatch:
        """A pair weighs one part in the pairs of the global batch, a chosen token one part in its chosen tokens; the
        factor `workers` undoes the averaging of gradients over workers.

        All workers must ask for the first batch together, before any step.
        """
        if self._reference_R2 is None:
            self._reference_R2 = own_logprobs(self._student, self._rows, self._pictures, self._vocabulary)
        chosen_tokens = sum(self._rows[number].chosen_tokens for number in everything)
        terms = self._stage.terms
        batch = collate_pairs(
            [self._rows[number] for number in share],
            self._reference_R2[torch.from_numpy(share)],
            self._pictures,
            self._student.chat.pad_id,
            terms.preference * worker_count() / len(everything),
            terms.cross_entropy * worker_count() / chosen_tokens,
        )
        return batch.to(self._student.device)

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Means over pairs; `chosen_below_teacher` and `cross_entropy` are nats a token of the chosen answers, the
        first an estimate of the KL from the teacher where the teacher wrote them."""
        total = PairSums(*sums)
        return {
            "preference": total.losses / total.pairs,
            "reward_margin": total.margins / total.pairs,
            "reward_accuracy": total.accurate / total.pairs,
            "chosen_log_ratio": total.chosen_ratios / total.pairs,
            "rejected_log_ratio": total.rejected_ratios / total.pairs,
            "chosen_below_teacher": total.chosen_below_teacher / total.chosen_tokens,
            "cross_entropy": total.chosen_nats / total.chosen_tokens,
        }

    def state(self) -> dict[str, Any]:
        """The student's own reference is of its weights before the first step: it cannot be computed again later."""
        return {"reference": self._reference_R2} if self._own else {}

    def load_state(self, state: dict[str, Any]) -> None:
        if self._own:
            reference_R2: torch.Tensor | None = state.get("reference")
            if reference_R2 is None or len(reference_R2) != len(self._rows):
                raise CheckpointError(
                    f"the checkpoint is not of stage '{self._stage.name}': delete it and run the stage again"
                )
            self._reference_R2 = reference_R2.cpu()


def own_logprobs(
    student: VisionLanguageModel, rows: Sequence[PairRow], pictures: Pictures, vocabulary: int | None
) -> torch.Tensor:
    """The student's present log-probs of every row's two answers, float32 [rows, 2] on the CPU.

    Rows of similar length are scored together, in batches that depend on the rows alone, each by one worker.
    """
    trained = student.model.training
    student.model.eval()
    order = sorted(range(len(rows)), key=lambda number: (len(rows[number]), number))
    logprobs_R2 = torch.zeros(len(rows), 2, device=student.device)
    for index, first in enumerate(range(0, len(order), REFERENCE_ROWS)):
        if index % worker_count() == worker_rank():
            numbers = order[first : first + REFERENCE_ROWS]
            with torch.no_grad():
                visual_ND = visual_embeds(student, pictures.load([rows[number].content_hash for number in numbers]))
            scores = score_answers(student, [rows[number].answers for number in numbers], visual_ND, vocabulary)
            logprobs_R2[numbers] = torch.stack(scores)
    student.model.train(trained)
    return sum_over_workers(logprobs_R2).cpu()
