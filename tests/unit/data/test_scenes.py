"""Drawn scenes: the pixels show what the description says, and patch labels agree with a slow count."""

from random import Random

import numpy as np
import pytest

from sparsight.config import ScenesSource
from sparsight.data.scenes import (
    COLOUR_NAMES,
    COLOURS,
    SHAPES,
    Scene,
    SceneObject,
    draw,
    patch_labels,
    random_scene,
)
from sparsight.errors import ConfigError

SCENES = [random_scene(Random(f"scene {index}"), max_objects=2 + index % 5) for index in range(120)]


def inside(item: SceneObject, x: float, y: float, margin: float) -> bool:
    """Whether a point is at least `margin` pixels inside the shape; a negative margin reaches outside."""
    left, top, right, bottom = item.box
    if item.shape == "rectangle":
        return left + margin <= x <= right - margin and top + margin <= y <= bottom - margin
    if item.shape == "circle":
        radius = (right - left) / 2
        return float(np.hypot(x - (left + right) / 2, y - (top + bottom) / 2)) <= radius - margin
    half, height = (right - left) / 2, bottom - top
    across = abs(x - (left + right) / 2)
    slope_distance = (half * (y - top) / height - across) * height / float(np.hypot(half, height))
    return slope_distance >= margin and y <= bottom - margin


@pytest.mark.parametrize("scene", SCENES[:40], ids=range(40))
def test_every_pixel_has_the_colour_of_what_is_there(scene: Scene) -> None:
    pixels = np.asarray(draw(scene))
    assert pixels.shape == (scene.size_pixels, scene.size_pixels, 3)
    for y in range(scene.size_pixels):
        for x in range(scene.size_pixels):
            centre = (x + 0.5, y + 0.5)
            for item in scene.objects:
                if inside(item, *centre, margin=1.0):
                    assert tuple(pixels[y, x]) == COLOURS[item.colour]
            if not any(inside(item, *centre, margin=-1.0) for item in scene.objects):
                assert tuple(pixels[y, x]) == scene.ground


@pytest.mark.parametrize("scene", SCENES, ids=range(120))
def test_objects_lie_inside_apart_and_are_big_enough(scene: Scene) -> None:
    for index, item in enumerate(scene.objects):
        left, top, right, bottom = item.box
        assert 0 <= left < right <= scene.size_pixels
        assert 0 <= top < bottom <= scene.size_pixels
        assert right - left >= 9
        assert bottom - top >= 7
        for other in scene.objects[index + 1 :]:
            across = max(left, other.box[0]) - min(right, other.box[2])
            down = max(top, other.box[1]) - min(bottom, other.box[3])
            assert max(across, down) >= 2.0


def slow_patch_labels(scene: Scene, patch_pixels: int) -> list[tuple[int, int]]:
    """Paints each object alone on white and counts fully or partly covered pixels, patch by patch."""
    side = scene.size_pixels // patch_pixels
    shares = []
    for item in scene.objects:
        alone = Scene(scene.size_pixels, (255, 255, 255), (SceneObject(item.shape, "black", item.box),))
        covered = 1.0 - np.asarray(draw(alone))[..., 0] / 255.0
        shares.append(
            [
                covered[r * patch_pixels : (r + 1) * patch_pixels, c * patch_pixels : (c + 1) * patch_pixels].mean()
                for r in range(side)
                for c in range(side)
            ]
        )
    labels: list[tuple[int, int]] = []
    for patch in range(side * side):
        owner = max(range(len(shares)), key=lambda index: shares[index][patch])
        best_of_owner = shares[owner][patch] == max(shares[owner])
        item = scene.objects[owner]
        shown = shares[owner][patch] >= 0.25 or best_of_owner
        labels.append((SHAPES.index(item.shape) + 1, COLOUR_NAMES.index(item.colour) + 1) if shown else (0, 0))
    return labels


@pytest.mark.parametrize("patch_pixels", [4, 8, 16])
def test_patch_labels_equal_the_slow_count(patch_pixels: int) -> None:
    compared = differing = 0
    for scene in SCENES:
        shapes_P, colours_P = patch_labels(scene, patch_pixels)
        assert shapes_P.shape == colours_P.shape == ((scene.size_pixels // patch_pixels) ** 2,)
        slow = np.array(slow_patch_labels(scene, patch_pixels))
        compared += len(slow)
        differing += int(((slow[:, 0] != shapes_P) | (slow[:, 1] != colours_P)).sum())
        if patch_pixels <= 8:  # smaller than any object: each is seen
            seen = {(int(shape), int(colour)) for shape, colour in zip(shapes_P, colours_P, strict=True)}
            there = {(SHAPES.index(item.shape) + 1, COLOUR_NAMES.index(item.colour) + 1) for item in scene.objects}
            assert seen - {(0, 0)} == there
    # 8-bit rounding of the slow count decides patches that are covered by a quarter almost exactly.
    assert differing <= compared * 0.002


def test_same_seed_same_scene_other_seed_other_scene() -> None:
    assert random_scene(Random(1)) == random_scene(Random(1))
    assert random_scene(Random(1)) != random_scene(Random(2))
    assert draw(random_scene(Random(1))).tobytes() == draw(random_scene(Random(1))).tobytes()


def test_single_objects_cover_all_shapes_and_colours() -> None:
    scenes = [random_scene(Random(seed), single_object=True) for seed in range(1200)]
    assert {len(scene.objects) for scene in scenes} == {1}
    counts = {(shape, colour): 0 for shape in SHAPES for colour in COLOUR_NAMES}
    for scene in scenes:
        counts[scene.objects[0].shape, scene.objects[0].colour] += 1
    assert min(counts.values()) >= 25  # 50 expected
    widths = [scene.objects[0].box[2] - scene.objects[0].box[0] for scene in scenes]
    assert 9.5 <= min(widths) < 11
    assert 33 < max(widths) <= 34


@pytest.mark.parametrize("most", range(1, 7))
def test_number_of_objects_covers_its_range(most: int) -> None:
    numbers = {len(random_scene(Random(seed), max_objects=most).objects) for seed in range(100)}
    assert numbers == set(range(min(2, most), most + 1))


@pytest.mark.parametrize("most", range(1, 7))
def test_distinct_scenes_hold_nothing_twice_and_as_much_as_others(most: int) -> None:
    scenes = [random_scene(Random(seed), max_objects=most, distinct=True) for seed in range(200)]
    assert {len(scene.objects) for scene in scenes} == set(range(min(2, most), most + 1))
    for scene in scenes:
        assert len({item.name for item in scene.objects}) == len(scene.objects)
    if most == 4:
        others = [random_scene(Random(seed), max_objects=most) for seed in range(200)]
        assert any(len({item.name for item in scene.objects}) < len(scene.objects) for scene in others)


def test_sizes_scale_with_the_picture() -> None:
    scene = random_scene(Random(0), size_pixels=256, single_object=True)
    assert draw(scene).size == (256, 256)
    assert scene.objects[0].box[2] - scene.objects[0].box[0] >= 39


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="16 pixels are too small"):
        random_scene(Random(0), size_pixels=16)
    with pytest.raises(ConfigError, match="patches of 7 pixels do not tile"):
        patch_labels(SCENES[0], 7)


def test_the_config_allows_no_more_objects_than_fit() -> None:
    most = ScenesSource.model_fields["max_objects"].metadata[1].le
    for seed in range(50):
        random_scene(Random(seed), size_pixels=32, max_objects=most)
