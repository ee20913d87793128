"""Learning from samples: cross-entropy on ground truth, and the teacher's side of answers and pictures.

Plain supervised training, the mimic stages of LLaVA-MoD and all stages of LLaVA-KD; `losses` has the KL at answers and
pictures, `visual_loss` the relation and attention terms, `retrieval_loss` what makes a host of streams. Used by the
loop.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from sparsight.config import StageConfig
from sparsight.distill.batches import Batch, collate
from sparsight.distill.losses import Tail, response_loss
from sparsight.distill.pictures import Pictures
from sparsight.distill.retrieval_loss import AskedClip, asked_clips, retrieval_sum
from sparsight.distill.rows import TrainingRow
from sparsight.distill.step import Numbers, StepOutput, StudentForward, forward_student, with_balance
from sparsight.distill.taught import TaughtRow, TeacherSide
from sparsight.distill.visual_batch import VisualBatch, visual_batch, with_pictures
from sparsight.distill.visual_loss import VisualLosses
from sparsight.distill.workers import worker_count
from sparsight.errors import ConfigError
from sparsight.model.projections import trace_projections
from sparsight.model.vision_language import VisionLanguageModel


class TaughtBatch(NamedTuple):
    """A worker's share of a step; `sample_scale` is what one sample counts in the terms that are means over samples,
    `question_scale` what a question whose evidence is known counts in the retrieval term. `asked` are those questions,
    none without the term."""

    answers: Batch
    pictures: VisualBatch | None
    sample_scale: float
    asked: Sequence[AskedClip]
    question_scale: float


class ResponseStep(nn.Module):
    """Batch in, weighted loss out. Sums: CE, KL, visual KL, relation, attention and retrieval losses, then what they
    are sums of: CE positions, KL positions, pictures' positions, samples with a picture, questions; input tokens."""

    def __init__(self, student: VisionLanguageModel, stage: StageConfig, vocabulary: int | None) -> None:
        super().__init__()
        self.stock: nn.Module = student.model
        self._student, self._terms, self._vocabulary = student, stage.terms, vocabulary
        self._tail: Tail = stage.tail
        self._visual = VisualLosses(stage)

    def forward(self, batch: TaughtBatch) -> StepOutput:
        answers, pictures = batch.answers, batch.pictures
        attention = self._terms.attention > 0
        with trace_projections(self._student) if batch.asked else nullcontext() as projections:
            forward = forward_student(
                self._student, answers.input_ids_BT, answers.mask_BT, answers.clips, answers.packing, attention
            )
        loss, sums = self._losses(forward, batch)
        retrieval = loss.new_zeros(())
        if projections is not None:
            retrieval = retrieval_sum(projections, batch.asked, self._student.frame_tokens)
            loss = loss + self._terms.retrieval * batch.question_scale * retrieval
        counts = [(answers.targets.ce_weights_N > 0).sum(), (answers.targets.kl_weights_N > 0).sum()]
        seen = [0, 0] if pictures is None else [sum(pictures.lengths), sum(length > 0 for length in pictures.lengths)]
        seen.append(sum(len(clip.spans) for clip in batch.asked))
        sums.append(retrieval.detach())
        numbers = [*counts, *map(loss.new_tensor, seen), answers.mask_BT.sum()]
        sums = torch.stack([*sums, *(number.to(loss.dtype) for number in numbers)])
        return with_balance(loss, sums, forward.trace, answers.mask_BT, self._terms.balance)

    def _losses(self, forward: StudentForward, batch: TaughtBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The weighted loss without the routers' balance, and the unweighted sum of every term."""
        answers, pictures = batch.answers, batch.pictures
        head_VD = self._student.head_VD[: self._vocabulary]
        hidden_TD, at_answers = forward.hidden_BTD.flatten(0, 1), answers.selected_N
        if pictures is None:
            response = response_loss(hidden_TD[at_answers], head_VD, answers.targets, self._tail)
            nothing = response.total.new_zeros(())
            return response.total, [*_sums(response.cross_entropy_N, response.kl_N, answers), *[nothing] * 3]
        at_pictures = pictures.flat(answers.mask_BT.shape[1]).to(hidden_TD.device)
        targets = with_pictures(answers.targets, pictures)
        hidden_ND = hidden_TD[torch.cat([at_answers, at_pictures])]
        kl_ND = hidden_ND[: len(targets.label_ids_N)]  # pictures stand in it if there is a visual KL
        response = response_loss(kl_ND, head_VD, targets, self._tail)
        n = len(at_answers)
        relations = self._visual.relations(hidden_ND[n:], head_VD, pictures)
        attentions = self._visual.attentions(forward, pictures)
        weighted = self._terms.relation * relations.sum() + self._terms.attention * attentions.sum()
        sums = [*_sums(response.cross_entropy_N[:n], response.kl_N[:n], answers), response.kl_N[n:].sum()]
        sums += [relations.detach().sum(), attentions.detach().sum()]
        return response.total + batch.sample_scale * weighted, sums


def _sums(cross_entropy_N: torch.Tensor, kl_N: torch.Tensor, answers: Batch) -> list[torch.Tensor]:
    """Of CE and KL over the answers' positions that count in each."""
    targets = answers.targets
    return [cross_entropy_N[targets.ce_weights_N > 0].sum(), kl_N[targets.kl_weights_N > 0].sum()]


class ResponseObjective:
    """The objective of stages over samples. `side` gives the teacher's side, `vocabulary` cuts the head to the ids that
    the teacher knows."""

    def __init__(
        self,
        student: VisionLanguageModel,
        stage: StageConfig,
        rows: Sequence[TrainingRow],
        pictures: Pictures,
        side: TeacherSide,
        vocabulary: int | None,
    ) -> None:
        self._student, self._terms, self._rows = student, stage.terms, rows
        self._pictures, self._side = pictures, side
        if stage.terms.attention > 0:
            student.use_eager_attention()
        if stage.terms.retrieval > 0 and not any(row.asked for row in rows):
            raise ConfigError(
                f"stage '{stage.name}': no question says what frames its answer follows from: leave terms.retrieval "
                "out, or learn from clips of drawn streams (kind: streams)"
            )
        self.module: nn.Module = ResponseStep(student, stage, vocabulary)

    def batch(self, everything: Numbers, share: Numbers) -> TaughtBatch:
        """Terms at answers are sums over positions divided by the response tokens of the whole global batch, terms at
        pictures are means over its samples; the factor `workers` undoes the averaging of gradients over workers."""
        tokens = sum(len(self._rows[number].positions_n) for number in everything)
        terms, scale = self._terms, worker_count() / max(1, tokens)
        taught = self._taught(share)
        rows, chat, device = [row for row, _ in taught], self._student.chat, self._student.device
        ce_weight, kl_weight = terms.cross_entropy * scale, terms.forward_kl * scale
        answers = collate(rows, self._pictures, chat.pad_id, ce_weight, kl_weight).to(device)
        sample_scale = worker_count() / len(everything)
        questions = sum(len(self._rows[number].asked) for number in everything)
        asked = asked_clips(rows, chat.visual_id, self._student.frame_tokens, device) if terms.retrieval > 0 else []
        batch = TaughtBatch(answers, None, sample_scale, asked, worker_count() / max(1, questions))
        if not terms.visual:
            return batch
        vocabulary = self._student.head_VD.shape[0]
        pictures = visual_batch(taught, terms, chat.visual_id, vocabulary, terms.visual_kl * sample_scale)
        return batch._replace(pictures=pictures.to(device))

    def _taught(self, share: Numbers) -> list[TaughtRow]:
        rows = [self._rows[number] for number in share]
        return self._side.of(rows) if self._terms.of_teacher else [TaughtRow(row, None) for row in rows]

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        ce, kl, visual_kl, relation, attention, retrieval, ce_positions, kl_positions, positions, samples, asked = sums
        terms = self._terms
        means = {
            "cross_entropy": (terms.cross_entropy, ce, ce_positions),
            "forward_kl": (terms.forward_kl, kl, kl_positions),
            "visual_kl": (terms.visual_kl, visual_kl, positions),
            "relation": (terms.relation, relation, samples),
            "attention": (terms.attention, attention, samples),
            "retrieval": (terms.retrieval, retrieval, asked),
        }
        return {name: total / count for name, (weight, total, count) in means.items() if weight and count}

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """There is nothing beside weights and optimiser."""
