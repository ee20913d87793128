"""Pictures to the tensor a vision tower reads: resize, scale, normalise, as the checkpoint's processor file says.

Decoding is elsewhere (`images.py`); nothing here trusts or touches encoded bytes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sparsight.errors import CheckpointError

PROCESSOR_FILE = "video_preprocessor_config.json"


@dataclass(frozen=True)
class PixelSettings:
    """Side of the square picture in pixels, and per-channel mean and standard deviation of values in [0, 1]."""

    side: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @staticmethod
    def read(directory: Path) -> "PixelSettings":
        """From a checkpoint's processor file. Raises `CheckpointError` if it is missing or incomplete."""
        path = directory / PROCESSOR_FILE
        try:
            values = json.loads(path.read_text())
            size = values["size"]
            mean, std = values["image_mean"], values["image_std"]
            return PixelSettings(int(size["height"]), tuple(mean), tuple(std))
        except (OSError, KeyError, json.JSONDecodeError) as error:
            raise CheckpointError(f"'{path}' does not say how pictures are prepared: {error}") from error


def to_pixels(pictures: Sequence[Image.Image], settings: PixelSettings) -> torch.Tensor:
    """RGB pictures of any size → float32 [F, 3, side, side]."""
    side = settings.side
    if not pictures:
        return torch.zeros(0, 3, side, side)
    resized = [
        picture if picture.size == (side, side) else picture.resize((side, side), Image.Resampling.BICUBIC)
        for picture in pictures
    ]
    array_FHWC = np.stack([np.asarray(picture, dtype=np.float32) for picture in resized]) / 255.0
    mean, std = np.asarray(settings.mean, np.float32), np.asarray(settings.std, np.float32)
    normal_FHWC = (array_FHWC - mean) / std
    return torch.from_numpy(np.ascontiguousarray(normal_FHWC.transpose(0, 3, 1, 2)))
