"""Which rows make which optimiser step, and rows as tensors.

The order is a pure function of seed and step: any worker, started anywhere, finds the same global batch, and takes
its own share of it. So the data cursor of a checkpoint is the step number. Called by the training loop.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sparsight.distill.losses import ResponseTargets, SparseTargetTensors
from sparsight.distill.pictures import Clips, Pictures
from sparsight.distill.rows import TrainingRow
from sparsight.errors import ConfigError
from sparsight.model.packing import Packing, pack
from sparsight.records import SparseTargets

WINDOW_STEPS = 16
"""Rows are sorted by length among so many steps, so that a batch holds little padding."""


class BatchOrder:
    """The global batch of every step: epochs of seeded permutations, one after another, never a short batch.

    Rows of similar length meet: the rows of `WINDOW_STEPS` steps are sorted by length, cut into batches, and the
    batches shuffled.
    """

    def __init__(self, lengths: Sequence[int], batch_samples: int, total_steps: int, seed: int) -> None:
        if not lengths:
            raise ConfigError(
                "there are no rows to train on: check the stage's `rows` and terms, and the samples' answers, or how "
                "many pairs were made"
            )
        self.lengths = np.asarray(lengths)
        self.batch_samples = batch_samples
        self.total_steps = total_steps
        self.seed = seed
        self._window = -1
        self._batches: list[npt.NDArray[np.int64]] = []

    def batch(self, step: int) -> npt.NDArray[np.int64]:
        """Row numbers of optimiser step `step` (from 0), longest first."""
        window, place = divmod(step, WINDOW_STEPS)
        if window != self._window:
            self._window, self._batches = window, self._arrange(window)
        return self._batches[place]

    def share(self, step: int, rank: int, workers: int) -> npt.NDArray[np.int64]:
        """The part of the global batch that one of `workers` takes; parts differ by at most one row."""
        return self.batch(step)[rank::workers]

    def _arrange(self, window: int) -> list[npt.NDArray[np.int64]]:
        first = window * WINDOW_STEPS * self.batch_samples
        last = min(self.total_steps, (window + 1) * WINDOW_STEPS) * self.batch_samples
        rows = self._stream(first, last)
        rows = rows[np.argsort(-self.lengths[rows], kind="stable")]
        batches = np.split(rows, len(rows) // self.batch_samples)
        order = np.random.default_rng([self.seed, 1, window]).permutation(len(batches))
        return [batches[index] for index in order]

    def _stream(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Entries first..last of the endless row sequence: permutation of epoch 0, of epoch 1, …"""
        count = len(self.lengths)
        epochs = range(first // count, (last - 1) // count + 1)
        parts = [np.random.default_rng([self.seed, 0, epoch]).permutation(count) for epoch in epochs]
        offset = epochs.start * count
        return np.concatenate(parts)[first - offset : last - offset]


def steps_of(rows: int, batch_samples: int, epochs: float | None, steps: int | None) -> int:
    """Optimiser steps of a stage that gives either `epochs` or `steps`."""
    if steps is not None:
        return steps
    assert epochs is not None
    return max(1, math.ceil(epochs * rows / batch_samples))


@dataclass(frozen=True)
class Batch:
    """One worker's share of a step. `selected_N` are the flat positions b · T + t whose hidden states the head reads.

    `weights`: of the global batch's total response tokens, so that shares add up; see `collate`.
    """

    input_ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    clips: Clips
    selected_N: torch.Tensor
    targets: ResponseTargets
    packing: Packing | None

    def to(self, device: torch.device) -> "Batch":
        """The batch with what the step computes with on the device; the model itself moves pictures and packing."""
        if device.type == "cpu":
            return self
        targets = self.targets
        moved = ResponseTargets(
            targets.label_ids_N.to(device),
            targets.ce_weights_N.to(device),
            targets.kl_weights_N.to(device),
            None if targets.sparse is None else SparseTargetTensors(*(part.to(device) for part in targets.sparse)),
        )
        ids_BT, mask_BT = self.input_ids_BT.to(device), self.mask_BT.to(device)
        return Batch(ids_BT, mask_BT, self.clips, self.selected_N.to(device), moved, self.packing)


def collate(rows: Sequence[TrainingRow], pictures: Pictures, pad_id: int, ce_weight: float, kl_weight: float) -> Batch:
    """Right-padded tensors of rows. A response position weighs `ce_weight` if its answer is ground truth, else 0, in
    cross-entropy, and `kl_weight` in KL; positions that weigh nothing are not selected."""
    length = max(len(row) for row in rows)
    ids_BT = np.full((len(rows), length), pad_id, np.int64)
    mask_BT = np.zeros((len(rows), length), np.int64)
    for index, row in enumerate(rows):
        ids_BT[index, : len(row)] = row.input_ids
        mask_BT[index, : len(row)] = 1
    keep = [
        np.ones(len(row.positions_n), np.bool_) if kl_weight > 0 else row.is_truth_n & (ce_weight > 0) for row in rows
    ]
    flat = [
        index * length + row.positions_n[kept] - 1 for index, (row, kept) in enumerate(zip(rows, keep, strict=True))
    ]
    truth_N = np.concatenate([row.is_truth_n[kept] for row, kept in zip(rows, keep, strict=True)])
    labels_N = np.concatenate([row.label_ids_n[kept] for row, kept in zip(rows, keep, strict=True)])
    targets = ResponseTargets(
        torch.from_numpy(labels_N.astype(np.int64)),
        torch.from_numpy(truth_N.astype(np.float32)) * ce_weight,
        torch.full((len(labels_N),), kl_weight, dtype=torch.float32),
        _sparse(rows) if kl_weight > 0 else None,
    )
    clips = pictures.load([row.content_hash for row in rows])
    selected_N = torch.from_numpy(np.concatenate(flat).astype(np.int64))
    packing = pack([row.starts for row in rows], length)
    return Batch(torch.from_numpy(ids_BT), torch.from_numpy(mask_BT), clips, selected_N, targets, packing)


def _sparse(rows: Sequence[TrainingRow]) -> SparseTargetTensors:
    stored = [row.targets for row in rows if row.targets is not None]
    assert len(stored) == len(rows), "a KL term needs the teacher's targets in every row"
    return sparse_tensors(stored)


def sparse_tensors(stored: Sequence[SparseTargets]) -> SparseTargetTensors:
    """The targets of all positions, one after another."""
    return SparseTargetTensors(
        torch.from_numpy(np.concatenate([targets.head_ids_nK for targets in stored]).astype(np.int64)),
        torch.from_numpy(np.concatenate([targets.head_logprobs_nK for targets in stored])),
        torch.from_numpy(np.concatenate([targets.tail_mass_n for targets in stored])),
        torch.from_numpy(np.concatenate([targets.tail_ids_nS for targets in stored]).astype(np.int64)),
        torch.from_numpy(np.concatenate([targets.tail_logprobs_nS for targets in stored])),
    )
