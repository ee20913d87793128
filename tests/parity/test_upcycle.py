"""Sparse up-cycling is exact: same logits as the dense model, whatever the family, before and after saving."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from sparsight.config import UpcycleConfig
from sparsight.errors import ConfigError
from sparsight.model.routing import routers
from sparsight.model.tiny import make_tokenizer
from sparsight.model.upcycle import sparse_layers, upcycle
from sparsight.model.vision_language import VisionLanguageModel
from tests.parity.families import FAMILIES, LAYERS, dense_model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(["what is in the image?", "a red circle"] * 20, 300)


def logits_of(model: VisionLanguageModel) -> torch.Tensor:
    """Of a conversation with a picture, by the stock forward."""
    visual = [model.chat.visual_id] * model.visual_tokens()
    input_ids_BT = torch.tensor([[3, *visual, 40, 41, 42, 43, 44]])
    pixels = torch.randn(1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.model(input_ids=input_ids_BT, pixel_values_videos=pixels).logits


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("active", [1, 2, 4])
def test_logits_equal_the_dense_models(family: str, active: int, tokenizer: Any) -> None:
    dense = dense_model(family, tokenizer)
    settings = UpcycleConfig(experts=4, active_experts=active, layers=LAYERS[family])
    sparse = upcycle(dense, settings, seed=3)
    assert list(routers(sparse)) == sparse_layers(settings.layers, 4)
    torch.testing.assert_close(logits_of(sparse), logits_of(dense), atol=3e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # Qwen2-MoE's shared expert of width 0
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_saved_sparse_model_loads_whole_in_plain_transformers(family: str, tokenizer: Any, tmp_path: Path) -> None:
    sparse = upcycle(dense_model(family, tokenizer), UpcycleConfig(layers=LAYERS[family]), seed=3)
    sparse.save(tmp_path)
    loaded, info = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    again = VisionLanguageModel(loaded.eval(), sparse.chat, sparse.pixels)
    assert torch.equal(logits_of(again), logits_of(sparse))
    assert torch.equal(logits_of(VisionLanguageModel.load(tmp_path)), logits_of(sparse))


def test_equal_seeds_give_equal_routers_and_others_do_not(tokenizer: Any) -> None:
    dense = dense_model("qwen3", tokenizer)
    first, again, other = (upcycle(dense, UpcycleConfig(), seed=seed).model.state_dict() for seed in (1, 1, 2))
    gates = [name for name in first if name.endswith("mlp.gate.weight")]
    assert len(gates) == 2
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in gates)


def test_experts_are_copies_that_can_part(tokenizer: Any) -> None:
    dense = dense_model("qwen3", tokenizer)
    sparse = upcycle(dense, UpcycleConfig(layers=[1]), seed=1)
    experts = sparse.model.model.language_model.layers[1].mlp.experts.down_proj
    with torch.no_grad():
        experts[0] += 1.0
    untouched = dense.model.model.language_model.layers[1].mlp.down_proj.weight
    assert all(torch.equal(experts[expert], untouched) for expert in (1, 2, 3))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("every_second", [0, 2, 4]), ("first_half", [0, 1]), ("second_half", [2, 3, 4]), ([3, 1, 3], [1, 3])],
)
def test_layer_patterns(pattern: Any, expected: list[int]) -> None:
    assert sparse_layers(pattern, 5) == expected


def test_what_cannot_be_made_sparse_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="layers 0 to 4"):
        sparse_layers([5], 5)
    with pytest.raises(ConfigError, match="first_half of 1 text layers"):
        sparse_layers("first_half", 1)
    with pytest.raises(ConfigError, match="'all'"):
        upcycle(dense_model("llama", tokenizer), UpcycleConfig(layers=[0]), seed=0)
    sparse = upcycle(dense_model("qwen3", tokenizer), UpcycleConfig(), seed=0)
    with pytest.raises(ConfigError, match="qwen3_moe"):
        upcycle(sparse, UpcycleConfig(), seed=0)
