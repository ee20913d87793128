"""Which objects a text speaks of: words of an answer to the objects of a closed vocabulary.

An `ObjectVocabulary` knows each object's names, their plurals, and phrases that only look like an object. It reads
words, not sentences: it does not resolve "it", and a word of two meanings ("orange") is the object, as in CHAIR
(Rohrbach et al., arXiv 1809.02156). Called by the makers of existence questions, by judges of answers, and by the
evaluation of hallucination.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product

from sparsight.data.coco_names import coco_synonyms, not_objects
from sparsight.data.scenes import COLOUR_NAMES, SHAPES
from sparsight.errors import DataError

VOCABULARY = "objects.json"
"""The file of a sample folder whose answers are read for objects: the vocabulary to read them with."""

SCENE_SYNONYMS: dict[str, tuple[str, ...]] = {
    "gray": ("grey",),
    "circle": ("disc", "disk"),
    "rectangle": ("square",),
}

IRREGULAR: dict[str, tuple[str, ...]] = {
    "person": ("people", "persons"),
    "man": ("men",),
    "woman": ("women",),
    "human": ("humans",),
    "child": ("children",),
    "knife": ("knives",),
    "mouse": ("mice",),
    "sheep": ("sheep",),
    "calf": ("calves",),
    "goose": ("geese",),
    "ox": ("oxen",),
}

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DENIALS = frozenset({"no", "not", "without", "neither", "nor", "zero"})
BETWEEN_DENIAL_AND_OBJECT = frozenset({"a", "an", "any", "the", "other"})


class ObjectVocabulary:
    """A closed set of objects and what they are called.

    `names` maps each object to its other names, in the singular; plurals follow. `misleading` phrases hold
    an object's name and mean something else ("toilet paper"). Where two objects share a name, it is the one whose own
    name it is, else the first one's.
    """

    def __init__(self, names: Mapping[str, Sequence[str]], misleading: Iterable[str] = ()) -> None:
        self._other_names = {name: tuple(others) for name, others in names.items()}
        self._misleading = tuple(misleading)
        self._terms: dict[tuple[str, ...], str | None] = {}
        for name in names:
            self._add(name, name)
        for name, others in names.items():
            for other in others:
                self._add(other, name)
        for phrase in self._misleading:
            self._add(phrase, None)
        self._longest = max(map(len, self._terms), default=0)

    def _add(self, term: str, name: str | None) -> None:
        words = _words(term)
        if not any(word.isalnum() for word in words):
            raise DataError(f"the object name {term!r} has no words: give every object a name")
        for form in (words, *_plurals(words)):
            self._terms.setdefault(form, name)

    @staticmethod
    def scenes() -> "ObjectVocabulary":
        """Drawn scenes: every "<colour> <shape>"; a colour or a shape alone is no object."""
        names: dict[str, list[str]] = {}
        for colour, shape in product(COLOUR_NAMES, SHAPES):
            colours = (colour, *SCENE_SYNONYMS.get(colour, ()))
            shapes = (shape, *SCENE_SYNONYMS.get(shape, ()))
            names[f"{colour} {shape}"] = [f"{one} {other}" for one, other in product(colours, shapes)][1:]
        return ObjectVocabulary(names)

    @staticmethod
    def coco(categories: Iterable[str]) -> "ObjectVocabulary":
        """Categories of an annotation file; COCO's eighty bring their usual synonyms."""
        synonyms = coco_synonyms()
        return ObjectVocabulary({name: synonyms.get(name, ()) for name in categories}, not_objects())

    @property
    def objects(self) -> tuple[str, ...]:
        """All objects, in the order given."""
        return tuple(self._other_names)

    def mentions(self, text: str) -> list[str]:
        """The objects that a text says are there, in its order, once for each time it names them.

        The longest name counts ("hot dog" is no dog), a denied one does not ("no dog", "without a dog"). Names do not
        reach across punctuation.
        """
        return [name for name, _ in self._claims(text)]

    def counts(self, text: str) -> Counter[str]:
        """How many of each object a text claims: "two red circles, a red circle" are three red circles."""
        claimed: Counter[str] = Counter()
        for name, number in self._claims(text):
            claimed[name] += number
        return claimed

    def _claims(self, text: str) -> list[tuple[str, int]]:
        words = _words(text)
        claims: list[tuple[str, int]] = []
        place = 0
        while place < len(words):
            end = self._match(words, place)
            if end == place:
                place += 1
                continue
            name = self._terms[words[place:end]]
            if name is not None and not _denied(words[:place]):
                claims.append((name, _number(words[place - 1]) if place else 1))
            place = end
        return claims

    def _match(self, words: tuple[str, ...], place: int) -> int:
        """Where the longest known phrase that starts at `place` ends; `place` itself where there is none."""
        ends = range(min(len(words), place + self._longest), place, -1)
        return next((end for end in ends if words[place:end] in self._terms), place)

    def to_json(self) -> bytes:
        """The vocabulary as JSON; `from_json` gives an equal one."""
        return json.dumps({"objects": self._other_names, "misleading": self._misleading}, indent=1).encode()

    @staticmethod
    def from_json(data: bytes) -> "ObjectVocabulary":
        """Raises `DataError` for anything that `to_json` does not write."""
        try:
            values = json.loads(data)
            return ObjectVocabulary(values["objects"], values["misleading"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"the object vocabulary is damaged ({error!r}): prepare its folder again") from error


def _words(text: str) -> tuple[str, ...]:
    """Lower-case words, and punctuation and line ends as words of their own; hyphens join nothing, 's is dropped."""
    text = text.lower().replace("’", "'").replace("n't", " not")
    text = re.sub(r"'s\b", "", text)
    text = re.sub(r"(?<=\w)[-_](?=\w)", " ", text)
    return tuple(re.findall(r"[^\W_]+|[^\w\s]|\n", text))


def _plurals(words: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The last word in the plural, or the word before "of" ("slices of pizza")."""
    head = words.index("of") - 1 if "of" in words[1:] else len(words) - 1
    return [(*words[:head], form, *words[head + 1 :]) for form in _plural(words[head])]


def _plural(word: str) -> tuple[str, ...]:
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith("man"):
        return (f"{word[:-2]}en",)
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return (f"{word}es",)
    if word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        return (f"{word[:-1]}ies",)
    if word.endswith("o"):
        return f"{word}s", f"{word}es"
    return (f"{word}s",)


def _denied(before: tuple[str, ...]) -> bool:
    if before and before[-1] in BETWEEN_DENIAL_AND_OBJECT:
        before = before[:-1]
    return bool(before) and before[-1] in DENIALS


def _number(word: str) -> int:
    if re.fullmatch(r"[1-9]\d?", word):
        return int(word)
    return NUMBERS.index(word) + 1 if word in NUMBERS else 1
