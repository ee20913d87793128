"""Drawn streams: scenes of one to three different shapes that follow each other, for seconds or for an hour.

A stream is a `StreamRecipe`; its scenes are small descriptions, its frames are drawn one after another when they are
wanted, so an hour of them needs the memory of one. Eight kinds of shape come again and again, others once, twice or
three times in the whole stream, the rest never: in an hour, too, there is something to have seen or to have missed. No
kind is in two scenes that follow each other, so how often something was there is never in doubt. Questions are in
`stream_questions`. Called there and by whoever evaluates streams.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import product
from random import Random
from typing import NamedTuple

from sparsight.data.scenes import COLOUR_NAMES, SHAPES, Scene, draw, scene_of
from sparsight.data.streams import StreamRecipe
from sparsight.media.video import Frame

STREAM_SCENES_VERSION = 2
"""Raised when the same recipe would give other frames or the same seed other questions."""

Kind = tuple[str, str]
"""A shape and its colour."""

KINDS: tuple[Kind, ...] = tuple(product(SHAPES, COLOUR_NAMES))
COMMON = 8
"""Kinds of a stream of all colours that come any number of times; of fewer colours, a third of them, and at least so
many that a scene can always be filled with others than the one before."""
RARE = 12
"""Kinds of such a stream that come at most `MOST_TIMES`, some of them never; the other kinds never come. Of fewer
colours, half of them, as far as two are left that never come."""
MOST_TIMES = 3
MOST_OBJECTS = 3


class Shot(NamedTuple):
    """A scene and the frames [first, end) that show it."""

    scene: Scene
    first: int
    end: int

    @property
    def names(self) -> frozenset[str]:
        return frozenset(item.name for item in self.scene.objects)


def shots_of(recipe: StreamRecipe) -> tuple[Shot, ...]:
    """The scenes of a stream in order; they fill its frames without a gap."""
    random = Random(f"streams/{recipe.seed}/{recipe.split}/{recipe.frames}/{recipe.number}")
    shortest = max(1, round(recipe.shortest_scene_s * recipe.frames_per_second))
    longest = max(shortest, round(recipe.longest_scene_s * recipe.frames_per_second))
    firsts = [0]
    while firsts[-1] < recipe.frames:
        firsts.append(firsts[-1] + random.randint(shortest, longest))
    ends = [min(end, recipe.frames) for end in firsts[1:]]
    return tuple(
        Shot(scene_of(kinds, recipe.size_pixels, random), first, end)
        for kinds, first, end in zip(_cast(len(ends), recipe.colours, random), firsts, ends, strict=False)
    )


def frames_of(recipe: StreamRecipe) -> Iterator[Frame]:
    """The frames of a stream with their times, in order; each scene is drawn once, when its first frame is wanted."""
    for shot in shots_of(recipe):
        picture = draw(shot.scene)
        for frame in range(shot.first, shot.end):
            yield Frame(recipe.time_s(frame), picture.copy())


def _cast(scenes: int, colours: int, random: Random) -> list[list[Kind]]:
    """Which kinds are in each scene."""
    kinds = random.sample(KINDS, len(KINDS))
    if colours < len(COLOUR_NAMES):
        chosen_colours = random.sample(COLOUR_NAMES, colours)
        kinds = [kind for kind in kinds if kind[1] in chosen_colours]
    many = max(2 * MOST_OBJECTS, len(kinds) * COMMON // len(KINDS))
    common, rare = kinds[:many], kinds[many : min(many + len(kinds) * RARE // len(KINDS), len(kinds) - 2)]
    left = {kind: random.randint(1, MOST_TIMES) for kind in rare}
    share = min(0.5, sum(left.values()) / (scenes * (1 + MOST_OBJECTS) / 2))  # spreads them over the whole stream
    seen: set[Kind] = set()
    cast: list[list[Kind]] = [[]]
    for _ in range(scenes):
        chosen: list[Kind] = []
        for _ in range(random.randint(1, MOST_OBJECTS)):
            taken = [*cast[-1], *chosen]
            free = _without([kind for kind in rare if left[kind]], taken)
            if free and random.random() < share:
                again = [kind for kind in free if kind in seen]
                kind = random.choice(again if again and random.random() < 0.5 else free)
                left[kind] -= 1
            else:
                kind = random.choice(_without(common, taken))
            seen.add(kind)
            chosen.append(kind)
        cast.append(chosen)
    return cast[1:]


def _without(kinds: Sequence[Kind], taken: Collection[Kind]) -> list[Kind]:
    return [kind for kind in kinds if kind not in taken]
