"""Scores of descriptions and existence questions against values worked out by hand."""

from dataclasses import replace

import pytest

from sparsight.config import DataConfig, HallucinationConfig, ScenesSource
from sparsight.data.objects import ObjectVocabulary
from sparsight.data.pope import KINDS, questions_about_scenes
from sparsight.evaluate.answers import Answer, Examiner
from sparsight.evaluate.hallucination import chair, hallucination, hallucination_figures, pope, says_yes
from sparsight.evaluate.scores import ratio, share, wilson
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import Sample

COCO = ObjectVocabulary.coco(["person", "dog", "hot dog", "couch", "cat"])


def described(said: str, there: str, picture: str = "p") -> Answer:
    return Answer("id", picture, "Describe the image in detail.", there, said, "description")


def asked(said: str, there: bool, kind: str, picture: str = "p") -> Answer:
    return Answer("id", picture, "Is there a dog in the image?", "yes" if there else "no", said, f"pope_{kind}")


def test_a_description_with_known_inventions() -> None:
    """Four names, of which "two cats" and "cats" are of nothing there; of three objects two are named."""
    found = chair([described("A woman with a puppy and two cats. The cats sleep.", "person, dog, couch")], COCO)
    assert (found.response.right, found.response.count) == (1, 1)
    assert (found.object.right, found.object.count) == (2, 4)
    assert (found.recall.right, found.recall.count) == (2, 3)
    assert found.mentions_per_answer == 4.0


@pytest.mark.parametrize(
    ("said", "there", "invented", "found"),
    [
        ("", "dog, person", (0, 0), (0, 2)),  # saying nothing invents nothing and finds nothing
        ("a nice picture", "dog", (0, 0), (0, 1)),
        ("a sofa and two kittens", "cat, couch", (0, 2), (2, 2)),  # synonyms and plurals
        ("a hot dog", "dog", (1, 1), (0, 1)),  # a longer name is no shorter one
        ("a hot dog and a dog", "dog", (1, 2), (1, 1)),
        ("no dog, a cat", "cat", (0, 1), (1, 1)),
        ("dogs, dogs, dogs", "dog, dog", (0, 3), (1, 1)),  # an object is found once
    ],
)
def test_descriptions_one_by_one(said: str, there: str, invented: tuple[int, int], found: tuple[int, int]) -> None:
    result = chair([described(said, there)], COCO)
    assert (result.object.right, result.object.count) == invented
    assert (result.recall.right, result.recall.count) == found
    assert result.response.right == (invented[0] > 0)


def test_shares_over_several_descriptions_have_intervals_over_pictures() -> None:
    answers = [
        described("a dog and a cat", "dog", "one"),
        described("a dog", "dog", "two"),
        described("a cat, a cat, a person", "person", "three"),
        described("", "person", "four"),
    ]
    found = chair(answers, COCO)
    assert found.response == share([True, False, True, False], ["one", "two", "three", "four"])
    assert found.object == share([False, True, False, True, True, False], ["one"] * 2 + ["two"] + ["three"] * 3)
    assert found.recall == share([True, True, True, False], ["one", "two", "three", "four"])
    assert found.mentions_per_answer == 1.5


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("yes", True),
        ("Yes, there is a dog.", True),
        ("There are two dogs. No cat.", True),
        ("no", False),
        ("No, there is a cat.", False),
        ("There isn’t a dog", False),
        ("I do not see one. Yes!", False),
        ("there is nothing", False),
        ("", None),
        ("red circle", None),
        ("yesterday I know", None),
    ],
)
def test_yes_and_no_in_words(text: str, verdict: bool | None) -> None:
    assert says_yes(text) is verdict


def test_existence_scores_by_hand() -> None:
    """3 of 5 objects found, 1 of 5 absent ones affirmed, one answer of each side says neither yes nor no."""
    present = [asked(text, True, "present", str(n)) for n, text in enumerate(["yes", "Yes.", "yes", "no", "circle"])]
    absent = [asked(text, False, "random", str(n)) for n, text in enumerate(["no", "yes", "No.", "no", ""])]
    found = pope(present, absent)
    assert (found.accuracy.right, found.accuracy.count) == (6, 10)
    assert (found.precision.right, found.precision.count) == (3, 4)
    assert (found.recall.right, found.recall.count) == (3, 5)
    assert (found.yes_rate.right, found.yes_rate.count) == (4, 10)
    precision, recall = 3 / 4, 3 / 5
    assert found.f1.value == pytest.approx(2 * precision * recall / (precision + recall))
    assert 0.0 <= found.f1.low < found.f1.value < found.f1.high <= 1.0


