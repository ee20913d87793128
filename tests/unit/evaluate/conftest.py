"""A small sparse model and pictures with questions, shared by the evaluation tests."""

import pytest
import torch

from sparsight.config import ArchitectureConfig, ScenesSource, UpcycleConfig
from sparsight.data.scene_questions import scene_samples
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import Sample

SMALL = ArchitectureConfig(
    tower_layers=1,
    tower_width=32,
    tower_heads=1,
    text_layers=2,
    text_width=64,
    text_heads=2,
    text_key_value_heads=1,
    text_intermediate=96,
)


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """Nine pictures, some cut into two samples."""
    source = ScenesSource(kind="scenes", pictures=9)
    return list(scene_samples(source, "train", seed=0, turns_per_sample=4))


@pytest.fixture(scope="session")
def model(samples: list[Sample]) -> VisionLanguageModel:
    texts = [f"{turn.question} {turn.answer}" for sample in samples for turn in sample.turns]
    dense = make_dense(SMALL, make_tokenizer(texts, 400), seed=0)
    with torch.no_grad():  # a fresh model repeats its last token: let what the layers compute decide
        for name, weight in dense.text_model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(40.0)
    return upcycle(dense, UpcycleConfig(experts=4, active_experts=2, layers=[0]), seed=1)
