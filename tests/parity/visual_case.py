"""A small training problem with a random teacher of pictures: several pictures in every third sample, if asked for.

Shared by the parity tests of terms at pictures.
"""

from dataclasses import replace

import numpy as np

from sparsight.config import StageConfig, TermsConfig
from sparsight.distill.loop import StageTrainer
from sparsight.distill.pictures import PixelPictures
from sparsight.distill.rows import RowMaker
from sparsight.distill.taught import StoredSide
from sparsight.records import Sample
from tests.parity.training_case import (
    Signals,
    dense_student,
    random_visual_signal,
    samples,
    sparse_student,
    training_rows,
)

TEACHER_LAYERS = 4


def stage(terms: TermsConfig, **settings: object) -> StageConfig:
    values = {"name": "dft", "terms": terms, "steps": 6, "batch_samples": 6, "learning_rate": 3e-3}
    return StageConfig.model_validate(values | settings)


def case(settings: StageConfig, clips: int = 1, sparse: bool = False) -> StageTrainer:
    """A trainer over samples of which every third shows `clips` pictures, with a random teacher."""
    student = sparse_student() if sparse else dense_student()
    shown = [several(sample, clips) if index % 3 == 0 else sample for index, sample in enumerate(samples())]
    maker = RowMaker(student.chat, student.visual_tokens, student.head_VD.shape[0])
    taught = {row.id: row for row in training_rows(student)}
    rows = [
        replace(row, targets=taught[row.id].targets, is_truth_n=taught[row.id].is_truth_n)
        for row in maker.answered(shown)
    ]
    signals = Signals()
    random = np.random.default_rng(3)
    for row in rows:
        N = int((row.input_ids == student.chat.visual_id).sum())
        signals[row.id] = random_visual_signal(random, N, maker.vocabulary, TEACHER_LAYERS)
    pictures = PixelPictures(shown, student.pixels, 10**6, 10**6)
    return StageTrainer(student, settings, rows, pictures, seed=5, side=StoredSide(signals))


def several(sample: Sample, frames: int) -> Sample:
    return replace(sample, frames=sample.frames * frames, frame_times_s=tuple(map(float, range(frames))))
