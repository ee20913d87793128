"""Existence questions: negatives are absent, and each kind is what it says, by plain counting over all pictures."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from sparsight.config import CocoSource, DataConfig, HallucinationConfig, ScenesSource
from sparsight.data.coco import AnnotatedPictures, read_coco
from sparsight.data.objects import ObjectVocabulary
from sparsight.data.pope import KINDS, ExistenceQuestions, alike, questions_about_coco, questions_about_scenes
from sparsight.data.samples import Rows
from sparsight.data.scene_questions import absent_pairs, drawn_scenes, scene_samples
from sparsight.records import Quarantined, Sample, Turn

SOURCE = ScenesSource(kind="scenes", pictures=1, test_pictures=150)
SCENES = ObjectVocabulary.scenes()


def settings(**values: int) -> DataConfig:
    return DataConfig(sources=[SOURCE], hallucination=HallucinationConfig(**values))


def samples(rows: Rows) -> list[Sample]:
    found = list(rows.items)
    assert len(found) == rows.total
    return [row for row in found if isinstance(row, Sample)]


ASKED = samples(questions_about_scenes(SOURCE, settings(questions=2), 3, ())[0])
DRAWN = list(drawn_scenes(SOURCE, "test", 3))
SHOWN = [{item.name for item in drawn.scene.objects} for drawn in DRAWN]


def asked_for(turns: tuple[Turn, ...], kind: str, vocabulary: ObjectVocabulary = SCENES) -> list[str]:
    chosen = [turn for turn in turns if turn.answer_type == f"pope_{kind}"]
    named = [vocabulary.mentions(turn.question) for turn in chosen]
    assert all(len(names) == 1 for names in named)
    return [names[0] for names in named]


def test_scenes_are_those_of_the_other_test_questions() -> None:
    pictures = list(dict.fromkeys(sample.content_hash for sample in scene_samples(SOURCE, "test", 3, 8)))
    assert [sample.content_hash for sample in ASKED] == pictures
    banned = {pictures[0], pictures[4]}
    others = samples(questions_about_scenes(SOURCE, settings(), 3, banned)[0])
    assert len(others) == 150
    assert not banned & {sample.content_hash for sample in others}


def test_present_objects_are_there_and_absent_ones_are_not() -> None:
    for sample, there in zip(ASKED, SHOWN, strict=True):
        present = asked_for(sample.turns, "present")
        assert set(present) <= there
        assert len(set(present)) == len(present) == min(2, len(there))
        for kind in KINDS:
            absent = asked_for(sample.turns, kind)
            assert not set(absent) & there
            assert len(set(absent)) == len(absent) == len(present)
        answers = {turn.answer_type: turn.answer for turn in sample.turns if turn.answer_type.startswith("pope")}
        assert answers == {"pope_present": "yes"} | {f"pope_{kind}": "no" for kind in KINDS}


def test_popular_objects_are_the_most_frequent_absent_ones() -> None:
    frequency = {name: sum(name in there for there in SHOWN) for name in SCENES.objects}
    for sample, there in zip(ASKED, SHOWN, strict=True):
        left = sorted((frequency[name] for name in SCENES.objects if name not in there), reverse=True)
        assert [frequency[name] for name in asked_for(sample.turns, "popular")] == left[:2][: min(2, len(there))]


def test_adversarial_objects_have_the_colours_and_shapes_of_the_picture() -> None:
    hardest = 0
    for sample, drawn in zip(ASKED, DRAWN, strict=True):
        hard, near = ({" ".join(pair) for pair in pairs} for pairs in absent_pairs(drawn.scene))
        asked = set(asked_for(sample.turns, "adversarial"))
        expected = min(len(hard), len(asked))
        assert len(asked & hard) == expected
        assert asked <= near
        hardest += expected
    assert hardest > 150  # most scenes have a pair whose colour and shape are both there


def test_adversarial_objects_among_equally_alike_ones_appear_together_most() -> None:
    shown = [{"cup", "spoon"}, {"cup", "spoon"}, {"cup", "dog"}, {"cat"}, {"cat"}, {"cat"}]
    questions = ExistenceQuestions(["cat", "cup", "dog", "spoon", "tie"], shown)
    for seed in range(20):
        chosen = questions.choose({"cup"}, 1, Random(seed))
        assert chosen["pope_adversarial"] == ["spoon"]
        assert chosen["pope_popular"] == ["cat"]
        assert chosen["pope_present"] == ["cup"]
        assert questions.choose({"cat", "spoon"}, 2, Random(seed))["pope_adversarial"][0] == "cup"
    drawn = Counter(questions.choose({"cup"}, 1, Random(seed))["pope_random"][0] for seed in range(400))
    assert set(drawn) == {"cat", "dog", "spoon", "tie"}
    assert min(drawn.values()) > 60


def test_likeness_counts_colour_and_shape() -> None:
    present = ["red circle", "blue triangle"]
    assert [alike(name, present) for name in ("red triangle", "red rectangle", "teal circle", "teal rectangle")] == [
        2,
        1,
        1,
        0,
    ]


def test_no_more_is_asked_than_there_is() -> None:
    questions = ExistenceQuestions(["a", "b", "c"], [{"a"}, {"a", "b", "c"}])
    assert {kind: len(names) for kind, names in questions.choose({"a", "b"}, 5, Random(0)).items()} == {
        "pope_present": 1,
        "pope_random": 1,
        "pope_popular": 1,
        "pope_adversarial": 1,
    }
    assert not any(questions.choose({"a", "b", "c"}, 5, Random(0)).values())
    assert not any(questions.choose(set(), 5, Random(0)).values())


def test_every_scene_is_described_with_all_its_objects() -> None:
    for sample, drawn in zip(ASKED, DRAWN, strict=True):
        turn = sample.turns[-1]
        assert turn.answer_type == "description"
        assert sorted(SCENES.mentions(str(turn.answer))) == sorted(item.name for item in drawn.scene.objects)
        usual = [turn for turn in sample.turns if turn.question.startswith("list the shapes from ")]
        assert usual == [turn]


def test_same_seed_same_questions_and_fewer_pictures_change_none() -> None:
    again = samples(questions_about_scenes(SOURCE, settings(questions=2, pictures=10), 3, ())[0])
    assert again == ASKED[:10]
    other = samples(questions_about_scenes(SOURCE, settings(questions=2), 4, ())[0])
    assert [sample.turns for sample in other] != [sample.turns for sample in ASKED]


@pytest.fixture
def coco(tmp_path: Path, picture_bytes: Callable[..., bytes]) -> tuple[AnnotatedPictures, CocoSource]:
    """Six pictures: one broken, one missing, one without objects, one whose name leads out; two are usable."""
    names = ["good.png", "broken.png", "missing.png", "empty.png", "../out.png", "apple.png"]
    (tmp_path / "pictures").mkdir()
    for number, name in enumerate(["good.png", "broken.png", "empty.png", "../out.png", "apple.png"]):
        data = picture_bytes(f"#{number:02d}0000")
        (tmp_path / "pictures" / name).write_bytes(data[:40] if name == "broken.png" else data)
    content = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [{"image_id": number, "category_id": 1} for number in (0, 1, 2, 4)]
        + [{"image_id": 5, "category_id": 2}, {"image_id": 0, "category_id": 3}],
        "categories": [{"id": 1 + n, "name": name} for n, name in enumerate(("dog", "apple", "bear", "teddy bear"))],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    source = CocoSource(kind="coco", annotations=str(path), pictures=str(tmp_path / "pictures"))
    return read_coco(source), source


def test_real_pictures_are_asked_and_bad_ones_accounted_for(coco: tuple[AnnotatedPictures, CocoSource]) -> None:
    annotated, source = coco
    rows = questions_about_coco(annotated, source, settings(questions=3), 0, ())
    found = list(rows.items)
    assert len(found) == rows.total == 6
    bad = {row.id: row.reason for row in found if isinstance(row, Quarantined)}
    assert list(bad) == ["coco/../out.png", "coco/broken.png", "coco/empty.png", "coco/missing.png"]
    for reason, words in zip(
        bad.values(), ("leads out", "not a readable|broken", "no annotated object", "is missing"), strict=True
    ):
        assert any(word in reason for word in words.split("|"))
    apple, good = (row for row in found if isinstance(row, Sample))
    assert (apple.id, good.id) == ("coco/apple.png", "coco/good.png")
    assert asked_for(good.turns, "present", annotated.vocabulary) in (["dog", "bear"], ["bear", "dog"])
    for kind in KINDS:
        assert sorted(asked_for(good.turns, kind, annotated.vocabulary)) == ["apple", "teddy bear"]
    assert apple.turns[0] == Turn("Is there an apple in the image?", "yes", "pope_present")
    assert good.turns[-1] == Turn("Describe the image in detail.", "bear, dog", "description")


def test_training_pictures_are_not_asked_about(coco: tuple[AnnotatedPictures, CocoSource]) -> None:
    annotated, source = coco
    usable = samples(questions_about_coco(annotated, source, settings(), 0, ()))
    rows = questions_about_coco(annotated, source, settings(), 0, {usable[0].content_hash})
    reasons = {row.id: row.reason for row in rows.items if isinstance(row, Quarantined)}
    assert reasons[usable[0].id] == "the picture is a training picture"


def test_the_seed_chooses_where_fewer_pictures_are_wanted(coco: tuple[AnnotatedPictures, CocoSource]) -> None:
    annotated, source = coco
    chosen = set[str]()
    for seed in range(30):
        rows = questions_about_coco(annotated, source, settings(pictures=2), seed, ())
        ids = [row.id for row in rows.items]
        assert len(ids) == 2
        assert ids == sorted(ids)
        chosen.update(ids)
    assert len(chosen) == 6
