"""Every stage of the presets moves all weights that it names, and no other, and leaves a stock model."""

from pathlib import Path

import pytest

from sparsight.distill.loop import StageTrainer
from sparsight.distill.pictures import PixelPictures
from sparsight.model.export import verify_transformers
from sparsight.model.parameters import group_of
from sparsight.stages import StageConfig, StudentRun
from tests.parity.preference_case import PAIRS, pair_rows
from tests.parity.training_case import dense_student, samples, sparse_student, training_rows, weights
from tests.parity.visual_case import case

KD_MOVES = {
    "dpt": {"projector"},
    "sft": {"projector", "embeddings", "attention", "experts"},
    "dft": {"projector", "embeddings", "attention", "experts"},
}
KD_OVERLAYS = [{"name": name, "steps": 2, "batch_samples": 6, "learning_rate": 1e-2} for name in KD_MOVES]
KD_STAGES = StudentRun.model_validate({"name": "student", "preset": "llava_kd", "stages": KD_OVERLAYS}).stages
OVERLAYS = [
    {"name": name, "steps": 2, "batch_samples": 6, "learning_rate": 1e-2}
    for name in ("adaptor", "d2d", "d2s", "preference")
]
STAGES = StudentRun.model_validate({"name": "student", "preset": "llava_mod", "stages": OVERLAYS}).stages
MOVES = {
    "adaptor": {"projector"},
    "d2d": {"projector", "embeddings", "attention", "experts"},
    "d2s": {"projector", "experts", "routers"},
    "preference": {"projector", "experts", "routers"},
}


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_moves_what_it_names_and_loads_in_plain_transformers(stage: StageConfig, tmp_path: Path) -> None:
    student = sparse_student() if stage.name in ("d2s", "preference") else dense_student()
    rows = pair_rows(student) if stage.rows == "pairs" else training_rows(student)
    pictures = PixelPictures(samples(PAIRS), student.pixels, 10**6, 10**6)
    trainer = StageTrainer(student, stage, rows, pictures, seed=0)
    before = weights(trainer)
    for _ in range(trainer.total_steps):  # newly copied experts are alike: their routers move once they differ
        trainer.train_step()
    moved = {name for name, value in weights(trainer).items() if not value.equal(before[name])}
    assert moved == {name for name in before if group_of(name) in MOVES[stage.name]}
    student.model.eval()
    student.save(tmp_path)
    assert verify_transformers(student, tmp_path) <= 1e-5


@pytest.mark.parametrize("stage", KD_STAGES, ids=lambda stage: stage.name)
def test_a_stage_of_llava_kd_moves_what_it_names_and_loads_in_plain_transformers(
    stage: StageConfig, tmp_path: Path
) -> None:
    trainer = case(stage)
    before = weights(trainer)
    for _ in range(trainer.total_steps):
        trainer.train_step()
    moved = {name for name, value in weights(trainer).items() if not value.equal(before[name])}
    assert moved == {name for name in before if group_of(name) in KD_MOVES[stage.name]}
    trainer.student.model.eval()
    trainer.student.save(tmp_path)
    assert verify_transformers(trainer.student, tmp_path) <= 1e-5
