"""The training problem of `training_case` with half of its rows text alone: importable in spawned processes."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sparsight.config import StageConfig
from sparsight.distill.loop import StageTrainer
from sparsight.distill.pictures import PixelPictures
from sparsight.distill.rows import RowMaker
from sparsight.distill.taught import StoredSide
from sparsight.records import Sample, Turn
from tests.parity.training_case import STAGE, Signals, random_targets, random_visual_signal, samples, sparse_student

MIXED = STAGE.model_copy(update={"batch_samples": 2, "steps": 10})
TEACHER_LAYERS = 3


def mixed_samples() -> list[Sample]:
    """Every second one without its picture, each of these with a question of its own."""
    rows = samples()
    for index in range(0, len(rows), 2):
        first, *rest = rows[index].turns
        turns = (Turn(f"what is in the image {index}?", first.answer), *rest)
        rows[index] = replace(rows[index], frames=(), frame_times_s=(), turns=turns)
    return rows


def mixed_trainer(settings: StageConfig = MIXED, rows: Sequence[Sample] | None = None) -> StageTrainer:
    """A sparse student and a random teacher that says nothing of pictures that are not there."""
    student, shown = sparse_student(), mixed_samples() if rows is None else rows
    maker, random = RowMaker(student.chat, student.visual_tokens, student.head_VD.shape[0]), np.random.default_rng(3)
    taught, signals = maker.answered(shown), Signals()
    for index, row in enumerate(taught):
        taught[index] = replace(row, targets=random_targets(random, len(row.positions_n), maker.vocabulary))
        N = int((row.input_ids == student.chat.visual_id).sum())
        signals[row.id] = random_visual_signal(random, N, maker.vocabulary, TEACHER_LAYERS)
    pictures = PixelPictures(shown, student.pixels, 10**6, 10**6)
    return StageTrainer(student, settings, taught, pictures, seed=5, side=StoredSide(signals))


def text_alone(trained: StageTrainer, numbers: Sequence[int]) -> list[bool]:
    """Which of these rows show no picture."""
    pictures = trained.pictures
    return [pictures.load([trained.rows[number].content_hash]).frames == [0] for number in numbers]
