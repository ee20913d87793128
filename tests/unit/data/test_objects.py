"""Objects that a text speaks of, against lists written by hand and a reader that tries every phrase."""

from random import Random

import pytest

from sparsight.data.coco_names import coco_synonyms
from sparsight.data.objects import ObjectVocabulary
from sparsight.data.scenes import COLOUR_NAMES, SHAPES
from sparsight.errors import DataError

SCENES = ObjectVocabulary.scenes()
CATEGORIES = """person, bicycle, car, bus, train, bench, bird, dog, cat, horse, sheep, cow, elephant, bear, giraffe,
tie, skis, knife, spoon, bowl, cup, pizza, cake, chair, couch, toilet, tv, mouse, keyboard, oven, sink, book, clock,
vase, scissors, hot dog, teddy bear, wine glass, traffic light, dining table, sports ball, stop sign, tennis racket"""
COCO = ObjectVocabulary.coco(CATEGORIES.replace("\n", " ").split(", "))
WORDS = "a hot dog teddy bear wine glass traffic light stop sign toilet bowl baby elephant and racket table"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  . , !", []),
        ("red circle, blue triangle, red circle", ["red circle", "blue triangle", "red circle"]),
        ("A red circle and TWO Red Circles.", ["red circle", "red circle"]),
        ("a grey disc above a teal square", ["gray circle", "teal rectangle"]),
        ("red, circle", []),  # a comma parts them
        ("red\ncircle", []),
        ("red and a circle", []),
        ("purple circle, red hexagon", []),
        ("red red circle circle", ["red circle"]),
        ("there is no red circle, only a red rectangle", ["red rectangle"]),
        ("coloured circles", []),
        ("infrared circle", []),
    ],
)
def test_scene_mentions(text: str, expected: list[str]) -> None:
    assert SCENES.mentions(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man walks his dogs past two men and a woman.", ["person", "dog", "person", "person"]),
        ("two humans, a fireman and firemen", ["person"] * 3),
        ("a hot dog beside a dog", ["hot dog", "dog"]),
        ("Hot-dogs; hot, dog", ["hot dog", "dog"]),
        ("a teddy bear, a bear cub, a polar bear", ["teddy bear", "bear", "bear"]),
        ("people on benches with knives", ["person", "bench", "knife"]),
        ("three sheep, two buses, mice, scissors", ["sheep", "bus", "mouse", "scissors"]),
        ("glasses of wine and a wine glass", ["wine glass", "wine glass"]),
        ("a roll of toilet paper next to the train tracks", []),
        ("the toilet bowl", ["toilet"]),
        ("a baby elephant and a baby", ["elephant", "person"]),
        ("a passenger train", ["train"]),
        ("carrot cakes", ["cake"]),
        ("The dog’s ball and the cat's bed", ["dog", "sports ball", "cat"]),
        ("no dog, not a cat, without any people, a horse", ["horse"]),
        ("there isn't a dog", []),
        ("sofa in front of the television", ["couch", "tv"]),
        ("a stoplight and a stop sign", ["traffic light", "stop sign"]),
        ("doggedly catching cards", []),
    ],
)
def test_coco_mentions(text: str, expected: list[str]) -> None:
    assert COCO.mentions(text) == expected


def test_counts_read_number_words_and_repeats() -> None:
    assert SCENES.counts("two red circles, a red circle, 3 blue squares") == {"red circle": 3, "blue rectangle": 3}
    assert SCENES.counts("no red circles, zero blue squares") == {}


def test_every_caption_of_every_scene_object_is_read() -> None:
    names = [f"{colour} {shape}" for colour in COLOUR_NAMES for shape in SHAPES]
    assert SCENES.objects == tuple(names)
    random = Random(0)
    for _ in range(200):
        said = [random.choice(names) for _ in range(random.randint(0, 6))]
        assert SCENES.mentions(", ".join(said)) == said
        assert SCENES.mentions(" and ".join(f"{name}s" for name in said)) == said


def slow_mentions(text: str) -> list[str]:
    """COCO objects in a text of plain lower-case words, by trying every phrase at every place, longest first."""
    phrases = {name: name for name in COCO.objects}
    for name in COCO.objects:
        phrases |= {other: name for other in coco_synonyms().get(name, ()) if other not in phrases}
    found: list[str] = []
    while text:
        fits = [phrase for phrase in phrases if f"{text} ".startswith(f"{phrase} ")]
        if fits:
            best = max(fits, key=len)
            found.append(phrases[best])
            text = text.removeprefix(best).lstrip()
        else:
            text = text.partition(" ")[2]
    return found


def test_longest_match_against_trying_every_phrase() -> None:
    words = WORDS.split()
    random = Random(1)
    for _ in range(100):
        text = " ".join(random.choices(words, k=12))
        assert COCO.mentions(text) == slow_mentions(text), text


def test_own_names_come_before_other_objects_synonyms() -> None:
    vocabulary = ObjectVocabulary({"vehicle": ["car", "van"], "car": []})
    assert vocabulary.mentions("a car, two vans") == ["car", "vehicle"]


def test_the_synonym_table_names_categories_and_shares_no_name() -> None:
    table = coco_synonyms()
    names = [other for others in table.values() for other in others]
    assert len(names) == len(set(names))
    assert not set(names) & set(table)
    assert all(name == name.strip().lower() and name for name in [*names, *table])


def test_a_vocabulary_survives_its_file() -> None:
    again = ObjectVocabulary.from_json(COCO.to_json())
    assert again.objects == COCO.objects
    for text in ("people, toilet paper, a hot dog", "sofas"):
        assert again.mentions(text) == COCO.mentions(text)


@pytest.mark.parametrize("data", [b"", b"[]", b'{"objects": []}', b'{"objects": {"a": 3}, "misleading": []}', b"\xff"])
def test_a_damaged_file_is_one_clear_error(data: bytes) -> None:
    with pytest.raises(DataError, match="object vocabulary is damaged"):
        ObjectVocabulary.from_json(data)


def test_an_object_without_words_is_refused() -> None:
    with pytest.raises(DataError, match="has no words"):
        ObjectVocabulary({"??": []})
