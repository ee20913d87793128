"""What a step compares at its rows' pictures: positions, and the teacher's targets, relations and attention there.

Positions are found in each row's ids, so prefixes, numbers of pictures and of tokens may differ within a batch, and a
row without a picture has none. The targets at pictures ride with those at answers, in one pass over the head; here is
how they are weighted. Every sample counts once, however many tokens its picture takes. Called by the response
objective.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sparsight.distill.batches import sparse_tensors
from sparsight.distill.losses import ResponseTargets, SparseTargetTensors
from sparsight.distill.rows import check_ids, misfit
from sparsight.distill.taught import TaughtRow
from sparsight.model.visual_attention import text_positions
from sparsight.records import VisualSignal
from sparsight.stages import TermsConfig


class VisualBatch(NamedTuple):
    """The rows' pictures: `positions` and `texts` are places in each row, of its picture and of the text that sees it.

    `weights_N` are the weights of the pictures' positions in the visual KL, `targets` the teacher's there, None where
    the stage has no such term. `relations` [N, N] and `attentions` [L, N] hold one a row, or are empty.
    """

    positions: list[npt.NDArray[np.int64]]
    texts: list[npt.NDArray[np.int64]]
    weights_N: torch.Tensor
    targets: SparseTargetTensors | None
    relations: list[torch.Tensor]
    attentions: list[torch.Tensor]

    @property
    def lengths(self) -> list[int]:
        return [len(places) for places in self.positions]

    def flat(self, length: int) -> torch.Tensor:
        """Positions b · T + t of all pictures, row after row, in rows of `length` tokens."""
        return torch.from_numpy(np.concatenate([row * length + at for row, at in enumerate(self.positions)]))

    def to(self, device: torch.device) -> "VisualBatch":
        return self._replace(
            weights_N=self.weights_N.to(device),
            targets=None if self.targets is None else SparseTargetTensors(*(part.to(device) for part in self.targets)),
            relations=[relation.to(device) for relation in self.relations],
            attentions=[attention.to(device) for attention in self.attentions],
        )


def visual_batch(
    taught: Sequence[TaughtRow], terms: TermsConfig, visual_id: int, vocabulary: int, kl_scale: float
) -> VisualBatch:
    """Collect what the visual terms need. The positions of a row with N of them weigh `kl_scale` / N each.

    Raises `AlignmentError` where the teacher's picture takes other tokens than the row's, or where its targets name one
    that the student's head of `vocabulary` rows does not have.
    """
    positions = [np.flatnonzero(row.input_ids == visual_id) for row, _ in taught]
    signals = [
        _checked(row.id, visual, len(at), vocabulary) for (row, visual), at in zip(taught, positions, strict=True)
    ]
    weights = [np.full(len(at), kl_scale / max(1, len(at)), np.float32) for at in positions]
    relations = [it.relation.to_matrix() for it in signals if it.relation is not None] if terms.relation > 0 else []
    attentions = [it.attention_LN for it in signals if it.attention_LN is not None] if terms.attention > 0 else []
    for name, weight, found in (("relation", terms.relation, relations), ("attention", terms.attention, attentions)):
        assert not weight or len(found) == len(taught), f"the {name} term needs the teacher's in every row"
    return VisualBatch(
        positions,
        [text_positions(row.input_ids, visual_id) for row, _ in taught] if terms.attention > 0 else [],
        torch.from_numpy(np.concatenate(weights)),
        _targets(signals) if terms.visual_kl > 0 else None,
        [torch.from_numpy(relation) for relation in relations],
        [torch.from_numpy(attention) for attention in attentions],
    )


def with_pictures(answers: ResponseTargets, pictures: VisualBatch) -> ResponseTargets:
    """Targets at answers, then those at pictures, which have no label and count in the KL alone."""
    N, sparse = len(pictures.weights_N), pictures.targets
    if sparse is None or N == 0:
        return answers
    if answers.sparse is not None:
        parts = zip(answers.sparse, sparse, strict=True)
        sparse = SparseTargetTensors(*(torch.cat([answer, picture]) for answer, picture in parts))
    elif len(answers.label_ids_N):
        sparse = SparseTargetTensors(*(_padded_front(part, len(answers.label_ids_N)) for part in sparse))
    return ResponseTargets(
        torch.cat([answers.label_ids_N, answers.label_ids_N.new_zeros(N)]),
        torch.cat([answers.ce_weights_N, answers.ce_weights_N.new_zeros(N)]),
        torch.cat([answers.kl_weights_N, pictures.weights_N]),
        sparse,
    )


def _padded_front(part: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows of nothing for positions that have no teacher: they weigh nothing in the KL."""
    return torch.cat([part.new_zeros(rows, *part.shape[1:]), part])


def _checked(row: str, visual: VisualSignal | None, tokens: int, vocabulary: int) -> VisualSignal:
    assert visual is not None, "visual terms need a store of visual signals, or the teacher"
    targets, relation, attention_LN = visual.targets, visual.relation, visual.attention_LN
    sizes = [len(targets)] if targets is not None else []
    if relation is not None:
        held = relation.matrix_NN if relation.matrix_NN is not None else relation.factors_NJ
        sizes.append(0 if held is None else len(held))
    if attention_LN is not None:
        sizes.append(attention_LN.shape[1])
    for theirs in sizes:
        if theirs != tokens:
            what = f"its picture takes {theirs} tokens for the teacher, {tokens} for the student"
            raise misfit(row, what, "use towers and patch sizes that agree, or leave visual terms out")
    if targets is not None:
        check_ids(row, targets, vocabulary)
    return visual


def _targets(signals: Sequence[VisualSignal]) -> SparseTargetTensors:
    stored = [signal.targets for signal in signals if signal.targets is not None]
    assert len(stored) == len(signals), "the visual KL needs the teacher's targets in every row"
    return sparse_tensors([targets for targets in stored if len(targets)] or stored)
