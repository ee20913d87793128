"""A tiny random model for the service's plain classes, and pictures as clients send them."""

import base64
from collections.abc import Callable
from io import BytesIO

import pytest
import torch
from PIL import Image

from sparsight.config import ArchitectureConfig
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.vision_language import VisionLanguageModel

SMALL = ArchitectureConfig(
    tower_layers=1,
    tower_width=32,
    tower_heads=1,
    text_layers=2,
    text_width=64,
    text_heads=2,
    text_key_value_heads=1,
    text_intermediate=96,
    max_positions=512,
)


@pytest.fixture(scope="session")
def model() -> VisionLanguageModel:
    tokenizer = make_tokenizer(["what shape is in the image?", "is there a red circle?"] * 20, 400)
    model = make_dense(SMALL, tokenizer, seed=0)
    with torch.no_grad():  # so that pictures and words matter to what a random model says
        for layer in model.text_model.layers:
            layer.self_attn.v_proj.weight.mul_(8)
    return model


def picture(seed: int) -> Image.Image:
    """Noise, different for every seed."""
    noise_HWC = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise_HWC.numpy())


@pytest.fixture(scope="session")
def data_uri() -> Callable[[int], str]:
    """A picture of a seed as a data: URI."""

    def make(seed: int) -> str:
        buffer = BytesIO()
        picture(seed).save(buffer, format="PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

    return make