def test_the_extremes() -> None:
    sides = [
        [asked(text, there, "random", str(n)) for n in range(50)] for text, there in (("yes", True), ("no", False))
    ]
    right = pope(*sides)
    assert right.f1.value == right.accuracy.value == right.precision.value == 1.0
    assert (right.f1.low, right.f1.high) == pytest.approx(wilson(1.0, 50))
    assert right.yes_rate.value == 0.5
    silent = pope([asked("no", True, "present")], [asked("no", False, "random")])
    assert (silent.f1.value, silent.precision.count, silent.recall.value) == (0.0, 0, 0.0)
    agreeable = pope([asked("yes", True, "present")], [asked("yes", False, "random")])
    assert agreeable.f1.value == pytest.approx(2 / 3)
    assert agreeable.yes_rate.value == 1.0


def test_a_ratio_of_single_questions_is_a_share() -> None:
    right = [number % 3 == 0 for number in range(60)]
    pictures = [str(number // 4) for number in range(60)]
    expected, found = share(right, pictures), ratio(right, [1.0] * 60, pictures)
    assert (found.value, found.low, found.high) == (expected.value, expected.low, expected.high)


def test_answers_are_sorted_by_what_was_asked() -> None:
    answers = [
        asked("yes", True, "present"),
        asked("no", False, "random"),
        asked("yes", False, "adversarial"),
        described("a dog", "dog"),
        Answer("id", "p", "what is it?", "a dog", "a cat", "open"),
    ]
    found = hallucination(answers, COCO)
    assert list(found.pope) == ["random", "adversarial"]  # of the popular ones none was asked
    assert found.pope["random"].accuracy.value == 1.0
    assert found.pope["adversarial"].accuracy.value == 0.5
    assert found.chair is not None
    assert found.chair.response.count == 1
    nothing = hallucination(answers[-1:], COCO)
    assert (nothing.chair, nothing.pope) == (None, {})


def test_figures_have_the_names_that_programs_read() -> None:
    answers = [asked("yes", True, "present"), asked("no", False, "adversarial"), described("a cat", "dog")]
    found = hallucination_figures("student", hallucination(answers, COCO))
    names = ["chair_response", "chair_object", "chair_recall"]
    names += [f"pope_adversarial_{name}" for name in ("accuracy", "precision", "recall", "f1", "yes_rate")]
    expected = {f"student_{name}{end}" for name in names for end in ("", "_low", "_high")}
    assert set(found) == expected | {"student_chair_mentions_per_answer"}
    assert (found["student_chair_response"], found["student_pope_adversarial_f1"]) == (1.0, 1.0)
    silent = hallucination_figures("student", hallucination([described("", "dog")], COCO))
    assert "student_chair_object" not in silent  # a share of nothing
    assert silent["student_chair_recall"] == 0.0


def test_a_model_that_says_what_the_references_say_invents_nothing() -> None:
    """The whole path over scenes: perfect answers score perfectly, exchanged ones do not."""
    source = ScenesSource(kind="scenes", pictures=1, test_pictures=30)
    data = DataConfig(sources=[source], hallucination=HallucinationConfig(questions=2))
    rows, vocabulary = questions_about_scenes(source, data, 0, ())
    told = [
        Answer(row.id, row.content_hash, turn.question, str(turn.answer), str(turn.answer), turn.answer_type)
        for row in rows.items
        if isinstance(row, Sample)
        for turn in row.turns
    ]
    perfect = hallucination(told, vocabulary)
    assert perfect.chair is not None
    assert (perfect.chair.response.value, perfect.chair.recall.value) == (0.0, 1.0)
    assert [perfect.pope[kind].f1.value for kind in KINDS] == [1.0] * 3
    pictures = [one for one in told if one.answer_type == "description"]
    exchanged = [replace(one, answer=other.answer) for one, other in zip(pictures, pictures[::-1], strict=True)]
    worse = hallucination(exchanged, vocabulary)
    assert worse.chair is not None
    assert worse.chair.response.value > 0.5


def test_asking_alone_gives_the_answers_of_an_examination(model: VisionLanguageModel, samples: list[Sample]) -> None:
    examiner = Examiner(model, batch=7, max_answer_tokens=3)
    asked_alone = examiner.ask(samples)
    assert asked_alone.answers == examiner.examine(samples).answers
    assert asked_alone.states_nD.size == 0
    assert not asked_alone.expert_counts
