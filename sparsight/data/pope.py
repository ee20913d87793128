"""Questions that a model can only answer wrongly by seeing what is not there: existence questions and descriptions.

As POPE does (Li et al., arXiv 2305.10355), every picture is asked for objects that it shows and for as many that it
does not, of three kinds: random ones, the most frequent ones of the set, and those that its own objects make likely.
One request to describe the picture follows, for scoring as CHAIR does (`objects`). Pictures are drawn scenes or
come with COCO-style annotations. Called by `pipelines.prepare`; answers are scored in `evaluate.hallucination`.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from sparsight.config import CocoSource, DataConfig, ScenesSource
from sparsight.data.coco import AnnotatedPictures
from sparsight.data.files import picture_path, read_picture
from sparsight.data.objects import ObjectVocabulary
from sparsight.data.samples import Rows
from sparsight.data.scene_questions import DrawnScene, description, drawn_scenes
from sparsight.errors import DataError
from sparsight.records import Quarantined, Sample, Turn

KINDS = ("random", "popular", "adversarial")
"""Kinds of absent objects; answers to their questions have the type `pope_<kind>`."""
PRESENT = "pope_present"
DESCRIPTION = "description"

Likeness = Callable[[str, Collection[str]], int]
"""How much an object is like those that a picture shows."""


def unlike(name: str, present: Collection[str]) -> int:
    """No object is like another."""
    return 0


class ExistenceQuestions:
    """Chooses which objects the pictures of one set are asked for, from what all its pictures show."""

    def __init__(self, objects: Sequence[str], shown: Iterable[Collection[str]], likeness: Likeness = unlike) -> None:
        """`objects` are all that may be asked for, `shown` those in each picture of the set."""
        self.objects = tuple(objects)
        self.likeness = likeness
        self.frequency: Counter[str] = Counter()
        """In how many pictures each object is."""
        self.together: Counter[tuple[str, str]] = Counter()
        """In how many pictures two objects are."""
        for names in shown:
            self.frequency.update(set(names))
            self.together.update((one, other) for one in set(names) for other in set(names))

    def choose(self, present: Collection[str], most: int, random: Random) -> dict[str, list[str]]:
        """Up to `most` objects that are there, and as many absent ones of each kind, by answer type.

        popular: the most frequent of the set. adversarial: those most like what the picture shows, among equals those
        that are most often in pictures with its objects. Ties are drawn.
        """
        there = [name for name in self.objects if name in present]
        absent = [name for name in self.objects if name not in present]
        number = min(most, len(there), len(absent))

        def popularity(name: str) -> tuple[int, ...]:
            return (self.frequency[name],)

        def plausibility(name: str) -> tuple[int, ...]:
            return self.likeness(name, there), sum(self.together[name, other] for other in there)

        chosen = {PRESENT: random.sample(there, number), "pope_random": random.sample(absent, number)}
        for kind, rank in (("popular", popularity), ("adversarial", plausibility)):
            random.shuffle(absent)
            chosen[f"pope_{kind}"] = sorted(absent, key=rank, reverse=True)[:number]
        return chosen


def alike(name: str, present: Collection[str]) -> int:
    """How many of a scene object's words, its colour and its shape, describe something in the picture."""
    words = {word for other in present for word in other.split()}
    return sum(word in words for word in name.split())


def questions_about_scenes(
    source: ScenesSource, data: DataConfig, seed: int, exclude: Collection[str]
) -> tuple[Rows, ObjectVocabulary]:
    """Held-out scenes, the same as in the test set of their other questions, and the objects they are asked for."""
    vocabulary = ObjectVocabulary.scenes()
    settings = data.hallucination
    scenes = list(drawn_scenes(source, "test", seed, exclude))
    shown = [{item.name for item in drawn.scene.objects} for drawn in scenes]
    questions = ExistenceQuestions(vocabulary.objects, shown, alike)

    def sample(number: int, drawn: DrawnScene) -> Sample:
        random = Random(f"pope/scenes/{seed}/{number}")
        chosen = questions.choose(shown[number], settings.questions, random)
        turns = _existence_turns(chosen, lambda name: f"is there a {name} in the image?")
        turns.append(replace(description(drawn.scene), answer_type=DESCRIPTION))
        return Sample(f"pope/{number}", (drawn.picture,), tuple(turns), "scenes", independent=True)

    wanted = scenes[: settings.pictures]
    items = (sample(number, drawn) for number, drawn in enumerate(wanted))
    return Rows(len(wanted), items), vocabulary


def questions_about_coco(
    annotated: AnnotatedPictures, source: CocoSource, data: DataConfig, seed: int, exclude: Collection[str]
) -> Rows:
    """Pictures with COCO-style annotations, chosen by `seed` where `data.hallucination.pictures` asks for fewer.

    Pictures that cannot be read, that show no annotated object, or whose content hash is in `exclude` (training
    pictures) come out quarantined. Frequencies are those of the whole annotation file.
    """
    names = sorted(annotated.objects_of)
    settings = data.hallucination
    if settings.pictures is not None and settings.pictures < len(names):
        names = sorted(Random(f"pope/coco/{seed}").sample(names, settings.pictures))
    questions = ExistenceQuestions(annotated.vocabulary.objects, list(annotated.objects_of.values()))

    def sample(name: str) -> Sample:
        present = annotated.objects_of[name]
        if not present:
            raise DataError("the picture has no annotated object")
        picture = read_picture(picture_path(name, Path(source.pictures)), data)
        chosen = questions.choose(present, settings.questions, Random(f"pope/coco/{seed}/{name}"))
        turns = _existence_turns(chosen, lambda name: f"Is there {_article(name)} {name} in the image?")
        turns.append(Turn(source.description_prompt, ", ".join(present), DESCRIPTION))
        found = Sample(f"coco/{name}", (picture,), tuple(turns), "coco", independent=True)
        if found.content_hash in exclude:
            raise DataError("the picture is a training picture")
        return found

    def items() -> Iterator[Sample | Quarantined]:
        for name in names:
            try:
                yield sample(name)
            except DataError as error:
                yield Quarantined(f"coco/{name}", source.annotations, str(error))

    return Rows(len(names), items())


def _existence_turns(chosen: Mapping[str, Sequence[str]], question: Callable[[str], str]) -> list[Turn]:
    return [
        Turn(question(name), "yes" if kind == PRESENT else "no", kind)
        for kind, names in chosen.items()
        for name in names
    ]


def _article(name: str) -> str:
    return "an" if name[:1] in tuple("aeiou") else "a"
