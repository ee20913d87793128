"""Every answer is worked out a second time from the scene, by parsing the question's words."""

import re
from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from sparsight.config import ScenesSource
from sparsight.data.scene_questions import absent_pairs, ask, scene_samples
from sparsight.data.scenes import COLOUR_NAMES, SHAPES, Scene, random_scene
from sparsight.media.images import decode
from sparsight.records import Turn

SCENES = [random_scene(Random(f"scene {index}"), max_objects=1 + index % 6) for index in range(400)]
ASKED = [(scene, ask(scene, Random(f"ask {index}"))) for index, scene in enumerate(SCENES)]

COLOUR, SHAPE = "|".join(COLOUR_NAMES), "|".join(SHAPES)
WORDS = dict(enumerate(["zero", "one", "two", "three", "four", "five", "six"]))


def only(scene: Scene, colour: str | None = None, shape: str | None = None) -> tuple[float, float, float, float]:
    found = [o.box for o in scene.objects if colour in (None, o.colour) and shape in (None, o.shape)]
    assert len(found) == 1, "the question names something that is not unique"
    return found[0]


def worked_out(scene: Scene, question: str) -> str:
    """The answer to a question, from the words of the question and the boxes alone."""
    if found := re.fullmatch(rf"(?:is there a|does the image contain a|is a) ({COLOUR}) ({SHAPE})(?: .*)?\?", question):
        return "yes" if any((o.colour, o.shape) == found.groups() for o in scene.objects) else "no"
    if found := re.fullmatch(rf"how many (?:({COLOUR}) )?(?:shapes|({SHAPE})s) are there\?", question):
        colour, shape = found.groups()
        return WORDS[sum(colour in (None, o.colour) and shape in (None, o.shape) for o in scene.objects)]
    if found := re.fullmatch(rf"what (?:color is|is the color of) the ({SHAPE})\?", question):
        return next(o.colour for o in scene.objects if o.box == only(scene, shape=found[1]))
    if found := re.fullmatch(rf"what is the ({COLOUR}) shape\?", question):
        return next(o.shape for o in scene.objects if o.box == only(scene, colour=found[1]))
    relation = r"(left or right of|above or below|left of|right of|above|below)"
    if found := re.fullmatch(rf"is the ({COLOUR}) ({SHAPE}) {relation} the ({COLOUR}) ({SHAPE})\?", question):
        one, other = only(scene, found[1], found[2]), only(scene, found[4], found[5])
        truths = {
            "left": one[2] + 2 <= other[0],
            "right": other[2] + 2 <= one[0],
            "above": one[3] + 2 <= other[1],
            "below": other[3] + 2 <= one[1],
        }
        asked = [word for word in truths if word in found[3].split()]
        if len(asked) == 2:
            assert truths[asked[0]] != truths[asked[1]], "neither side is clear"
            return next(word for word in asked if truths[word])
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}[asked[0]]
        assert truths[asked[0]] or truths[opposite], "neither side is clear"
        return "yes" if truths[asked[0]] else "no"
    if found := re.fullmatch(r"list the shapes from (left to right|top to bottom)\.", question):
        axis = 0 if found[1] == "left to right" else 1
        placed = sorted((o.box[axis] + o.box[axis + 2], f"{o.colour} {o.shape}") for o in scene.objects)
        assert all(b[0] - a[0] >= 4 for a, b in pairwise(placed)), "the order is not clear"
        return ", ".join(name for _, name in placed)
    raise AssertionError(f"no rule for the question {question!r}")


def test_every_answer_is_exact() -> None:
    for scene, turns in ASKED:
        for turn in turns:
            assert turn.answer == worked_out(scene, turn.question), (turn, scene)


def test_every_kind_is_asked_often() -> None:
    counts = Counter(turn.answer_type for _, turns in ASKED for turn in turns)
    assert set(counts) == {"existence", "count", "colour", "shape", "relation", "caption"}
    assert min(counts.values()) > 150


def existence(answer: str) -> list[tuple[Scene, tuple[str, str]]]:
    turns = [(scene, turn) for scene, turns in ASKED for turn in turns if turn.answer_type == "existence"]
    pattern = re.compile(rf"({COLOUR}) ({SHAPE})")
    return [
        (scene, (found[1], found[2]))
        for scene, turn in turns
        if turn.answer == answer and (found := pattern.search(turn.question))
    ]


def test_negatives_are_absent_though_their_colour_or_shape_is_there() -> None:
    negatives = existence("no")
    assert len(negatives) == len(existence("yes")) == len(SCENES)
    both = 0
    for scene, (colour, shape) in negatives:
        assert not any(o.colour == colour and o.shape == shape for o in scene.objects)
        has_colour = any(o.colour == colour for o in scene.objects)
        has_shape = any(o.shape == shape for o in scene.objects)
        assert has_colour or has_shape
        both += has_colour and has_shape
    assert both >= len(negatives) // 4  # the hardest kind: both are there, on other objects


