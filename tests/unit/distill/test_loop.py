"""Stages that cannot be trained are refused by name before their first step."""

import pytest

from sparsight.config import TermsConfig
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


def test_retrieval_is_not_learned_from_questions_without_evidence() -> None:
    student = dense_student()
    stage = STAGE.model_copy(update={"terms": TermsConfig(cross_entropy=1.0, retrieval=1.0)})
    pictures = PixelPictures(samples(), student.pixels, 10**6, 10**6)
    with pytest.raises(ConfigError, match="stage 'mimic': no question says what frames its answer follows from"):
        StageTrainer(student, stage, training_rows(student), pictures, seed=0)
