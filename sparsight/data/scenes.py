"""Drawn scenes whose content is exactly known: coloured shapes on a light ground, in the look of easy-VQA's pictures.

A `Scene` is a plain description; `draw` renders it and `patch_labels` says what each patch of the picture shows.
Objects never overlap. Questions about scenes are in `scene_questions`. Called there and by the tower stage of the
tiny teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from sparsight.errors import ConfigError

SHAPES: tuple[str, ...] = ("circle", "rectangle", "triangle")

COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}

COLOUR_NAMES = tuple(COLOURS)

SCENES_VERSION = 1
"""Raised when the same seed would give other pictures or other questions."""

FINE = 4
"""Drawing happens at this multiple of the picture's size, so edges are smooth and boxes may lie on quarter pixels."""

SMALLEST = 10 / 64
LARGEST = 34 / 64
"""Shortest and longest side of an object, as a share of the picture's side; those of easy-VQA."""

TRIANGLE_HEIGHT = 3**0.5 / 2

GAP_PIXELS = 2.0
"""At least this much ground between two objects."""

LEAST_COVERAGE = 0.25


@dataclass(frozen=True)
class SceneObject:
    """One shape. `box` is (left, top, right, bottom) in pixels, multiples of a quarter, right and bottom excluded."""

    shape: str
    colour: str
    box: tuple[float, float, float, float]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scene:
    """A square picture of `size_pixels`, its ground's colour, and its objects."""

    size_pixels: int
    ground: tuple[int, int, int]
    objects: tuple[SceneObject, ...]


def random_scene(
    random: Random,
    size_pixels: int = 64,
    max_objects: int = 4,
    single_object: bool = False,
    distinct: bool = False,
) -> Scene:
    """A scene of 2 to `max_objects` objects, or of exactly one, distributed like easy-VQA's, with `single_object`.

    With `distinct` no two of its objects have both colour and shape in common. Equal states of `random` give equal
    scenes. Raises `ConfigError` for pictures under 32 pixels.
    """
    if size_pixels < 32:
        raise ConfigError(f"scenes of {size_pixels} pixels are too small to tell shapes apart: use 32 or more")
    ground = _ground(random)
    count = 1 if single_object or max_objects == 1 else random.randint(2, max_objects)
    palette = list(COLOUR_NAMES)
    if count > 1 and random.random() < 0.5:  # few colours: equal ones meet, and absent pairs look plausible
        palette = random.sample(palette, 2)
    if distinct:
        kinds = random.sample([(shape, colour) for shape in SHAPES for colour in palette], count)
    else:
        kinds = [(random.choice(SHAPES), random.choice(palette)) for _ in range(count)]
    return _laid_out(kinds, size_pixels, ground, random)


def scene_of(kinds: Sequence[tuple[str, str]], size_pixels: int, random: Random) -> Scene:
    """A scene of one object of each (shape, colour), somewhere on some ground. Equal states give equal scenes."""
    return _laid_out(kinds, size_pixels, _ground(random), random)


def _ground(random: Random) -> tuple[int, int, int]:
    return random.randint(230, 255), random.randint(230, 255), random.randint(230, 255)


def _laid_out(
    kinds: Sequence[tuple[str, str]], size_pixels: int, ground: tuple[int, int, int], random: Random
) -> Scene:
    boxes = _place([shape for shape, _ in kinds], size_pixels, random)
    objects = tuple(SceneObject(shape, colour, box) for (shape, colour), box in zip(kinds, boxes, strict=True))
    return Scene(size_pixels, ground, objects)


def _place(shapes: Sequence[str], size_pixels: int, random: Random) -> list[tuple[float, float, float, float]]:
    """Boxes that do not touch. Sides are as easy-VQA's for one object, and smaller the more there are."""
    share = LARGEST if len(shapes) == 1 else min(0.45, 0.8 / len(shapes) ** 0.75)
    while True:
        boxes: list[tuple[float, float, float, float]] = []
        for shape in shapes:
            box = _free_box(shape, boxes, size_pixels, share, random)
            if box is None:
                break
            boxes.append(box)
        if len(boxes) == len(shapes):
            return boxes
        share = max(SMALLEST, share * 0.9)


