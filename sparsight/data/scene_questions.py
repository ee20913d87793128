"""Questions about drawn scenes with exactly known answers, and the sample streams made of them.

Kinds: existence (every 'no' names a pair that is absent though its colour or its shape is in the picture), count,
colour, shape, relation, caption. Only questions with one right answer are asked: names are unique in the picture, and
positions are clearly apart. Called by `pipelines.prepare`; the wording follows easy-VQA's where both ask the same.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, count, pairwise, product
from random import Random
from typing import Literal, NamedTuple

from sparsight.config import ScenesSource
from sparsight.data.scenes import COLOUR_NAMES, SHAPES, Scene, SceneObject, draw, random_scene
from sparsight.data.turns import pieces
from sparsight.media.images import encode_png
from sparsight.records import Sample, Turn, hash_frames

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")

EXISTENCE = ("is there a {}?", "is there a {} in the image?", "does the image contain a {}?", "is a {} present?")
HORIZONTAL = ("left", "right")
VERTICAL = ("above", "below")

CLEAR_PIXELS = 2.0
"""Things at least this far apart are in a clear order."""

Split = Literal["train", "test", "pairs"]


class DrawnScene(NamedTuple):
    """A scene of a split with its picture, and the generator that drew it, from which its questions are drawn next."""

    scene: Scene
    picture: bytes
    random: Random


def drawn_scenes(source: ScenesSource, split: Split, seed: int, exclude: Collection[str] = ()) -> Iterator[DrawnScene]:
    """The scenes of a split: `source.pictures` for training, `source.test_pictures` held out, `source.pair_pictures`
    for preference pairs.

    Splits draw from streams of their own. Pictures whose content hash is in `exclude` are drawn again, so a test
    set made with the training hashes shares no picture with it. Same arguments, same bytes.
    """
    wanted = {"train": source.pictures, "test": source.test_pictures, "pairs": source.pair_pictures}[split]
    made = 0
    for index in count():
        if made == wanted:
            return
        random = Random(f"scenes/{seed}/{split}/{index}")
        scene = random_scene(random, source.size_pixels, source.max_objects, distinct=source.distinct)
        picture = encode_png(draw(scene))
        if hash_frames([picture]) in exclude:
            continue
        made += 1
        yield DrawnScene(scene, picture, random)


def scene_samples(
    source: ScenesSource, split: Split, seed: int, turns_per_sample: int, exclude: Collection[str] = ()
) -> Iterator[Sample]:
    """The scenes of a split (see `drawn_scenes`) with their questions as samples. Same arguments, same bytes."""
    for number, (scene, picture, random) in enumerate(drawn_scenes(source, split, seed, exclude)):
        turns = ask(scene, random, source.existence_questions)
        if split == "train" and random.random() < source.hidden:
            turns = _with_hidden(turns, scene, random)
        for part, piece in enumerate(pieces(turns, turns_per_sample)):
            yield Sample(f"scenes/{split}/{number}/{part}", (picture,), piece, "scenes", independent=True)


def ask(scene: Scene, random: Random, existence: int = 1) -> tuple[Turn, ...]:
    """Turns about a scene in random order: up to `existence` existing and as many absent pairs, and one or two of each
    other kind that has a clear answer."""
    pairs = [_existence(scene, random, present) for _ in range(existence) for present in (True, False)]
    turns = list({turn.question: turn for turn in pairs}.values())
    turns.append(_count(scene, random))
    turns += _colour(scene, random) + _shape(scene, random) + _relations(scene, random) + _caption(scene)
    random.shuffle(turns)
    return tuple(turns)


def _with_hidden(turns: Sequence[Turn], scene: Scene, random: Random) -> tuple[Turn, ...]:
    """The turns of a scene behind one of whose objects lies another that does not show: like those that do in colour
    and shape, where such a pair is left. Descriptions end with it."""
    hard, near = absent_pairs(scene)
    colour, shape = random.choice(hard or near)
    return tuple(
        replace(turn, answer=f"{turn.answer}, {colour} {shape}") if turn.answer_type == "caption" else turn
        for turn in turns
    )


def _existence(scene: Scene, random: Random, present: bool) -> Turn:
    form = random.choice(EXISTENCE)
    if present:
        return Turn(form.format(random.choice(scene.objects).name), "yes", "existence")
    hard, near = absent_pairs(scene)
    colour, shape = random.choice(hard if hard and random.random() < 0.5 else near)
    return Turn(form.format(f"{colour} {shape}"), "no", "existence")


def absent_pairs(scene: Scene) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(colour, shape) pairs that no object is: those whose colour and shape are both in the picture, and those of
    which one or both are."""
    pairs = {(item.colour, item.shape) for item in scene.objects}
    colours = {colour for colour, _ in pairs}
    shapes = {shape for _, shape in pairs}
    absent = [pair for pair in product(COLOUR_NAMES, SHAPES) if pair not in pairs]
    hard = [pair for pair in absent if pair[0] in colours and pair[1] in shapes]
    near = [pair for pair in absent if pair[0] in colours or pair[1] in shapes]
    return hard, near


