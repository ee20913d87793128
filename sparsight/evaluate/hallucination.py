"""How often a model speaks of objects that are not in the picture: CHAIR over descriptions, POPE over questions.

Reads answers to the questions of `data.pope`: descriptions, whose reference names what is there, and existence
questions. All intervals are 95 %, over pictures. Asks no model and knows no picture. Called by `pipelines.evaluate`.
"""

import re
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from sparsight.data.objects import ObjectVocabulary
from sparsight.data.pope import DESCRIPTION, KINDS, PRESENT
from sparsight.evaluate.answers import Answer
from sparsight.evaluate.scores import Ratio, Share, ratio, share

DENIALS = frozenset({"no", "not", "none", "nothing"})
AGREEMENTS = frozenset({"yes", "yeah", "yep"})


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Chair(_Result):
    """Descriptions against what is there (CHAIR, Rohrbach et al., arXiv 1809.02156); `right` of a share is what it
    counts, not what is good."""

    response: Share
    """Descriptions that name at least one object that is not there, of all descriptions."""
    object: Share
    """Names of objects that are not there, of all names of objects, repeats included."""
    recall: Share
    """Different objects of the pictures that their descriptions name: who says nothing invents nothing."""
    mentions_per_answer: float
    """Names of objects in a description, repeats included, on average."""


class Pope(_Result):
    """Existence questions with one kind of absent objects (POPE, Li et al., arXiv 2305.10355); "yes" is positive."""

    accuracy: Share
    precision: Share
    """Objects that are there, of those the model says yes to; of nothing where it never does."""
    recall: Share
    f1: Ratio
    yes_rate: Share


class Hallucination(_Result):
    """One model on the questions about one set of pictures; what was not asked is not here."""

    chair: Chair | None
    pope: dict[str, Pope]
    """By kind of absent objects: random, popular, adversarial."""


def hallucination(answers: Sequence[Answer], vocabulary: ObjectVocabulary) -> Hallucination:
    """Score the answers whose types are those of `data.pope`; others are passed over."""
    descriptions = [answer for answer in answers if answer.answer_type == DESCRIPTION]
    present = [answer for answer in answers if answer.answer_type == PRESENT]
    absent = {kind: [answer for answer in answers if answer.answer_type == f"pope_{kind}"] for kind in KINDS}
    return Hallucination(
        chair=chair(descriptions, vocabulary) if descriptions else None,
        pope={kind: pope(present, of_kind) for kind, of_kind in absent.items() if present and of_kind},
    )


def chair(descriptions: Sequence[Answer], vocabulary: ObjectVocabulary) -> Chair:
    """Scores of one or more descriptions; the objects that are there are those that a description's reference names."""
    invented: list[list[bool]] = []
    found: list[list[bool]] = []
    for answer in descriptions:
        there = dict.fromkeys(vocabulary.mentions(answer.reference))
        said = vocabulary.mentions(answer.answer)
        invented.append([name not in there for name in said])
        found.append([name in said for name in there])
    pictures = [answer.picture for answer in descriptions]
    return Chair(
        response=share([any(flags) for flags in invented], pictures),
        object=_flat_share(invented, pictures),
        recall=_flat_share(found, pictures),
        mentions_per_answer=sum(map(len, invented)) / len(descriptions),
    )


def _flat_share(flags: Sequence[Sequence[bool]], pictures: Sequence[str]) -> Share:
    rows = [(flag, picture) for group, picture in zip(flags, pictures, strict=True) for flag in group]
    return share([flag for flag, _ in rows], [picture for _, picture in rows])


def pope(present: Sequence[Answer], absent: Sequence[Answer]) -> Pope:
    """Scores of questions about objects that are there and about as many that are not, one of each at least.

    An answer that says neither yes nor no is wrong, and no yes. F1 is TP / (TP + (FP + FN) / 2).
    """
    answers = [*present, *absent]
    pictures = [answer.picture for answer in answers]
    there = [True] * len(present) + [False] * len(absent)
    said = [says_yes(answer.answer) for answer in answers]
    yes = [one is True for one in said]
    hits = [one and other for one, other in zip(yes, there, strict=True)]
    misses = [one != other for one, other in zip(yes, there, strict=True)]

    def over(chosen: Sequence[bool]) -> Share:
        rows = [index for index, wanted in enumerate(chosen) if wanted]
        return share([said[index] is there[index] for index in rows], [pictures[index] for index in rows])

    return Pope(
        accuracy=over([True] * len(answers)),
        precision=over(yes),
        recall=over(there),
        f1=ratio(hits, [hit + miss / 2.0 for hit, miss in zip(hits, misses, strict=True)], pictures),
        yes_rate=share(yes, pictures),
    )


def says_yes(text: str) -> bool | None:
    """Whether an answer's first sentence affirms (True) or denies (False); None where it does neither.

    A denial counts before "yes"; "there is …" affirms.
    """
    sentence = re.split(r"[.!?\n]", text.strip().lower().replace("’", "'"), maxsplit=1)[0]
    words = re.findall(r"[a-z]+", sentence.replace("n't", " not"))
    if DENIALS & set(words):
        return False
    affirms = bool(AGREEMENTS & set(words)) or bool(re.search(r"\bthere (is|are)\b", sentence))
    return True if affirms else None


def hallucination_figures(stem: str, result: Hallucination) -> dict[str, float]:
    """Every number by a flat name that starts with `stem`; a share of nothing has none."""
    shares: dict[str, Share | Ratio] = {}
    found: dict[str, float] = {}
    if result.chair is not None:
        parts = result.chair
        shares |= {"chair_response": parts.response, "chair_object": parts.object, "chair_recall": parts.recall}
        found[f"{stem}_chair_mentions_per_answer"] = parts.mentions_per_answer
    for kind, scores in result.pope.items():
        for name in Pope.model_fields:
            shares[f"pope_{kind}_{name}"] = getattr(scores, name)
    for name, value in shares.items():
        if isinstance(value, Ratio) or value.count:
            found |= {
                f"{stem}_{name}": value.value,
                f"{stem}_{name}_low": value.low,
                f"{stem}_{name}_high": value.high,
            }
    return found
