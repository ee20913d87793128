"""Experts over sorted tokens against transformers' eager loop over experts: same outputs, same gradients."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, LlavaOnevisionForConditionalGeneration
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from sparsight.config import UpcycleConfig
from sparsight.model.experts import SORTED_EXPERTS, sorted_experts, use_experts
from sparsight.model.routing import routers, trace_routers
from sparsight.model.tiny import make_tokenizer
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel
from tests.parity.families import FAMILIES, LAYERS, dense_model

IDS_BT = torch.arange(60, 108).view(3, 16)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(["what is in the image?", "a red circle"] * 20, 300)


def sparse_model(family: str, tokenizer: Any, active: int = 2) -> VisionLanguageModel:
    """An up-cycled model whose experts have parted."""
    settings = UpcycleConfig(experts=4, active_experts=active, layers=LAYERS[family])
    sparse = upcycle(dense_model(family, tokenizer), settings, seed=3)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, weight in sparse.model.named_parameters():
            if ".experts." in name or name.endswith("mlp.gate.weight"):
                weight += 0.1 * torch.randn_like(weight)
    return sparse


def outputs_and_gradients(model: VisionLanguageModel, experts: str) -> dict[str, torch.Tensor]:
    use_experts(model.model, experts)
    model.model.zero_grad(set_to_none=True)
    hidden_BTD = model.hidden(IDS_BT, torch.ones_like(IDS_BT), None)
    hidden_BTD.square().mean().backward()
    gradients = {name: weight.grad for name, weight in model.text_model.named_parameters() if weight.grad is not None}
    return {"hidden": hidden_BTD.detach(), **gradients}


def assert_equal_to_the_loop(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    loop, ours = (outputs_and_gradients(model, experts) for experts in ("eager", SORTED_EXPERTS))
    assert ours.keys() == loop.keys()
    for name, expected in loop.items():
        torch.testing.assert_close(ours[name], expected, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: name + text)
    return ours


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("active", [1, 2, 4])
def test_equals_the_loop_over_experts(family: str, active: int, tokenizer: Any) -> None:
    found = assert_equal_to_the_loop(sparse_model(family, tokenizer, active))
    experts = [name for name in found if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(experts) == 2 * len(routers(sparse_model(family, tokenizer)))
    assert all(float(found[name].abs().max()) > 1e-7 for name in experts)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("idle", [[1], [0, 3]])
def test_experts_without_a_token_have_gradients_of_zero(family: str, idle: Sequence[int], tokenizer: Any) -> None:
    model = sparse_model(family, tokenizer)
    first = min(routers(model))
    embeds_VD = model.model.get_input_embeddings().weight
    with torch.no_grad():
        # The same token everywhere has the same experts everywhere; which, is written into the first router.
        embeds_VD.copy_(embeds_VD[60].clone())
        with trace_routers(model) as trace:
            model.hidden(IDS_BT, torch.ones_like(IDS_BT), None)
        gate: Any = routers(model)[first]
        order = trace.logits[first][0].argsort().tolist()
        ranked = [*idle, *(expert for expert in range(4) if expert not in idle)]
        gate.weight[ranked] = gate.weight[order].clone()
    found = assert_equal_to_the_loop(model)
    name = next(name for name in found if name.endswith(f"layers.{first}.mlp.experts.down_proj"))
    grad_EDI = found[name]
    assert all(float(grad_EDI[expert].abs().max()) == 0.0 for expert in idle)
    assert float(grad_EDI[ranked[-1]].abs().max()) > 0.0


def test_models_use_it_and_checkpoints_do_not_say_so(tokenizer: Any, tmp_path: Path) -> None:
    sparse = sparse_model("qwen3", tokenizer)
    sparse.save(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "sorted" not in text
    assert not any("experts_implementation" in key for key in json.loads(text)["text_config"])
    ours, stock = VisionLanguageModel.load(tmp_path), VisionLanguageModel.load(tmp_path, experts="grouped_mm")
    plain = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path)
    used = [chosen_by(model) for model in (sparse.model, ours.model, stock.model, plain)]
    assert used == [SORTED_EXPERTS, SORTED_EXPERTS, "grouped_mm", "grouped_mm"]


def chosen_by(model: Any) -> str:
    return model.get_experts_implementation()["text_config"]


def test_equal_inputs_give_equal_bits(tokenizer: Any) -> None:
    model = sparse_model("qwen3", tokenizer)
    first, again = (outputs_and_gradients(model, SORTED_EXPERTS) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_layout_with_biases_is_left_to_transformers() -> None:
    torch.manual_seed(0)
    sizes: dict[str, int] = {"hidden_size": 16, "intermediate_size": 24, "num_local_experts": 4}
    experts = GptOssExperts(GptOssConfig(**sizes, experts_implementation="eager"))
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    hidden_TD, weights_TA = torch.randn(10, 16), torch.rand(10, 2)
    chosen_TA = torch.rand(10, 4).topk(2).indices
    with torch.no_grad():
        expected_TD = experts(hidden_TD, chosen_TA, weights_TA)
        torch.testing.assert_close(sorted_experts(experts, hidden_TD, chosen_TA, weights_TA), expected_TD)