def _count(scene: Scene, random: Random) -> Turn:
    kind = random.choice(("all", "colour", "shape", "pair"))
    item = random.choice(scene.objects)
    colour, shape = item.colour, item.shape
    if random.random() < 0.15:  # now and then something that may be absent
        colour, shape = random.choice(COLOUR_NAMES), random.choice(SHAPES)
    if kind == "all":
        phrase, number = "shapes", len(scene.objects)
    elif kind == "colour":
        phrase, number = f"{colour} shapes", sum(other.colour == colour for other in scene.objects)
    elif kind == "shape":
        phrase, number = f"{shape}s", sum(other.shape == shape for other in scene.objects)
    else:
        phrase = f"{colour} {shape}s"
        number = sum((other.colour, other.shape) == (colour, shape) for other in scene.objects)
    return Turn(f"how many {phrase} are there?", NUMBERS[number], "count")


def _colour(scene: Scene, random: Random) -> list[Turn]:
    shapes = [item.shape for item in scene.objects]
    single = [item for item in scene.objects if shapes.count(item.shape) == 1]
    if not single:
        return []
    item = random.choice(single)
    form = random.choice(("what color is the {}?", "what is the color of the {}?"))
    return [Turn(form.format(item.shape), item.colour, "colour")]


def _shape(scene: Scene, random: Random) -> list[Turn]:
    colours = [item.colour for item in scene.objects]
    single = [item for item in scene.objects if colours.count(item.colour) == 1]
    if not single:
        return []
    item = random.choice(single)
    return [Turn(f"what is the {item.colour} shape?", item.shape, "shape")]


def _relations(scene: Scene, random: Random) -> list[Turn]:
    """A yes-or-no and a which-side question about two pairs of objects that can be named and stand clearly apart."""
    names = [item.name for item in scene.objects]
    single = [item for item in scene.objects if names.count(item.name) == 1]
    clear = [
        (one, other, axis) for one, other in combinations(single, 2) for axis in (0, 1) if _clear(one, other, axis)
    ]
    if not clear:
        return []
    return [_is_it(*random.choice(clear), random), _which(*random.choice(clear), random)]


def _clear(one: SceneObject, other: SceneObject, axis: int) -> bool:
    """Whether the boxes' spans along an axis (0 across, 1 down) are clearly apart."""
    first, second = (one, other) if one.centre[axis] < other.centre[axis] else (other, one)
    return first.box[axis + 2] + CLEAR_PIXELS <= second.box[axis]


def _side(one: SceneObject, other: SceneObject, axis: int) -> str:
    words = HORIZONTAL if axis == 0 else VERTICAL
    return words[0] if one.centre[axis] < other.centre[axis] else words[1]


def _is_it(one: SceneObject, other: SceneObject, axis: int, random: Random) -> Turn:
    if random.random() < 0.5:
        one, other = other, one
    truth = random.random() < 0.5
    words = HORIZONTAL if axis == 0 else VERTICAL
    side = _side(one, other, axis)
    asked = side if truth else words[1 - words.index(side)]
    phrase = f"{asked} of" if axis == 0 else asked
    return Turn(f"is the {one.name} {phrase} the {other.name}?", "yes" if truth else "no", "relation")


def _which(one: SceneObject, other: SceneObject, axis: int, random: Random) -> Turn:
    if random.random() < 0.5:
        one, other = other, one
    choice = "left or right of" if axis == 0 else "above or below"
    return Turn(f"is the {one.name} {choice} the {other.name}?", _side(one, other, axis), "relation")


def _caption(scene: Scene) -> list[Turn]:
    """All objects in the order of their centres, across if that order is clear, else down, else no caption."""
    for axis, direction in ((0, "left to right"), (1, "top to bottom")):
        order = _along(scene, axis)
        if all(after[0] - before[0] >= CLEAR_PIXELS for before, after in pairwise(order)):
            return [_listing(direction, order)]
    return []


def description(scene: Scene) -> Turn:
    """A request to name all objects, which has an answer in every scene: where no order is clear, from left to right.

    For judging which objects an answer names, not in what order.
    """
    return next(iter(_caption(scene)), _listing("left to right", _along(scene, 0)))


def _along(scene: Scene, axis: int) -> list[tuple[float, str]]:
    return sorted((item.centre[axis], item.name) for item in scene.objects)


def _listing(direction: str, order: Sequence[tuple[float, str]]) -> Turn:
    return Turn(f"list the shapes from {direction}.", ", ".join(name for _, name in order), "caption")
