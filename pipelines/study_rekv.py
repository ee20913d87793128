"""ReKV's comparisons (arXiv 2503.00540): which ways of answering about long streams `configs/rekv.yaml` holds against
each other, and what the paper reports. Data for `pipelines.reproduce`; nothing is computed here."""

from collections.abc import Sequence

from sparsight.evaluate.reproduction import Comparison, Headline, Row, Study

METHODS = ("internal", "external", "uniform", "recent", "full", "oracle")
LENGTHS = ("120s", "600s", "3600s")
PAST_TYPES = ("ever", "order", "times", "before_shape", "before_colour")
NOW_TYPES = ("existence", "count", "colour", "shape")
DRAWN = tuple(f"student/{method}" for method in METHODS)
EVIDENCE = "share of the evidence's seconds"


def _student(key: str, title: str, one: str, other: str, metric: str, published: str = "not reported") -> Comparison:
    return Comparison(key, title, f"student/{one}", f"student/{other}", metric, published)


def _headings(kind: str, parts: Sequence[str]) -> dict[str, str]:
    return {f"{kind}_{part}": part.replace("_", " ") for part in parts}


COMPARISONS = (
    # Methods.
    _student(
        "past_internal_minus_uniform",
        "ReKV than uniform frames",
        "internal",
        "uniform",
        "past",
        "better, 56.0 to 53.0 (QAEgo4D)",
    ),
    _student(
        "past_internal_minus_external",
        "internal than external retrieval",
        "internal",
        "external",
        "past",
        "better, 56.0 to 54.2 (QAEgo4D)",
    ),
    _student("past_internal_minus_recent", "ReKV than recent frames only", "internal", "recent", "past"),
    _student(
        "now_internal_minus_recent",
        "ReKV than recent frames only",
        "internal",
        "recent",
        "now",
        "worse with other memories (SimpleStream)",
    ),
    _student(
        "past_oracle_minus_internal",
        "frames of the evidence than ReKV's",
        "oracle",
        "internal",
        "past",
        "better, 64.4 to 56.0 (QAEgo4D)",
    ),
    _student("past_full_minus_internal", "full attention than ReKV", "full", "internal", "past"),
    _student(
        "recall_internal_minus_external",
        "internal than external retrieval",
        "internal",
        "external",
        "recall",
        "better, 70.5 to 58.1 % (QAEgo4D)",
    ),
    _student(
        "recall_internal_minus_uniform",
        "ReKV than uniform frames",
        "internal",
        "uniform",
        "recall",
        "better, 70.5 to 6.1 % (QAEgo4D)",
    ),
    # What is retrieved.
    _student("past_dot_minus_cosine", "dot product than cosine", "dot", "internal", "past"),
    _student("past_without_recent", "no recent frames than four", "no_recent", "internal", "past"),
    _student("now_without_recent", "no recent frames than four", "no_recent", "internal", "now"),
    _student("past_8_minus_16", "8 frames than 16", "frames_8", "internal", "past", "worse"),
    _student("past_32_minus_16", "32 frames than 16", "frames_32", "internal", "past", "as good"),
    _student("past_around", "two frames before each hit than hits alone", "internal", "single", "past"),
    _student("recall_around", "two frames before each hit than hits alone", "internal", "single", "recall"),
    _student(
        "past_groups",
        "groups of 4 neighbours than single frames",
        "groups",
        "single",
        "past",
        "worse on MLVU, as good on QAEgo4D",
    ),
    _student("past_mass", "half of the attention than 16 frames", "mass", "internal", "past"),
    _student("past_two_pass", "two passes, as published, than one", "two_pass", "internal", "past"),
    # How it is kept.
    _student("int8_accuracy_drop", "numbers as computed than int8 pages", "internal", "int8", "accuracy"),
    _student("int4_accuracy_drop", "numbers as computed than 4-bit pages", "internal", "int4", "accuracy"),
    # Who is asked.
    Comparison(
        "past_student_minus_teacher",
        "sparse student than its teacher",
        "student/internal",
        "teacher/internal",
        "past",
        "not reported",
    ),
    Comparison(
        "past_student_minus_dense",
        "sparse student than the dense one that it came from",
        "student/internal",
        "dense/internal",
        "past",
        "not reported",
    ),
)

INTRODUCTION = """\
ReKV's comparisons at the size of one machine: every seed draws its own clips and streams, makes its own teacher and
students from short clips, and asks them about streams of two minutes, ten minutes and an hour that no model has learned
from (StreamQA, docs/protocol.md). Past questions are about what was there before, now questions about what is on. All
methods but full attention see the same number of frames. Models of this size do not retrieve untaught: teacher and
students have learned, from clips, that their layers' queries find the frames that an answer follows from
(docs/decisions/0014). *Uniform* and *recent* are what is done without a memory: the
chosen frames are encoded as a clip of their own. The others read blocks that were encoded once, inside a sliding
window; *oracle* retrieves frames of the evidence. `most_frequent` gives the most frequent answer of a question's
type. Accuracies are means over question types. Made by `make reproduce-rekv`."""

REKV = Study(
    name="rekv",
    title="ReKV, reproduced in kind",
    introduction=INTRODUCTION,
    comparisons=COMPARISONS,
    columns=(
        ("past", "past", ".3f"),
        *((f"past_{length}", f"past, {length}", ".3f") for length in LENGTHS),
        ("now", "now", ".3f"),
        *((f"now_{length}", f"now, {length}", ".3f") for length in LENGTHS),
        ("recall", "recall", ".3f"),
    ),
    headlines=(
        *(Headline(f"{kind}_{name}", f"student/{name}", kind) for kind in ("past", "now") for name in METHODS),
        *(Headline(f"recall_{name}", f"student/{name}", "recall") for name in ("internal", "external", "uniform")),
    ),
    plane=("now", "past"),
    in_plane=(*DRAWN, "most_frequent"),
    rows=(
        Row("past-lengths", "Past questions by the length of the stream", _headings("past", LENGTHS), DRAWN),
        Row("now-lengths", "Now questions by the length of the stream", _headings("now", LENGTHS), DRAWN),
        Row("past-types", "Past questions by type", _headings("past", PAST_TYPES), DRAWN),
        Row("now-types", "Now questions by type", _headings("now", NOW_TYPES), DRAWN),
        Row(
            "recall-lengths",
            "Recall of past questions by the length of the stream",
            _headings("recall_past", LENGTHS),
            DRAWN,
            EVIDENCE,
        ),
        Row("recall-types", "Recall of past questions by type", _headings("recall_past", PAST_TYPES), DRAWN, EVIDENCE),
    ),
)
