"""A stage's groups name exactly the weights that their names say, in dense and sparse models of every family."""

from typing import Any, get_args

import pytest
import torch

from sparsight.config import UpcycleConfig
from sparsight.model.parameters import set_trainable
from sparsight.model.routing import routers
from sparsight.model.tiny import make_tokenizer
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.stages import TrainableGroup
from tests.parity.families import FAMILIES, LAYERS, dense_model

GROUPS: tuple[TrainableGroup, ...] = get_args(TrainableGroup)


@pytest.fixture(scope="module", params=[(family, kind) for family in FAMILIES for kind in ("dense", "sparse")])
def model(request: pytest.FixtureRequest) -> VisionLanguageModel:
    family, kind = request.param
    dense = dense_model(family, make_tokenizer(["what is in the image?", "a red circle"] * 20, 300))
    return dense if kind == "dense" else upcycle(dense, UpcycleConfig(layers=LAYERS[family]), seed=3)


def parts_of(model: VisionLanguageModel) -> dict[str, set[int]]:
    """The weights of every group, found by walking the stock model's modules."""
    stock: Any = model.model
    text: Any = model.text_model
    layers = list(text.layers)
    gates = [weight for gate in routers(model).values() for weight in gate.parameters()]
    feed_forward = [weight for layer in layers for weight in layer.mlp.parameters()]
    norms = [weight for layer in layers for name, weight in layer.named_parameters() if "layernorm" in name]
    attention = [weight for layer in layers for weight in layer.self_attn.parameters()]
    embeddings = [*stock.get_input_embeddings().parameters(), *stock.get_output_embeddings().parameters()]
    projector = [*stock.model.multi_modal_projector.parameters(), stock.model.image_newline]
    groups = {
        "tower": reached_by_features(model),
        "projector": projector,
        "embeddings": embeddings,
        "attention": [*attention, *norms, *text.norm.parameters()],
        "experts": feed_forward,
        "routers": gates,
    }
    found = {name: {id(weight) for weight in weights} for name, weights in groups.items()}
    found["experts"] -= found["routers"]
    found["text"] = found["embeddings"] | found["attention"] | found["experts"] | found["routers"]
    return found


def reached_by_features(model: VisionLanguageModel) -> list[torch.Tensor]:
    """The tower's weights that its features depend on: those with a gradient."""
    weights = list(model.model.model.vision_tower.parameters())
    for weight in weights:
        weight.requires_grad_(True)
    side = model.pixels.side
    features_FPD = model.features(torch.ones(1, 3, side, side), gradient=True)
    gradients = torch.autograd.grad(features_FPD.square().sum(), weights, allow_unused=True)
    found = [weight for weight, gradient in zip(weights, gradients, strict=True) if gradient is not None]
    assert 0 < len(found) < len(weights)
    return found


def trained(model: VisionLanguageModel, groups: list[TrainableGroup]) -> set[int]:
    returned = {id(weight) for weight in set_trainable(model, groups)}
    assert returned == {id(weight) for weight in model.model.parameters() if weight.requires_grad}
    return returned


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_is_what_its_name_says(model: VisionLanguageModel, group: TrainableGroup) -> None:
    assert trained(model, [group]) == parts_of(model)[group]


def test_the_groups_are_the_whole_model_but_for_what_no_feature_needs_and_do_not_overlap(
    model: VisionLanguageModel,
) -> None:
    parts = parts_of(model)
    parts.pop("text")
    whole = {id(weight): name for name, weight in model.model.named_parameters()}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values()))
    left = {name for weight, name in whole.items() if weight not in set.union(*parts.values())}
    assert left == {name for name in whole.values() if "vision_tower.post_layernorm" in name}


def test_a_tower_read_before_its_last_layer_does_not_train_that_layer() -> None:
    model = dense_model("qwen3", make_tokenizer(["what is in the image?"] * 20, 300))
    model.model.config.vision_feature_layer = -2
    assert trained(model, ["tower"]) == {id(weight) for weight in reached_by_features(model)}


def test_the_sparse_mimic_set_of_llava_mod(model: VisionLanguageModel) -> None:
    """Adaptor, feed-forward networks and experts of all layers, routers; attention, norms, embeddings, head frozen."""
    parts = parts_of(model)
    chosen = trained(model, ["projector", "experts", "routers"])
    assert chosen == parts["projector"] | parts["experts"] | parts["routers"]
    text: Any = model.text_model
    for index, layer in enumerate(text.layers):
        weights = {id(weight) for weight in layer.mlp.parameters()}
        assert weights
        assert weights <= chosen, f"layer {index}"
    assert not chosen & (parts["tower"] | parts["attention"] | parts["embeddings"])
    assert bool(parts["routers"]) == bool(routers(model))


def test_a_group_that_is_not_named_again_is_frozen_again(model: VisionLanguageModel) -> None:
    trained(model, ["text"])
    assert trained(model, ["projector"]) == parts_of(model)["projector"]
