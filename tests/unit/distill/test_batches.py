"""Batch order and shares: every row once an epoch, the same for everyone, and padding kept small."""

import numpy as np
import pytest

from sparsight.distill.batches import BatchOrder, steps_of
from sparsight.errors import ConfigError

LENGTHS = [10 + (7 * index) % 30 for index in range(60)]


def test_an_epoch_holds_every_row_once_and_epochs_differ() -> None:
    order = BatchOrder(LENGTHS, batch_samples=5, total_steps=24, seed=3)
    first = np.concatenate([order.batch(step) for step in range(12)])
    whole = np.concatenate([order.batch(step) for step in range(24)])
    assert np.bincount(whole, minlength=60).tolist() == [2] * 60
    assert len(first) == 60


def test_any_step_can_be_asked_first() -> None:
    order = BatchOrder(LENGTHS, batch_samples=7, total_steps=40, seed=3)
    forward = [order.batch(step).tolist() for step in range(40)]
    backward = [BatchOrder(LENGTHS, 7, 40, 3).batch(step).tolist() for step in reversed(range(40))]
    assert forward == backward[::-1]
    assert forward != [BatchOrder(LENGTHS, 7, 40, 4).batch(step).tolist() for step in range(40)]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_shares_make_up_the_batch(workers: int) -> None:
    order = BatchOrder(LENGTHS, batch_samples=8, total_steps=10, seed=0)
    shares = [order.share(4, rank, workers) for rank in range(workers)]
    assert sorted(np.concatenate(shares).tolist()) == sorted(order.batch(4).tolist())
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_rows_of_one_batch_are_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(10, 200, 640).tolist()
    order = BatchOrder(lengths, batch_samples=8, total_steps=80, seed=0)
    padded = sum(8 * max(lengths[row] for row in order.batch(step)) for step in range(80))
    assert padded < 1.15 * sum(lengths)


def test_steps_come_from_epochs_or_are_given() -> None:
    assert steps_of(100, 32, epochs=None, steps=7) == 7
    assert steps_of(100, 32, epochs=1.0, steps=None) == 4
    assert steps_of(100, 32, epochs=2.5, steps=None) == 8


def test_no_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="no rows"):
        BatchOrder([], 4, 10, 0)
