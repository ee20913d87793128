"""A name for the vision tower of a model directory: equal where equal pictures become equal features.

Signals about pictures only mean something to a student that sees the same positions, so they carry the name of the
tower that they were made with; tables of features carry it too. Read from the files alone, the tower's own tensors, so
a teacher of any size is named without being loaded. Called by labelling, distillation and the feature pipeline.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sparsight.errors import CheckpointError
from sparsight.media.pixels import PROCESSOR_FILE

_MARKS = ("vision_tower.", "visual.", "vision_model.")
"""Where the tower's part of a tensor's name begins, outermost first."""


def tower_fingerprint(directory: Path) -> str:
    """A digest of the tower's weights (as float32), its settings and how pictures are prepared for it.

    Raises `CheckpointError` where the directory has no readable weights of a tower.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(_settings(directory), sort_keys=True).encode())
    names = 0
    for name, tensor in _tower_tensors(directory):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.to(torch.float32).contiguous().numpy().tobytes())
        names += 1
    if names == 0:
        raise CheckpointError(f"'{directory}' holds no weights of a vision tower: its pictures cannot be compared")
    return digest.hexdigest()


def _tower_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tower's tensors by their names inside it, in order of these."""
    places: dict[str, tuple[Path, str]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                keys: list[str] = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read '{path}': {error}") from error
        places |= {_inside(key): (path, key) for key in keys if _inside(key)}
    for name, (path, key) in sorted(places.items()):
        with safe_open(path, framework="pt") as file:
            yield name, file.get_tensor(key)


def _inside(key: str) -> str:
    """A tensor's name within the tower, however the checkpoint nests it; empty for tensors of other parts."""
    for mark in _MARKS:
        before, found, name = key.partition(mark)
        if found and (not before or before.endswith(".")):
            return name.removeprefix("vision_model.")
    return ""


def _settings(directory: Path) -> dict[str, Any]:
    """What else decides what a tower sees: its layer that is read, and how pixels are scaled."""
    found: dict[str, Any] = {}
    config = _json(directory / "config.json")
    vision = config.get("vision_config", {})
    found["layer"] = config.get("vision_feature_layer")
    found["sizes"] = [vision.get(key) for key in ("image_size", "patch_size", "num_attention_heads", "hidden_act")]
    found["pixels"] = _pixels(directory)
    return found


def _pixels(directory: Path) -> list[Any]:
    """Side, mean and deviation of prepared pictures, from whichever file the checkpoint has them in."""
    processor = _json(directory / "processor_config.json")
    places = [_json(directory / PROCESSOR_FILE), processor.get("video_processor", {})]
    places += [_json(directory / "preprocessor_config.json"), processor.get("image_processor", {})]
    values = next((place for place in places if "image_mean" in place), {})
    size = values.get("size", {})
    sides = [size.get(key) for key in ("height", "shortest_edge", "max_pixels")] if isinstance(size, dict) else [size]
    return [next((side for side in sides if side is not None), None), values.get("image_mean"), values.get("image_std")]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
