"""A tiny random teacher directory, and samples with pictures."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparsight.config import ArchitectureConfig
from sparsight.media.images import encode_png
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.records import Sample, Turn

QUESTIONS = ("what colour is the shape?", "is there a circle?", "how many squares are there?", "which shape is it?")
ANSWERS = ("red", "yes", "two", "a big blue triangle")
ARCHITECTURE = ArchitectureConfig(
    picture_pixels=32, tower_width=32, tower_layers=1, tower_heads=2, text_width=64, text_layers=2, text_heads=2
)


@pytest.fixture(scope="session")
def teacher_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, but only whole words and the end of a turn are likely, so what it writes is proper text."""
    directory = tmp_path_factory.mktemp("teacher")
    tokenizer = make_tokenizer([*QUESTIONS, *ANSWERS] * 4, 400)
    model = make_dense(ARCHITECTURE, tokenizer, seed=0)
    words = {word.strip("?") for text in (*QUESTIONS, *ANSWERS) for word in text.split()}
    likely = [token for token in tokenizer.convert_tokens_to_ids([f"\u0120{word}" for word in words]) if token]
    scale_V = torch.full((len(tokenizer),), 0.1)
    scale_V[[*likely, model.chat.end_id]] = 40.0
    with torch.no_grad():
        model.head_VD.mul_(scale_V[:, None])
    model.save(directory)
    return directory


def make_sample(number: int, turns: int, answered: bool = True, frames: int = 1) -> Sample:
    """A picture of noise with `turns` questions."""
    noise = np.random.default_rng(number)
    pictures = [encode_png(Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8))) for _ in range(frames)]
    asked = [(number + turn) % len(QUESTIONS) for turn in range(turns)]
    return Sample(
        id=f"row-{number:04d}",
        frames=tuple(pictures),
        turns=tuple(Turn(QUESTIONS[index], ANSWERS[index] if answered else None) for index in asked),
        source="noise",
        frame_times_s=tuple(float(time) for time in range(frames)),
    )


@pytest.fixture(scope="session")
def new_sample() -> Callable[..., Sample]:
    return make_sample