def test_absent_pairs_against_a_slow_list() -> None:
    for scene in SCENES[:100]:
        hard, near = absent_pairs(scene)
        slow_hard, slow_near = [], []
        for colour in COLOUR_NAMES:
            for shape in SHAPES:
                if any(o.name == f"{colour} {shape}" for o in scene.objects):
                    continue
                hits = any(o.colour == colour for o in scene.objects) + any(o.shape == shape for o in scene.objects)
                if hits == 2:
                    slow_hard.append((colour, shape))
                if hits:
                    slow_near.append((colour, shape))
        assert (hard, near) == (slow_hard, slow_near)


def test_yes_and_no_are_balanced() -> None:
    for kind, slack in (("existence", 0.0), ("relation", 0.1)):
        answers = [t.answer for _, turns in ASKED for t in turns if t.answer_type == kind and t.answer in ("yes", "no")]
        assert abs(answers.count("yes") / len(answers) - 0.5) <= slack


def test_the_order_of_questions_gives_nothing_away() -> None:
    firsts = Counter(turns[0].answer_type for _, turns in ASKED)
    assert len(firsts) == 6
    existing_first = [next(t.answer for t in turns if t.answer_type == "existence") == "yes" for _, turns in ASKED]
    assert 0.4 < sum(existing_first) / len(existing_first) < 0.6


SOURCE = ScenesSource(kind="scenes", pictures=40, test_pictures=30, pair_pictures=20, max_objects=4)


def test_same_seed_same_bytes() -> None:
    assert list(scene_samples(SOURCE, "train", 5, 8)) == list(scene_samples(SOURCE, "train", 5, 8))


def test_seeds_and_splits_share_no_picture() -> None:
    sets = [
        {sample.content_hash for sample in scene_samples(SOURCE, split, seed, 8)}
        for split in ("train", "test", "pairs")
        for seed in (0, 1)
    ]
    assert [len(one) for one in sets] == [40, 40, 30, 30, 20, 20]
    assert len(set().union(*sets)) == sum(len(one) for one in sets)


def test_excluded_pictures_are_drawn_again() -> None:
    usual = list(scene_samples(SOURCE, "test", 0, 8))
    banned = {usual[0].content_hash, usual[3].content_hash}
    others = list(scene_samples(SOURCE, "test", 0, 8, exclude=banned))
    assert len({sample.content_hash for sample in others}) == SOURCE.test_pictures
    assert not banned & {sample.content_hash for sample in others}
    assert len({sample.id for sample in others}) == len(others)


def test_hidden_shapes_are_named_at_the_end_of_training_descriptions_alone() -> None:
    many = SOURCE.model_copy(update={"pictures": 400})
    usual = list(scene_samples(many, "train", 0, 100))
    told = list(scene_samples(many.model_copy(update={"hidden": 0.6}), "train", 0, 100))
    more = described = 0
    for plain, sample in zip(usual, told, strict=True):
        assert sample.frames == plain.frames
        for before, after in zip(plain.turns, sample.turns, strict=True):
            if before.answer_type != "caption":
                assert after == before
                continue
            described += 1
            there, named = str(before.answer).split(", "), str(after.answer).split(", ")
            assert named[: len(there)] == there
            assert not set(named[len(there) :]) & set(there)
            assert len(named) <= len(there) + 1
            more += len(named) - len(there)
    assert 0.5 < more / described < 0.7
    for split in ("test", "pairs"):
        hidden = scene_samples(SOURCE.model_copy(update={"hidden": 1.0}), split, 0, 8)
        assert list(hidden) == list(scene_samples(SOURCE, split, 0, 8))


@pytest.mark.parametrize("most", [1, 3, 8])
def test_conversations_are_bounded_and_complete(most: int) -> None:
    whole = {sample.content_hash: sample.turns for sample in scene_samples(SOURCE, "train", 0, 100)}
    cut: dict[str, tuple[Turn, ...]] = {}
    for sample in scene_samples(SOURCE, "train", 0, most):
        assert 1 <= len(sample.turns) <= most
        cut[sample.content_hash] = cut.get(sample.content_hash, ()) + sample.turns
    assert cut == whole


def test_pictures_pass_the_safe_decoder() -> None:
    for sample in scene_samples(SOURCE, "train", 0, 8):
        assert decode(sample.frames[0]).size == (64, 64)


def test_scenes_may_be_asked_more_often_what_is_there() -> None:
    kinds: Counter[tuple[str, str | None]] = Counter()
    for index, scene in enumerate(SCENES):
        turns = ask(scene, Random(f"more {index}"), existence=3)
        assert len({turn.question for turn in turns}) == len(turns)
        assert all(turn.answer == worked_out(scene, turn.question) for turn in turns)
        kinds.update((turn.answer_type, turn.answer) for turn in turns if turn.answer_type == "existence")
    yes, no = kinds["existence", "yes"], kinds["existence", "no"]
    assert 5 * len(SCENES) < yes + no <= 6 * len(SCENES)
    assert abs(yes - no) < 0.1 * (yes + no)  # the few shapes that are there meet again more often
