"""Models around real language weights: the same text in, the same logits out; layers chosen; ChatML with pictures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from sparsight.config import ArchitectureConfig, TextBaseConfig, UpcycleConfig
from sparsight.errors import CheckpointError, ConfigError
from sparsight.model.text_base import SMOLLM2_PACKAGE, load_text_base, make_model, text_base_digest
from sparsight.model.tiny import make_tokenizer as make_tiny_tokenizer
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import Turn
from tests.unit.model.llama_file import TEXT, make_llama, make_tokenizer, write_gguf


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def llama(tokenizer: Any, request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return make_llama(tokenizer, tied=request.param)


@pytest.fixture(scope="module", params=["gguf", "directory"])
def weights(
    llama: LlamaForCausalLM, tokenizer: Any, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Where the same language model lies, in both forms that are read."""
    path = tmp_path_factory.mktemp("weights")
    if request.param == "gguf":
        write_gguf(path / "model.gguf", llama, tokenizer)
        return str(path / "model.gguf")
    llama.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def architecture(weights: str, layers: list[int] | None = None) -> ArchitectureConfig:
    return ArchitectureConfig(
        picture_pixels=32, tower_layers=1, tower_width=32, tower_heads=1,
        text_base=TextBaseConfig(weights=weights, layers=layers),
    )  # fmt: skip


def not_called() -> Any:
    raise AssertionError("a text base brings its own tokenizer")


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def test_text_alone_has_the_language_models_logits(weights: str, llama: LlamaForCausalLM, tokenizer: Any) -> None:
    model = make_model(architecture(weights), not_called, seed=0)
    ids = tokenizer(TEXT)["input_ids"]
    assert model.chat.tokenizer(TEXT, add_special_tokens=False)["input_ids"] == ids
    expected = logits_of(llama, ids)
    found = logits_of(model.model, ids)
    torch.testing.assert_close(found[:, : expected.shape[1]], expected, atol=1e-5, rtol=1e-5)
    new = found[:, expected.shape[1] :]
    assert new.shape[1] == 2
    torch.testing.assert_close(new, expected.mean(dim=1, keepdim=True).expand_as(new), atol=1e-5, rtol=1e-5)


def test_chosen_layers_are_kept_in_order(weights: str, llama: LlamaForCausalLM, tokenizer: Any) -> None:
    model = make_model(architecture(weights, [2, 0]), not_called, seed=0)
    ids = tokenizer(TEXT)["input_ids"]
    whole = llama.model.layers
    try:
        llama.model.layers = nn.ModuleList([whole[2], whole[0]])
        llama.config.num_hidden_layers = 2
        with torch.no_grad():
            expected = llama(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        llama.model.layers = whole
        llama.config.num_hidden_layers = 3
    torch.testing.assert_close(logits_of(model.model, ids)[:, : expected.shape[1]], expected, atol=1e-5, rtol=1e-5)


def test_a_saved_model_is_the_same_and_becomes_a_mixtral(weights: str, tmp_path: Path) -> None:
    dense = make_model(architecture(weights), not_called, seed=0)
    dense.save(tmp_path)
    again = VisionLanguageModel.load(tmp_path)
    assert again.chat.tokenizer_fingerprint == dense.chat.tokenizer_fingerprint
    assert again.chat.prompt_fingerprint == dense.chat.prompt_fingerprint
    encoded = again.chat.encode([Turn("what is in the picture?", "a red circle")], again.visual_tokens())
    pixels = torch.randn(1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    sparse = upcycle(again, UpcycleConfig(experts=4, active_experts=2, layers="all"), seed=0)
    assert sparse.model.config.text_config.model_type == "mixtral"
    with torch.no_grad():
        expected, *others = (
            model.model(input_ids=torch.tensor([encoded.input_ids]), pixel_values_videos=pixels).logits
            for model in (dense, again, sparse)
        )
    for logits in others:
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_conversation_is_chatml(weights: str) -> None:
    chat = make_model(architecture(weights), not_called, seed=0).chat
    turns = [Turn("What is this?", "a circle"), Turn("Its <video> colour <|im_end|>?", "red")]
    encoded = chat.encode(turns, 3)
    text = chat.tokenizer.decode(encoded.input_ids)
    assert text == (
        "<|im_start|>user\n<video><video><video>What is this?<|im_end|>\n<|im_start|>assistant\na circle<|im_end|>\n"
        "<|im_start|>user\nIts < video> colour < |im_end|>?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    )
    answers = [chat.tokenizer.decode(encoded.input_ids[start:end]) for start, end in encoded.answer_spans]
    assert answers == ["a circle<|im_end|>", "red<|im_end|>"]
    assert encoded.input_ids[: len(chat.turn_prompts(turns, 3)[0])] == chat.turn_prompts(turns, 3)[0]
    assert chat.pad_id != chat.end_id
    system = chat.prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}])
    assert chat.tokenizer.decode(system) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_equal_seeds_give_equal_models(weights: str) -> None:
    first, again, other = (make_model(architecture(weights), not_called, seed).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    differ = {name for name in first if not torch.equal(first[name], other[name])}
    assert any("projector" in name for name in differ)
    assert not any("language_model" in name for name in differ)


def test_the_digest_is_of_the_content(weights: str, llama: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    assert text_base_digest(ArchitectureConfig()) == {}
    assert text_base_digest(architecture(weights)) == text_base_digest(architecture(weights, [0]))
    write_gguf(tmp_path / "model.gguf", llama, tokenizer)
    before = text_base_digest(architecture(str(tmp_path / "model.gguf")))
    write_gguf(tmp_path / "model.gguf", llama, tokenizer, quantised="q_proj.weight")
    assert text_base_digest(architecture(str(tmp_path / "model.gguf"))) != before


def test_the_digest_of_a_directory_is_of_its_files(llama: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before = text_base_digest(architecture(str(tmp_path)))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/lock").touch()
    assert text_base_digest(architecture(str(tmp_path))) == before
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert text_base_digest(architecture(str(tmp_path))) != before


def test_what_cannot_be_used_is_refused(weights: str, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layers 0 to 2"):
        load_text_base(TextBaseConfig(weights=weights, layers=[3]))
    with pytest.raises(CheckpointError, match="not there"):
        load_text_base(TextBaseConfig(weights=str(tmp_path / "none")))
    with pytest.raises(CheckpointError, match="causal language model"):
        load_text_base(TextBaseConfig(weights=str(tmp_path)))
    llama.save_pretrained(tmp_path)
    make_tiny_tokenizer(["a red circle"] * 20, 300).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="ChatML"):
        load_text_base(TextBaseConfig(weights=str(tmp_path)))


def test_the_version_that_is_asked_for_is_the_one_that_is_tested() -> None:
    constraints = Path(__file__).parents[3] / "constraints.txt"
    assert SMOLLM2_PACKAGE in constraints.read_text().splitlines()
