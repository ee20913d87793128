"""Stored features stand for the pictures they were computed from, and training from either is the same."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsight.distill.loop import StageTrainer
from sparsight.distill.pictures import FeaturePictures, PixelPictures, in_groups, write_features
from sparsight.errors import ConfigError, DataError
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import Sample, Turn
from sparsight.storage import LocalStorage, Storage, open_storage
from tests.parity.training_case import STAGE, samples, sparse_student, training_rows


def pixels_of(rows: list[Sample], model: VisionLanguageModel) -> PixelPictures:
    return PixelPictures(rows, model.pixels, 10**6, 10**6)


def store(storage: Storage, rows: list[Sample], model: VisionLanguageModel) -> FeaturePictures:
    pictures = pixels_of(rows, model)
    done = write_features(storage, pictures, in_groups(pictures.content_hashes, 3), model.features)
    assert sum(done) == len(pictures.content_hashes)
    return FeaturePictures(storage)


def test_features_come_back_in_the_order_asked_for(student: VisionLanguageModel, storage_uri: str) -> None:
    rows = samples(8)
    clip = Sample("clip", rows[0].frames + rows[1].frames, (), "test", (0.0, 1.0))
    rows.append(clip)
    stored = store(open_storage(storage_uri), rows, student)
    asked = [rows[5].content_hash, clip.content_hash, rows[2].content_hash]
    clips, pixels = stored.load(asked), pixels_of(rows, student).load(asked)
    assert clips.frames == pixels.frames == [1, 2, 1]
    torch.testing.assert_close(clips.values, student.features(pixels.values), atol=2e-3, rtol=1e-3)


def test_text_alone_has_no_features(student: VisionLanguageModel, storage_uri: str) -> None:
    """Between pictures, in a file of its own (three clips each), and where nothing else is asked for."""
    pictured, texts = samples(4), [replace(row, frames=(), frame_times_s=()) for row in samples(4)]
    texts = [replace(row, turns=(Turn(f"{number}?", "yes"),)) for number, row in enumerate(texts)]
    rows = [pictured[0], texts[0], pictured[1], *texts[1:], pictured[2], pictured[3]]
    stored, pixels = store(open_storage(storage_uri), rows, student), pixels_of(rows, student)
    asked = [rows[index].content_hash for index in (4, 6, 1, 0, 3)]
    for pictures in (stored, pixels):
        clips = pictures.load(asked)
        assert (clips.frames, len(clips.values)) == ([0, 1, 0, 1, 0], 2)
        nothing = pictures.load(asked[2:3] * 2)
        assert (nothing.frames, len(nothing.values)) == ([0, 0], 0)
    seen_NPD = student.features(pixels.load(asked).values)
    torch.testing.assert_close(stored.load(asked).values, seen_NPD, atol=2e-3, rtol=1e-3)


def test_training_from_features_equals_training_from_pixels(tmp_path: Path) -> None:
    losses: list[list[float]] = []
    for kind in ("pixels", "features"):
        student = sparse_student()
        pixels = pixels_of(samples(), student)
        pictures = store(LocalStorage(tmp_path), samples(), student) if kind == "features" else pixels
        trainer = StageTrainer(student, STAGE, training_rows(student), pictures, seed=0)
        losses.append([trainer.train_step()["loss"] for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_stage_that_trains_the_tower_takes_pixels_only(tmp_path: Path) -> None:
    stage = STAGE.model_copy(update={"trainable": ["tower", "projector"]})
    student = sparse_student()
    stored = store(LocalStorage(tmp_path), samples(), student)
    with pytest.raises(ConfigError, match="trains the tower"):
        StageTrainer(student, stage, training_rows(student), stored, seed=0).train_step()
    trainer = StageTrainer(student, stage, training_rows(student), pixels_of(samples(), student), seed=0)
    before = [value.detach().clone() for value in student.model.model.vision_tower.parameters()]
    trainer.train_step()
    after = list(student.model.model.vision_tower.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_a_picture_that_is_not_there_is_named(student: VisionLanguageModel, tmp_path: Path) -> None:
    stored = store(LocalStorage(tmp_path), samples(2), student)
    with pytest.raises(DataError, match="no features of picture 0123"):
        stored.load(["0123"])


def test_features_too_large_for_half_precision_are_refused(student: VisionLanguageModel, tmp_path: Path) -> None:
    pictures = pixels_of(samples(1), student)
    writing = write_features(
        LocalStorage(tmp_path), pictures, [pictures.content_hashes], lambda pixels: torch.full((1, 16, 32), 1e6)
    )
    with pytest.raises(DataError, match="precompute_features"):
        list(writing)
    assert not (tmp_path / "index.parquet").exists()
