"""StreamQA: every answer is worked out a second time, frame by frame, and who sees nothing can only guess."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from random import Random

import pytest

from sparsight.config import StreamsSource
from sparsight.data.scenes import COLOUR_NAMES, SHAPES, draw
from sparsight.data.stream_questions import ROUNDS, TYPES, clip_samples, draft, long_streams, retrieval_clips
from sparsight.data.stream_scenes import shots_of
from sparsight.data.streams import QuestionedStream, StreamQuestion, StreamRecipe
from sparsight.media.images import decode, encode_png
from sparsight.records import Sample

SOURCE = StreamsSource(
    kind="streams",
    clips=150,
    test_clips=60,
    clip_colours=[8, 4],
    streams=8,
    lengths_s=[30.0, 300.0, 1800.0],
    questions=45,
)
CLIPS = list(clip_samples(SOURCE, "train", 3, 100))
STREAMS = list(long_streams(SOURCE, "test", 3))
RETRIEVAL = list(retrieval_clips(SOURCE, 3))

NAME = rf"(?:{'|'.join(COLOUR_NAMES)}) (?:{'|'.join(SHAPES)})"
WORDS = ("zero", "one", "two", "three")

Frames = Sequence[frozenset[str]]
"""What every frame up to the time of asking shows."""


def shown(recipe: StreamRecipe, until: int) -> Frames:
    """The names in each frame up to `until`, which is the newest."""
    shots = shots_of(recipe)
    return [next(s for s in shots if s.first <= frame < s.end).names for frame in range(until + 1)]


def worked_out(question: str, frames: Frames) -> tuple[str, set[int]]:
    """The answer to a question and the frames that it follows from, from its words and every frame's names."""
    now = len(frames) - 1
    while now > 0 and frames[now - 1] == frames[-1]:
        now -= 1
    current = set(range(now, len(frames)))

    def frames_with(name: str) -> set[int]:
        return {frame for frame, names in enumerate(frames) if name in names}

    def run_from(first: int) -> set[int]:
        end = first
        while end < len(frames) and frames[end] == frames[first]:
            end += 1
        return set(range(first, end))

    if found := re.fullmatch(rf"is there a ({NAME}) now\?", question):
        return "yes" if found[1] in frames[-1] else "no", current
    if question == "how many shapes are there now?":
        return WORDS[len(frames[-1])], current
    if found := re.fullmatch(r"what color is the (\w+) now\?", question):
        (name,) = [name for name in frames[-1] if name.split()[1] == found[1]]
        return name.split()[0], current
    if found := re.fullmatch(r"what is the (\w+) shape now\?", question):
        (name,) = [name for name in frames[-1] if name.split()[0] == found[1]]
        return name.split()[1], current
    if found := re.fullmatch(rf"was there ever a ({NAME})\?", question):
        return "yes" if frames_with(found[1]) else "no", frames_with(found[1])
    if found := re.fullmatch(rf"did the first ({NAME}) come before or after the first ({NAME})\?", question):
        one, other = min(frames_with(found[1])), min(frames_with(found[2]))
        assert one != other
        return "before" if one < other else "after", run_from(one) | run_from(other)
    if found := re.fullmatch(rf"how many times was there a ({NAME}) so far\?", question):
        runs = sum(1 for there, _ in groupby(found[1] in names for names in frames) if there)
        return WORDS[runs], frames_with(found[1])
    if found := re.fullmatch(rf"what (shape|color) was there just before the first ({NAME})\?", question):
        first = min(frames_with(found[2]))
        (name,) = frames[first - 1]
        start = first - 1
        while start > 0 and frames[start - 1] == frames[first - 1]:
            start -= 1
        return name.split()[found[1] == "shape"], set(range(start, first)) | run_from(first)
    raise AssertionError(f"no rule for the question {question!r}")


@pytest.mark.parametrize("stream", [*STREAMS, *RETRIEVAL[:20]], ids=lambda stream: stream.id)
def test_every_answer_of_a_stream_is_exact_and_follows_from_its_evidence(stream: QuestionedStream) -> None:
    recipe = stream.recipe
    for question in stream.questions:
        newest = round(question.time_s * recipe.frames_per_second)
        assert recipe.time_s(newest) == question.time_s
        answer, evidence = worked_out(question.question, shown(recipe, newest))
        assert question.answer == answer, question
        covered = {
            frame
            for frame in range(recipe.frames)
            for start_s, end_s in question.evidence_s
            if start_s <= recipe.time_s(frame) < end_s
        }
        assert covered == evidence, question
        assert question.answer in question.alphabet
        assert question.answer_type.startswith(f"{question.kind}_")
        assert list(question.evidence_s) == sorted(question.evidence_s)


