"""The tower's own training: it learns what patches show, repeatably, and changes nothing but the tower."""

from random import Random

import pytest
import torch

from sparsight.config import ArchitectureConfig, TowerStageConfig
from sparsight.data.easy_vqa import SOURCE
from sparsight.data.scenes import COLOUR_NAMES, SHAPES, draw, random_scene
from sparsight.errors import PictureError
from sparsight.media.images import DecodeLimits, encode_png
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.tower import draw_scenes, one_object, start_positions, train_tower
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import Sample, Turn

ARCHITECTURE = ArchitectureConfig(
    picture_pixels=32,
    tower_layers=1,
    tower_width=32,
    tower_heads=1,
    text_layers=1,
    text_width=32,
    text_heads=1,
    text_key_value_heads=1,
    text_intermediate=32,
)


def new_model(picture_pixels: int = 32) -> VisionLanguageModel:
    architecture = ARCHITECTURE.model_copy(update={"picture_pixels": picture_pixels})
    return make_dense(architecture, make_tokenizer(["red circle"] * 5, 300), seed=0)


def patch_start() -> torch.Tensor:
    return new_model().model.model.vision_tower.embeddings.patch_embedding.weight


def named_samples(count: int) -> list[Sample]:
    random = Random(3)
    rows: list[Sample] = []
    for index in range(count):
        scene = random_scene(random, 32, single_object=True)
        item = scene.objects[0]
        turns = (Turn("what shape is it?", item.shape), Turn("is it big?", "yes"), Turn("what color?", item.colour))
        rows.append(Sample(f"p/{index}", (encode_png(draw(scene)),), turns, SOURCE))
    return rows


def test_training_learns_and_is_repeatable() -> None:
    settings = TowerStageConfig(steps=60, batch_pictures=16, learning_rate=3e-3, drawn_pictures=200)

    def train() -> tuple[VisionLanguageModel, list[float], dict[str, float]]:
        model, losses = new_model(), list[float]()
        figures = train_tower(
            model, settings, named_samples(10), seed=1, report=lambda step, values: losses.append(values["loss"])
        )
        return model, losses, figures

    (first, losses, figures), (again, _, _) = train(), train()
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert figures["tower_colour"] > 2 / len(COLOUR_NAMES)
    before = new_model().model.state_dict()
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
        assert torch.equal(value, before[name]) or "vision_tower.e" in name, name
    assert not torch.equal(first.model.model.vision_tower.embeddings.patch_embedding.weight, patch_start())


def test_samples_of_one_object_are_named_by_their_answers() -> None:
    model, rows = new_model(), named_samples(4)
    elsewhere = Sample("other", rows[0].frames, rows[0].turns, "scenes")
    pictures = one_object(model, [*rows, elsewhere])
    assert pictures.pixels.shape == (4, 3, 32, 32)
    assert [SHAPES[index] for index in pictures.shape_N] == [row.turns[0].answer for row in rows]
    assert [COLOUR_NAMES[index] for index in pictures.colour_N] == [row.turns[2].answer for row in rows]
    assert len(one_object(model, [elsewhere]).pixels) == 0
    with pytest.raises(PictureError, match="the limit is 1000"):
        one_object(model, rows, DecodeLimits(max_pixels=1000))


def test_drawn_scenes_say_where_their_objects_are() -> None:
    drawn = draw_scenes(new_model(), 30, seed=0)
    assert drawn.shapes_NP.shape == (30, 16)
    assert bool(((drawn.shapes_NP > 0) == (drawn.colours_NP > 0)).all())
    single = drawn.shape_N >= 0
    assert 0 < int(single.sum()) < 30
    assert drawn.centres_NP[single].sum(dim=1).tolist() == [1.0] * int(single.sum())
    for shapes_P, shape in zip(drawn.shapes_NP[single], drawn.shape_N[single], strict=True):
        assert set(shapes_P.tolist()) <= {0, int(shape) + 1}


def test_neighbouring_positions_start_alike() -> None:
    model = new_model(picture_pixels=64)
    start_positions(model)
    weight_PD = model.model.model.vision_tower.embeddings.position_embedding.weight.detach()
    alike_PP = torch.nn.functional.cosine_similarity(weight_PD[:, None], weight_PD[None], dim=-1)
    assert float(alike_PP[18, 19]) > float(alike_PP[18, 20]) > float(alike_PP[18, 47])
    assert float(weight_PD.pow(2).mean()) == pytest.approx(1.0, abs=1e-4)
