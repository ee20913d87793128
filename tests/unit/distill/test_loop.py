"""Stages that cannot be trained are refused by name before their first step."""

import pytest

from sparsight.distill.loop import StageTrainer
from sparsight.distill.pictures import PixelPictures
from sparsight.errors import ConfigError
from tests.parity.training_case import STAGE, dense_student, samples, training_rows


def test_groups_without_weights_are_refused() -> None:
    student = dense_student()
    stage = STAGE.model_copy(update={"trainable": ["routers"]})
    pictures = PixelPictures(samples(), student.pixels, 10**6, 10**6)
    with pytest.raises(ConfigError, match="stage 'mimic': the student has no weights in the groups routers"):
        StageTrainer(student, stage, training_rows(student), pictures, seed=0)
