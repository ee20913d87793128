"""Drawn streams: scenes fill their frames, rare kinds stay rare, frames come one by one and are the same anywhere."""

import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest

from sparsight.data.scenes import draw
from sparsight.data.stream_scenes import COMMON, MOST_TIMES, RARE, frames_of, shots_of
from sparsight.data.streams import StreamRecipe

CLIP = StreamRecipe("train_clips", 0, 0, 16, 0.25, 4.0, 12.0, 64)
HOUR = replace(CLIP, split="test_streams", frames=1800, frames_per_second=0.5)
RECIPES = [
    *(replace(CLIP, number=number, frames=8 + number % 9) for number in range(40)),
    *(replace(HOUR, number=number, frames=frames) for number in range(4) for frames in (15, 150, 1800)),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
def test_scenes_fill_the_stream_and_change(recipe: StreamRecipe) -> None:
    shots = shots_of(recipe)
    assert shots[0].first == 0
    assert shots[-1].end == recipe.frames
    for shot, following in pairwise(shots):
        assert shot.end == following.first
        seconds = (shot.end - shot.first) / recipe.frames_per_second
        assert 4.0 <= seconds <= 12.0
        assert not shot.names & following.names
    for shot in shots:
        assert 1 <= len(shot.scene.objects) <= 3
        assert len(shot.names) == len(shot.scene.objects)


@pytest.mark.parametrize("number", range(5))
def test_an_hour_has_common_rare_and_absent_kinds(number: int) -> None:
    times = Counter(name for shot in shots_of(replace(HOUR, number=number)) for name in shot.names)
    often = [name for name, count in times.items() if count > MOST_TIMES]
    assert len(often) == COMMON
    assert 6 <= len(times) - COMMON <= RARE
    places = [
        index / 300
        for index, shot in enumerate(shots_of(replace(HOUR, number=number)))
        if any(times[name] <= MOST_TIMES for name in shot.names)
    ]
    assert min(places) < 0.35
    assert max(places) > 0.65


def test_frames_show_their_scenes() -> None:
    recipe = replace(HOUR, frames=40)
    shots = shots_of(recipe)
    frames = list(frames_of(recipe))
    assert [frame.time_s for frame in frames] == [2.0 * number for number in range(40)]
    for number, frame in enumerate(frames):
        shot = next(shot for shot in shots if shot.first <= number < shot.end)
        np.testing.assert_array_equal(np.asarray(frame.picture), np.asarray(draw(shot.scene)))


def test_recipes_are_streams_of_their_own() -> None:
    first = [np.asarray(frame.picture).tobytes() for frame in frames_of(CLIP)]
    assert first == [np.asarray(frame.picture).tobytes() for frame in frames_of(CLIP)]
    others = [
        replace(CLIP, seed=1),
        replace(CLIP, number=1),
        replace(CLIP, split="test_clips"),
        replace(CLIP, split="validation_clips"),
    ]
    seen = set(first)
    for other in others:
        pictures = {np.asarray(frame.picture).tobytes() for frame in frames_of(other)}
        assert not pictures & seen
        seen |= pictures


def test_the_same_recipe_is_the_same_stream_on_any_machine() -> None:
    """Kept values: another interpreter or machine that drew other scenes would show here."""
    shots = shots_of(CLIP)
    assert [(shot.first, sorted(shot.names)) for shot in shots[:3]] == [
        (0, ["blue triangle", "yellow triangle"]),
        (3, ["brown circle", "gray circle", "teal circle"]),
        (5, ["teal rectangle", "yellow triangle"]),
    ]


def test_an_hour_is_not_kept_in_memory() -> None:
    def peak(frames: int) -> int:
        tracemalloc.start()
        for _ in islice(frames_of(HOUR), frames):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(1500) < peak(30) + 200_000


def test_few_colours_make_scenes_that_are_easily_mistaken() -> None:
    for number in range(20):
        recipe = replace(CLIP, number=number, frames=200, colours=4)
        scenes = [shot.names for shot in shots_of(recipe)]
        shown = frozenset[str]().union(*scenes)
        assert len({name.split()[0] for name in shown}) == 4
        assert len(shown) <= 10, "of twelve kinds two never come"
        assert not any(one & other for one, other in pairwise(scenes))