def _free_box(
    shape: str, taken: Sequence[tuple[float, float, float, float]], size_pixels: int, share: float, random: Random
) -> tuple[float, float, float, float] | None:
    for _ in range(20):
        width = _quarter(random.uniform(SMALLEST, share) * size_pixels)
        height = width
        if shape == "rectangle":
            height = _quarter(random.uniform(SMALLEST, share) * size_pixels)
        elif shape == "triangle":
            height = _quarter(width * TRIANGLE_HEIGHT)
        left = _quarter(random.uniform(0.0, size_pixels - width))
        top = _quarter(random.uniform(0.0, size_pixels - height))
        box = (left, top, left + width, top + height)
        if all(_apart(box, other) for other in taken):
            return box
    return None


def _apart(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return (
        one[2] + GAP_PIXELS <= other[0]
        or other[2] + GAP_PIXELS <= one[0]
        or one[3] + GAP_PIXELS <= other[1]
        or other[3] + GAP_PIXELS <= one[1]
    )


def _quarter(value: float) -> float:
    return int(value * FINE) / FINE


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of `size_pixels` squared, edges smoothed."""
    fine = Image.new("RGB", (scene.size_pixels * FINE, scene.size_pixels * FINE), scene.ground)
    pen = ImageDraw.Draw(fine)
    for item in scene.objects:
        _paint(pen, item, COLOURS[item.colour])
    return fine.reduce(FINE)


def _paint(pen: ImageDraw.ImageDraw, item: SceneObject, fill: int | tuple[int, int, int]) -> None:
    left, top, right, bottom = (edge * FINE for edge in item.box)
    right, bottom = right - 1, bottom - 1  # Pillow's last row and column are painted
    if item.shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=fill)
    elif item.shape == "rectangle":
        pen.rectangle((left, top, right, bottom), fill=fill)
    else:
        pen.polygon([(left, bottom), ((left + right) / 2, top), (right, bottom)], fill=fill)


def patch_labels(scene: Scene, patch_pixels: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """What each patch shows: shape ids [P] and colour ids [P], row by row; 0 is ground, i + 1 is SHAPES[i] or
    COLOUR_NAMES[i].

    A patch belongs to the object that covers most of it, if that is a quarter of the patch or more; the patch that an
    object covers most is its own even below that (unless another covers more of it), so that small objects are not
    taken for ground. Raises `ConfigError` where patches do not tile the picture.
    """
    if scene.size_pixels % patch_pixels:
        raise ConfigError(f"patches of {patch_pixels} pixels do not tile a picture of {scene.size_pixels} pixels")
    ids = Image.new("L", (scene.size_pixels * FINE, scene.size_pixels * FINE), 0)
    pen = ImageDraw.Draw(ids)
    for index, item in enumerate(scene.objects):
        _paint(pen, item, index + 1)
    side = scene.size_pixels // patch_pixels
    tiles = np.asarray(ids).reshape(side, patch_pixels * FINE, side, patch_pixels * FINE)
    coverage_OP = np.stack(
        [(tiles == index + 1).mean(axis=(1, 3)).reshape(-1) for index in range(len(scene.objects))]
    )  # [objects, patches]
    owner_P = coverage_OP.argmax(axis=0)
    seen_P = coverage_OP.max(axis=0) >= LEAST_COVERAGE
    for index, best in enumerate(coverage_OP.argmax(axis=1)):
        seen_P[best] |= owner_P[best] == index
    shape_ids = np.array([SHAPES.index(item.shape) + 1 for item in scene.objects])
    colour_ids = np.array([COLOUR_NAMES.index(item.colour) + 1 for item in scene.objects])
    return np.where(seen_P, shape_ids[owner_P], 0), np.where(seen_P, colour_ids[owner_P], 0)