def test_streams_and_clips_have_enough_questions() -> None:
    for stream in STREAMS:
        assert len(stream.questions) >= (20 if stream.recipe.seconds < 60 else 30)
    assert {stream.recipe.frames for stream in RETRIEVAL} == {16}
    assert [len(sample.frames) for sample in CLIPS[:32]] == [*range(1, 17)] * 2
    past = [q for stream in RETRIEVAL for q in stream.questions if q.kind == "past" and q.evidence_s]
    assert len(past) > 5 * len(RETRIEVAL)
    assert max(len(stream.questions) for stream in RETRIEVAL) <= ROUNDS * len(TYPES)


def test_every_answer_about_a_clip_is_exact() -> None:
    """A clip's frames are told apart by their bytes, so the recipe is not needed to know which scene they show."""
    for sample in CLIPS:
        frames = clip_frames(sample)
        for turn in sample.turns:
            answer, evidence = worked_out(turn.question, frames)
            assert turn.answer == answer, (turn, frames)
            assert set(turn.evidence) == (evidence if turn.answer_type.startswith("past_") else set()), (turn, frames)


def clip_frames(sample: Sample) -> Frames:
    """The names in each frame of a training clip, by way of the recipe with the same pictures."""
    number = int(sample.id.split("/")[2])
    frames = len(sample.frames)
    colours = SOURCE.clip_colours[number // len(SOURCE.clip_frames) % 2]
    recipe = StreamRecipe("train_clips", 3, number, frames, SOURCE.clip_frames_per_second, 4.0, 12.0, 64, colours)
    names = shown(recipe, frames - 1)
    same_pictures = [one == other for one, other in pairwise(sample.frames)]
    assert same_pictures == [one == other for one, other in pairwise(names)]
    return names


def test_an_answer_does_not_change_with_what_comes_later() -> None:
    """The same scenes up to the time of asking and others after it: the answer is the same."""
    for number in range(60):
        recipe = replace(STREAMS[-1].recipe, frames=60, number=number)
        shots = shots_of(recipe)
        frame = 40
        past = [shot for shot in shots if shot.first <= frame]
        for answer_type in TYPES:
            for first in (True, False):
                found = draft(answer_type, shots, frame, first, Random(f"{number}/{answer_type}"))
                if found is not None:
                    assert found.answer == worked_out(found.question, shown(recipe, frame))[0]
                    assert max(found.evidence, default=0) < len(past)


def all_questions(streams: Sequence[QuestionedStream]) -> list[tuple[str, str, str]]:
    return [(q.answer_type, q.question, q.answer) for stream in streams for q in stream.questions]


CLIP_QUESTIONS = [(t.answer_type, t.question, str(t.answer)) for clip in CLIPS for t in clip.turns]
SETS = {"clips": CLIP_QUESTIONS, "streams": all_questions(STREAMS)}

MOST = {
    "now_existence": 0.5,
    "now_count": 0.45,
    "now_colour": 0.25,
    "now_shape": 0.45,
    "past_ever": 0.5,
    "past_order": 0.5,
    "past_times": 0.55,
    "past_before_shape": 0.45,
    "past_before_colour": 0.25,
}
"""The largest share of its type's most frequent answer."""


@pytest.mark.parametrize("name", SETS)
def test_a_blind_guesser_does_badly(name: str) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for answer_type, _, answer in SETS[name]:
        answers[answer_type][answer] += 1
    assert answers.keys() == MOST.keys() == TYPES.keys()
    for answer_type, counts in answers.items():
        assert set(counts) <= set(TYPES[answer_type][1])
        assert counts.most_common(1)[0][1] <= MOST[answer_type] * counts.total(), answer_type


@pytest.mark.parametrize("name", SETS)
def test_words_of_a_question_do_not_tell_its_answer(name: str) -> None:
    """The best guess by type and any one colour or shape of the question, chosen knowing all answers, gains little."""
    for answer_type in ("now_existence", "past_ever", "past_order"):
        by_word: dict[str, Counter[str]] = defaultdict(Counter)
        for kind, question, answer in SETS[name]:
            if kind == answer_type:
                word = next(word.strip("?") for word in question.split() if word in COLOUR_NAMES)
                by_word[word][answer] += 1
        right = sum(counts.most_common(1)[0][1] for counts in by_word.values())
        assert right / sum(counts.total() for counts in by_word.values()) < 0.65


def test_noes_are_hard() -> None:
    later = near = now_earlier = noes = now_noes = 0
    for stream in STREAMS:
        whole = shown(stream.recipe, stream.recipe.frames - 1)
        for question in stream.questions:
            if question.answer != "no":
                continue
            newest = round(question.time_s * stream.recipe.frames_per_second)
            (name,) = re.findall(NAME, question.question)
            words = {word for names in whole[: newest + 1] for other in names for word in other.split()}
            if question.kind == "past":
                noes += 1
                later += any(name in names for names in whole[newest + 1 :])
                near += bool(set(name.split()) & words)
            else:
                now_noes += 1
                now_earlier += any(name in names for names in whole[:newest])
                assert name not in whole[newest]
    assert near > 0.9 * noes
    assert later > 0.3 * noes
    assert now_earlier > 0.4 * now_noes


def test_questions_are_about_far_and_near_times() -> None:
    ages = [
        (question.time_s - max(end_s for _, end_s in question.evidence_s)) / stream.recipe.seconds
        for stream in STREAMS
        if stream.recipe.seconds > 1000
        for question in stream.questions
        if question.kind == "past" and question.evidence_s
    ]
    assert sum(age > 0.1 for age in ages) > 0.3 * len(ages)


def test_same_arguments_same_rows() -> None:
    assert list(long_streams(SOURCE, "test", 3)) == STREAMS
    few = SOURCE.model_copy(update={"clips": 20})
    assert list(clip_samples(few, "train", 3, 100)) == CLIPS[:20]
    assert list(retrieval_clips(few, 3)) == RETRIEVAL[:20]


def test_a_stream_does_not_depend_on_the_others() -> None:
    other = SOURCE.model_copy(update={"streams": 3, "lengths_s": [300.0], "clips": 7})
    assert list(long_streams(other, "test", 3)) == [s for s in STREAMS if s.recipe.seconds == 300.0][:3]


def test_splits_and_seeds_share_nothing() -> None:
    small = SOURCE.model_copy(update={"clips": 40, "test_clips": 40, "streams": 4, "lengths_s": [300.0]})
    pictures = [
        {frame for sample in clip_samples(small, split, seed, 100) for frame in sample.frames}
        for split in ("train", "test")
        for seed in (0, 1)
    ]
    for split in ("validation", "test"):
        for seed in (0, 1):
            scenes = [shot.scene for stream in long_streams(small, split, seed) for shot in shots_of(stream.recipe)]
            assert len(set(scenes)) == len(scenes)
            pictures.append({repr(scene).encode() for scene in scenes})
    for seed in (0, 1):
        scenes = [shot.scene for clip in retrieval_clips(small, seed) for shot in shots_of(clip.recipe)]
        pictures.append({known for scene in scenes for known in (repr(scene).encode(), encode_png(draw(scene)))})
    assert len(set().union(*pictures)) == sum(len(one) for one in pictures)


def test_excluded_clips_are_drawn_again() -> None:
    few = SOURCE.model_copy(update={"test_clips": 12})
    usual = list(clip_samples(few, "test", 0, 100))
    banned = {usual[0].content_hash, usual[5].content_hash}
    others = list(clip_samples(few, "test", 0, 100, exclude=banned))
    assert len({sample.content_hash for sample in others}) == 12
    assert not banned & {sample.content_hash for sample in others}
    assert len({sample.id for sample in others}) == 12


def test_clips_are_ordinary_samples() -> None:
    lengths = Counter(len(sample.frames) for sample in CLIPS)
    assert set(lengths) == set(range(1, 17))
    for sample in CLIPS[:20]:
        assert sample.independent
        assert sample.frame_times_s == tuple(4.0 * number for number in range(len(sample.frames)))
        assert decode(sample.frames[0]).size == (64, 64)
        assert encode_png(decode(sample.frames[0])) == sample.frames[0]
        assert len({turn.question for turn in sample.turns}) == len(sample.turns)
        assert Sample.from_row(sample.to_row()) == sample
    most = max(len(sample.turns) for sample in clip_samples(SOURCE, "test", 0, 5))
    assert most <= 5


def slow_recall(question: StreamQuestion, retrieved_s: Sequence[tuple[float, float]]) -> float:
    """Counts quarters of a second."""
    wanted = got = 0
    for quarter in range(4000):
        time_s = quarter / 4 + 0.125
        if any(start_s <= time_s < end_s for start_s, end_s in question.evidence_s):
            wanted += 1
            got += any(start_s <= time_s < end_s for start_s, end_s in retrieved_s)
    return got / wanted


def test_recall_is_the_share_of_evidence_seconds() -> None:
    random = Random(0)
    with_evidence = [q for stream in STREAMS[8:16] for q in stream.questions if q.evidence_s]
    for question in with_evidence:
        starts = [random.randrange(600) / 2 for _ in range(random.randint(0, 12))]
        retrieved = [(start_s, start_s + random.choice((0.5, 2.0, 20.0))) for start_s in starts]
        assert question.recall(retrieved) == pytest.approx(slow_recall(question, retrieved))
        assert question.recall(question.evidence_s) == pytest.approx(1.0)
    never = next(q for stream in STREAMS for q in stream.questions if not q.evidence_s)
    assert never.recall([(0.0, 10.0)]) is None
