"""An exported student against itself: layout, plain transformers, damage that must be noticed, and vLLM where it is."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsight.config import ArchitectureConfig, UpcycleConfig
from sparsight.errors import ExportError
from sparsight.model.export import (
    TOLERANCE,
    largest_difference,
    probe_logprobs,
    stock_logprobs,
    verify_transformers,
    write_export,
)
from sparsight.model.export_vllm import NOT_INSTALLED, verify_vllm
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel

SMALL = ArchitectureConfig(
    tower_layers=2,
    tower_width=64,
    tower_heads=2,
    text_layers=2,
    text_width=64,
    text_heads=2,
    text_key_value_heads=1,
    text_intermediate=96,
)


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    tokenizer = make_tokenizer(["what shape is in the image?", "is there a red circle?"] * 20, 400)
    student = upcycle(make_dense(SMALL, tokenizer, seed=0), UpcycleConfig(experts=4, layers=[0]), seed=1)
    with torch.no_grad():  # experts of a fresh student are equal: mixing them up would go unnoticed
        for name, weight in student.model.named_parameters():
            if ".experts." in name:
                weight.add_(torch.randn_like(weight) * 0.05)
    return student


@pytest.fixture
def exported(model: VisionLanguageModel, tmp_path: Path) -> Path:
    write_export(model, tmp_path / "export")
    return tmp_path / "export"


def damage(exported: Path, key: str, replacement: torch.Tensor | None) -> None:
    weights = load_file(exported / "model.safetensors")
    weight = weights.pop(key)
    if replacement is not None:
        weights[key] = replacement.expand_as(weight).contiguous()
    save_file(weights, exported / "model.safetensors", metadata={"format": "pt"})


def test_the_export_gives_the_same_numbers_in_plain_transformers(model: VisionLanguageModel, exported: Path) -> None:
    assert verify_transformers(model, exported) <= TOLERANCE
    again = VisionLanguageModel.load(exported)
    assert largest_difference(probe_logprobs(model), probe_logprobs(again)) <= TOLERANCE


def test_the_probes_see_the_picture(model: VisionLanguageModel, exported: Path) -> None:
    blind = VisionLanguageModel.load(exported)
    with torch.no_grad():
        blind.model.model.multi_modal_projector.linear_2.weight.zero_()
    assert largest_difference(probe_logprobs(model), probe_logprobs(blind)) > 10 * TOLERANCE


def test_the_layout_is_the_hubs(exported: Path) -> None:
    keys = set(load_file(exported / "model.safetensors"))
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in keys
    assert "language_model.model.layers.0.mlp.experts.3.down_proj.weight" in keys
    assert not [key for key in keys if key.startswith("vision_tower.") and ".vision_model." not in key]
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["LlavaOnevisionForConditionalGeneration"]
    assert config["text_config"]["architectures"] == ["Qwen3MoeForCausalLM"]
    files = {path.name for path in exported.iterdir()}
    assert files >= {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "processor_config.json",
    }
    processor = json.loads((exported / "processor_config.json").read_text())
    assert processor["num_image_tokens"] == (SMALL.picture_pixels // SMALL.patch_pixels) ** 2
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["text_config"]["eos_token_id"]


def test_a_changed_weight_is_noticed(model: VisionLanguageModel, exported: Path) -> None:
    damage(exported, "language_model.model.layers.0.mlp.experts.2.down_proj.weight", torch.zeros(1))
    with pytest.raises(ExportError, match="same numbers"):
        verify_transformers(model, exported)


def test_a_weight_that_is_not_a_number_is_noticed(model: VisionLanguageModel, exported: Path) -> None:
    damage(exported, "language_model.model.norm.weight", torch.tensor([torch.nan]))
    with pytest.raises(ExportError, match="same numbers"):
        verify_transformers(model, exported)


def test_a_missing_weight_is_noticed(model: VisionLanguageModel, exported: Path) -> None:
    damage(exported, "multi_modal_projector.linear_1.bias", None)
    with pytest.raises(ExportError, match="missing_keys"):
        stock_logprobs(exported, model)


def test_another_chat_template_is_noticed(model: VisionLanguageModel, exported: Path) -> None:
    (exported / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(ExportError, match="chat template"):
        verify_transformers(model, exported)


def test_vllm_gives_the_same_numbers_where_it_is_installed(model: VisionLanguageModel, exported: Path) -> None:
    verdict = verify_vllm(model, exported)
    if importlib.util.find_spec("vllm") is None:
        assert verdict == NOT_INSTALLED
    else:
        assert verdict.startswith(("equal", "installed, but not usable here"))
