"""What a teacher says about pictures: distributions, relations and attention at the positions that they take.

The positions are found in each row's own ids, whatever stands before them and however many there are; a row without a
picture has none. Which of the three is made is the settings' choice (`stages.VisualAsk`). Called by `flow`, with the
forward pass that the answers' signals come from.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sparsight.data.visual_signals import is_matrix_smaller
from sparsight.model.relation_matrix import factors_of_gram, head_gram, relation_matrix
from sparsight.model.visual_attention import text_positions, visual_attention
from sparsight.records import Relation, Sample, SparseTargets, VisualSignal
from sparsight.teacher.protocol import SignalSettings
from sparsight.teacher.targets import cut, tail_uniforms, targets_of_hidden


class TeacherForward(NamedTuple):
    """A forward pass over right-padded rows: last hidden states [B, T, D] and, where asked for, every layer's attention
    [B, H, T, T]."""

    hidden_BTD: torch.Tensor
    attentions_L: Sequence[torch.Tensor] = ()


class VisualTeacher:
    """Makes visual signals with one teacher's head `head_VD`."""

    def __init__(self, head_VD: torch.Tensor, visual_id: int, settings: SignalSettings) -> None:
        self._head_VD, self._visual_id, self._settings = head_VD, visual_id, settings
        self._gram_DD: torch.Tensor | None = None
        self._factors_DD: torch.Tensor | None = None

    def signals(
        self, rows: Sequence[Sequence[int]], samples: Sequence[Sample], forward: TeacherForward
    ) -> list[VisualSignal | None]:
        """The visual signal of each row of ids, None for all where nothing is asked for."""
        ask = self._settings.visual
        if not any(ask):
            return [None for _ in rows]
        ids = [np.asarray(row, np.int64) for row in rows]
        places = [np.flatnonzero(row == self._visual_id) for row in ids]
        hidden = [forward.hidden_BTD[index][_index(at, forward)] for index, at in enumerate(places)]
        targets = self._targets(hidden, samples) if ask.targets else [None] * len(rows)
        found: list[VisualSignal | None] = []
        for index, (row, at) in enumerate(zip(ids, places, strict=True)):
            text = text_positions(row, self._visual_id)
            relation = self._relation(hidden[index]) if ask.relation else None
            attention = _numpy(visual_attention(forward.attentions_L, index, text, at)) if ask.attention else None
            found.append(VisualSignal(targets[index], relation, attention))
        return found

    def _targets(self, hidden: Sequence[torch.Tensor], samples: Sequence[Sample]) -> list[SparseTargets]:
        settings, (head, tail) = self._settings, self._settings.kept
        lengths = [len(part_ND) for part_ND in hidden]
        uniforms = [
            tail_uniforms(settings.seed, f"{sample.id}\nvisual", length, tail)
            for sample, length in zip(samples, lengths, strict=True)
        ]
        nothing_N = np.zeros(sum(lengths), np.int32)
        targets, _ = targets_of_hidden(
            torch.cat(list(hidden)),
            lambda part_nD: part_nD @ self._head_VD.T,
            self._head_VD.shape[0],
            nothing_N,
            head,
            np.concatenate(uniforms),
        )
        ends = np.cumsum(lengths)
        return [cut(targets, int(end) - length, int(end)) for end, length in zip(ends, lengths, strict=True)]

    def _relation(self, hidden_ND: torch.Tensor) -> Relation:
        """The matrix, or factors where these are fewer numbers: H (WᵀW)½ has the products of H Wᵀ."""
        if self._gram_DD is None:
            self._gram_DD = head_gram(self._head_VD.detach())
        if is_matrix_smaller(*hidden_ND.shape):
            return Relation(matrix_NN=_numpy(relation_matrix(hidden_ND.to(self._gram_DD.dtype), self._gram_DD)))
        if self._factors_DD is None:
            self._factors_DD = factors_of_gram(self._gram_DD)
        return Relation(factors_NJ=_numpy(hidden_ND.to(self._factors_DD.dtype) @ self._factors_DD))


def _index(places_N: npt.NDArray[np.int64], forward: TeacherForward) -> torch.Tensor:
    return torch.from_numpy(places_N).to(forward.hidden_BTD.device)


def _numpy(values: torch.Tensor) -> npt.NDArray[np.float32]:
    return values.float().cpu().numpy()
