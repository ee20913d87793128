"""A tower's name follows its weights and how pictures reach it, and nothing else of the directory."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsight.config import ArchitectureConfig
from sparsight.errors import CheckpointError
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.tower_fingerprint import tower_fingerprint
from sparsight.model.vision_language import VisionLanguageModel

SMALL = ArchitectureConfig(
    picture_pixels=32, tower_layers=1, tower_width=32, tower_heads=1, text_layers=1, text_width=32, text_heads=1
)


@pytest.fixture
def model() -> VisionLanguageModel:
    return make_dense(SMALL, make_tokenizer(["is there a red circle?"] * 20, 300), seed=0)


@pytest.fixture
def saved(model: VisionLanguageModel, tmp_path: Path) -> Callable[[str], Path]:
    def save(name: str) -> Path:
        model.save(tmp_path / name)
        return tmp_path / name

    return save


def test_other_text_models_share_the_name_of_their_tower(
    model: VisionLanguageModel, saved: Callable[[str], Path]
) -> None:
    first = saved("first")
    with torch.no_grad():
        model.head_VD.add_(1.0)
        next(model.text_model.parameters()).add_(1.0)
    assert tower_fingerprint(saved("second")) == tower_fingerprint(first)


def test_one_weight_of_the_tower_is_another_name(model: VisionLanguageModel, saved: Callable[[str], Path]) -> None:
    first = saved("first")
    with torch.no_grad():
        next(model.model.model.vision_tower.parameters()).view(-1)[0] += 1e-3
    assert tower_fingerprint(saved("second")) != tower_fingerprint(first)


def test_pictures_that_are_prepared_otherwise_are_another_name(saved: Callable[[str], Path]) -> None:
    directory = saved("first")
    before = tower_fingerprint(directory)
    path = directory / "video_preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    assert tower_fingerprint(directory) != before


def test_how_a_checkpoint_nests_and_splits_its_tensors_does_not_matter(saved: Callable[[str], Path]) -> None:
    directory = saved("first")
    before = tower_fingerprint(directory)
    tensors = load_file(directory / "model.safetensors")
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    names = sorted(renamed)
    (directory / "model.safetensors").unlink()
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: renamed[name] for name in part}, directory / f"model-{number}.safetensors")
    assert tower_fingerprint(directory) == before


def test_a_directory_without_a_tower_is_refused(saved: Callable[[str], Path]) -> None:
    directory = saved("first")
    tensors = {
        name: value for name, value in load_file(directory / "model.safetensors").items() if "vision" not in name
    }
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no weights of a vision tower"):
        tower_fingerprint(directory)
    (directory / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot read"):
        tower_fingerprint(directory)
