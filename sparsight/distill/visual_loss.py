"""The losses at pictures that are not a KL: relations of positions (RDist) and attention to them (CompoDistill).

Both are one minus a cosine a sample, 0 for identical models and for samples without a picture, and neither needs
anything of vocabulary width. The visual KL is in `losses`, with that of answers. Used by the response step.
"""

import torch

from sparsight.config import StageConfig
from sparsight.distill.relation import relation_loss
from sparsight.distill.step import StudentForward
from sparsight.distill.visual_batch import VisualBatch
from sparsight.model.relation_matrix import head_gram
from sparsight.model.visual_attention import layer_groups, visual_attention


class VisualLosses:
    """The relation and attention losses of a stage, per sample; the head's Gram matrix is kept while it is frozen."""

    def __init__(self, stage: StageConfig) -> None:
        self._terms, self._centred = stage.terms, stage.relation_centred
        self._head_trains = bool({"text", "embeddings"} & set(stage.trainable))
        self._gram_DD: torch.Tensor | None = None

    def relations(self, hidden_ND: torch.Tensor, head_VD: torch.Tensor, batch: VisualBatch) -> torch.Tensor:
        """RDist of every sample [B], zeros without the term; `hidden_ND` are the states at the pictures' positions."""
        if self._terms.relation == 0.0:
            return hidden_ND.new_zeros(len(batch.positions))
        return relation_loss(hidden_ND, self._gram(head_VD), batch.lengths, batch.relations, self._centred)

    def attentions(self, forward: StudentForward, batch: VisualBatch) -> torch.Tensor:
        """The attention loss of every sample [B], zeros without the term."""
        if self._terms.attention == 0.0:
            return forward.hidden_BTD.new_zeros(len(batch.positions))
        students = [
            visual_attention(forward.attentions_L, row, text, at)
            for row, (text, at) in enumerate(zip(batch.texts, batch.positions, strict=True))
        ]
        return torch.stack(list(map(attention_loss, students, batch.attentions)))

    def _gram(self, head_VD: torch.Tensor) -> torch.Tensor:
        if self._head_trains:
            return head_gram(head_VD)
        if self._gram_DD is None:
            self._gram_DD = head_gram(head_VD)
        return self._gram_DD


def attention_loss(student_LN: torch.Tensor, teacher_LN: torch.Tensor) -> torch.Tensor:
    """Mean over the student's middle layers of 1 - cos to the mean attention of their groups of teacher layers.

    (CompoDistill, arXiv 2510.12184.) Either side may have any number of layers; both have the same N positions.
    """
    if student_LN.shape[1] == 0:
        return student_LN.sum()
    losses = [
        1.0 - _cosine(student_LN[layer], teacher_LN[group].mean(dim=0))
        for layer, group in layer_groups(len(student_LN), len(teacher_LN))
    ]
    return torch.stack(losses).mean()


def _cosine(student_N: torch.Tensor, teacher_N: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(student_N.float(), teacher_N.float(), dim=0)
