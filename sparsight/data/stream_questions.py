"""StreamQA: timed questions about drawn streams, with exactly known answers and the spans that they follow from.

Two kinds: about what is on at the time of asking (`now_…`), and about what was before (`past_…`). An answer depends on
frames up to the time of asking alone, and follows from the evidence frames in their order, without a clock. Yes and
no, before and after are equally frequent whatever is asked, so that who sees nothing guesses. Short clips become
ordinary samples for training, others teach retrieval; long streams are for evaluation alone. Called by
`pipelines.prepare` and by the training of retrieval.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import count, cycle, islice
from random import Random
from typing import Literal, NamedTuple, cast

from sparsight.config import StreamsSource
from sparsight.data.scene_questions import NUMBERS
from sparsight.data.scenes import COLOUR_NAMES, SHAPES
from sparsight.data.stream_scenes import KINDS, MOST_OBJECTS, MOST_TIMES, Shot, frames_of, shots_of
from sparsight.data.streams import QuestionedStream, StreamQuestion, StreamRecipe
from sparsight.data.turns import pieces
from sparsight.media.images import encode_png
from sparsight.records import Sample, Turn, hash_frames

SOURCE = "streams"
NAMES = tuple(f"{colour} {shape}" for shape, colour in KINDS)
ROUNDS = 2
"""How often a clip is asked each type of question; of two answers, each once."""
TRIES = 30
"""Times that are drawn for a question of a stream, until one has a question of its type."""


class Draft(NamedTuple):
    """A question, its answer, and the scenes, by number, that it follows from."""

    question: str
    answer: str
    evidence: tuple[int, ...]


class Seen:
    """What a viewer knows at a frame: the scenes up to it, the last one on now."""

    def __init__(self, shots: Sequence[Shot], frame: int) -> None:
        self.shots = [shot for shot in shots if shot.first <= frame]
        self.frame = frame
        self.scenes = [shot.names for shot in self.shots]
        self.now = self.scenes[-1]
        self.times: dict[str, list[int]] = {name: [] for name in NAMES}
        for number, names in enumerate(self.scenes):
            for name in names:
                self.times[name].append(number)
        self.few = [name for name in NAMES if 1 <= len(self.times[name]) <= MOST_TIMES]
        self.never = [name for name in NAMES if not self.times[name]]

    @property
    def newest(self) -> int:
        return len(self.scenes) - 1

    def spans_s(self, evidence: Collection[int], recipe: StreamRecipe) -> tuple[tuple[float, float], ...]:
        """The times of some scenes, as far as they have been seen."""
        shots = [self.shots[number] for number in sorted(evidence)]
        return tuple((recipe.time_s(shot.first), recipe.time_s(min(shot.end, self.frame + 1))) for shot in shots)


def _now_existence(seen: Seen, later: Collection[str], first: bool, random: Random) -> Draft:
    if first:
        return Draft(f"is there a {random.choice(sorted(seen.now))} now?", "yes", (seen.newest,))
    absent = [name for name in NAMES if name not in seen.now]
    earlier = [name for name in absent if seen.times[name]]
    near = [name for name in absent if set(name.split()) & {word for other in seen.now for word in other.split()}]
    name = random.choice(earlier if earlier and random.random() < 0.5 else near)
    return Draft(f"is there a {name} now?", "no", (seen.newest,))


def _now_count(seen: Seen, later: Collection[str], first: bool, random: Random) -> Draft:
    return Draft("how many shapes are there now?", NUMBERS[len(seen.now)], (seen.newest,))


def _now_colour(seen: Seen, later: Collection[str], first: bool, random: Random) -> Draft | None:
    single = _single(seen.now, 1)
    if not single:
        return None
    colour, shape = random.choice(single)
    return Draft(f"what color is the {shape} now?", colour, (seen.newest,))


def _now_shape(seen: Seen, later: Collection[str], first: bool, random: Random) -> Draft | None:
    single = _single(seen.now, 0)
    if not single:
        return None
    colour, shape = random.choice(single)
    return Draft(f"what is the {colour} shape now?", shape, (seen.newest,))


def _single(names: Collection[str], word: int) -> list[list[str]]:
    """(colour, shape) of the objects whose word (0 colour, 1 shape) no other has."""
    pairs = [name.split() for name in sorted(names)]
    return [pair for pair in pairs if sum(other[word] == pair[word] for other in pairs) == 1]


def _past_ever(seen: Seen, later: Collection[str], first: bool, random: Random) -> Draft | None:
    """Every other 'no' names something that comes later, where something does, and every other of the rest something
    whose colour and shape were there, in others."""
    gone = [name for name in seen.few if name not in seen.now]
    if not gone or not seen.never:
        return None
    if first:
        name = random.choice(gone)
        return Draft(f"was there ever a {name}?", "yes", tuple(seen.times[name]))
    coming = [name for name in seen.never if name in later]
    if coming and random.random() < 0.5:
        return Draft(f"was there ever a {random.choice(coming)}?", "no", ())
    words = {word for names in seen.scenes for name in names for word in name.split()}
    near = [name for name in seen.never if words.issuperset(name.split())]
    name = random.choice(near if near and random.random() < 0.5 else seen.never)
    return Draft(f"was there ever a {name}?", "no", ())


def _past_order(seen: Seen, later: Collection[str], first: bool, random: Random) -> Draft | None:
    if not seen.few:
        return None
    one = random.choice(seen.few)
    others = [name for name in seen.few if seen.times[name][0] != seen.times[one][0]]
    if not others:
        return None
    earlier, later_one = sorted((one, random.choice(others)), key=lambda name: seen.times[name][0])
    asked, other = (earlier, later_one) if first else (later_one, earlier)
    question = f"did the first {asked} come before or after the first {other}?"
    return Draft(question, "before" if first else "after", (seen.times[asked][0], seen.times[other][0]))


def _past_times(seen: Seen, later: Collection[str], first: bool, random: Random) -> Draft | None:
    """Asked where at least two answers are possible, all of which are then equally likely."""
    by_number = {number: [name for name in seen.few if len(seen.times[name]) == number] for number in (1, 2, 3)}
    possible = [number for number, names in by_number.items() if names]
    if len(possible) < 2:
        return None
    number = random.choice(possible)
    name = random.choice(by_number[number])
    return Draft(f"how many times was there a {name} so far?", NUMBERS[number], tuple(seen.times[name]))


def _past_before_shape(seen: Seen, later: Collection[str], first: bool, random: Random) -> Draft | None:
    return _before(seen, random, "what shape was there just before the first {}?", 1)


def _past_before_colour(seen: Seen, later: Collection[str], first: bool, random: Random) -> Draft | None:
    return _before(seen, random, "what color was there just before the first {}?", 0)


def _before(seen: Seen, random: Random, form: str, word: int) -> Draft | None:
    """The colour or shape of a scene's only object; every possible answer is equally likely."""
    by_answer: dict[str, list[str]] = {}
    for name in seen.few:
        first = seen.times[name][0]
        if first > 0 and len(seen.scenes[first - 1]) == 1:
            (before,) = seen.scenes[first - 1]
            by_answer.setdefault(before.split()[word], []).append(name)
    if not by_answer:
        return None
    answer = random.choice(sorted(by_answer))
    name = random.choice(by_answer[answer])
    first = seen.times[name][0]
    return Draft(form.format(name), answer, (first - 1, first))


YES_NO = ("yes", "no")

TYPES: dict[str, tuple[Callable[[Seen, Collection[str], bool, Random], Draft | None], tuple[str, ...]]] = {
    "now_existence": (_now_existence, YES_NO),
    "now_count": (_now_count, NUMBERS[1 : MOST_OBJECTS + 1]),
    "now_colour": (_now_colour, COLOUR_NAMES),
    "now_shape": (_now_shape, SHAPES),
    "past_ever": (_past_ever, YES_NO),
    "past_order": (_past_order, ("before", "after")),
    "past_times": (_past_times, NUMBERS[1 : MOST_TIMES + 1]),
    "past_before_shape": (_past_before_shape, SHAPES),
    "past_before_colour": (_past_before_colour, COLOUR_NAMES),
}
"""How each type of question is drawn, None where there is none to ask, and all its answers."""


def draft(answer_type: str, shots: Sequence[Shot], frame: int, first: bool, random: Random) -> Draft | None:
    """A question of a type about the frames up to `frame`, or None where there is none with one right answer.

    Of the types with two answers it has the `first` one or the other; there are questions for both or for neither.
    """
    later = frozenset[str]().union(*(shot.names for shot in shots if shot.first > frame))
    return TYPES[answer_type][0](Seen(shots, frame), later, first, random)


def clip_samples(
    source: StreamsSource,
    split: Literal["train", "test"],
    seed: int,
    turns_per_sample: int,
    exclude: Collection[str] = (),
) -> Iterator[Sample]:
    """The clips of a split with questions asked after their last frame. Same arguments, same bytes.

    Their lengths are those of `source.clip_frames`, in turn; each time round, their shapes are of the next number of
    colours in `source.clip_colours`. Clips whose content hash is in `exclude` are left out, and others drawn.
    """
    wanted = {"train": source.clips, "test": source.test_clips}[split]
    made = 0
    for number in count():
        if made == wanted:
            return
        turn, length = divmod(number, len(source.clip_frames))
        frames, rate = source.clip_frames[length], source.clip_frames_per_second
        colours = source.clip_colours[turn % len(source.clip_colours)]
        recipe = _recipe(source, f"{split}_clips", seed, number, frames, rate, colours)
        shown = list(frames_of(recipe))
        pictures = tuple(encode_png(frame.picture) for frame in shown)
        if hash_frames(pictures) in exclude:
            continue
        times_s = tuple(frame.time_s for frame in shown)
        for part, turns in enumerate(pieces(_clip_turns(recipe), turns_per_sample)):
            yield Sample(f"{SOURCE}/{split}/{made}/{part}", pictures, turns, SOURCE, times_s, independent=True)
        made += 1


def _frames(shots: Sequence[Shot], evidence: Collection[int]) -> tuple[int, ...]:
    """The frames of some scenes."""
    chosen = [shots[number] for number in sorted(evidence)]
    return tuple(frame for shot in chosen for frame in range(shot.first, shot.end))


def _clip_turns(recipe: StreamRecipe) -> tuple[Turn, ...]:
    random = _question_random(recipe)
    shots = shots_of(recipe)
    turns: dict[str, Turn] = {}
    for index, answer_type in enumerate([*TYPES] * ROUNDS):
        found = draft(answer_type, shots, recipe.frames - 1, index < len(TYPES), random)
        if found is not None:
            # What is on now is in the newest frames, whatever they show: there is nothing in them to be found by.
            evidence = _frames(shots, found.evidence) if answer_type.startswith("past_") else ()
            turns.setdefault(found.question, Turn(found.question, found.answer, answer_type, evidence))
    shuffled = list(turns.values())
    random.shuffle(shuffled)
    return tuple(shuffled)


def retrieval_clips(source: StreamsSource, seed: int) -> Iterator[QuestionedStream]:
    """As many clips as `source.clips`, with questions, their times and their evidence: what retrieval learns from.

    They are a split of their own, because `clip_samples` of the training split are dealt out and some of them end in
    the validation set, and all as long as the longest of those. Same arguments, same rows.
    """
    frames, rate = max(source.clip_frames), source.clip_frames_per_second
    for number in range(source.clips):
        colours = source.clip_colours[number % len(source.clip_colours)]
        recipe = _recipe(source, "retrieval_clips", seed, number, frames, rate, colours)
        name = f"{SOURCE}/retrieval/{number}"
        yield QuestionedStream(name, SOURCE, recipe, stream_questions(recipe, ROUNDS * len(TYPES), name))


def long_streams(source: StreamsSource, split: Literal["validation", "test"], seed: int) -> Iterator[QuestionedStream]:
    """The long streams of a split, `source.streams` of each length, with their questions. Same arguments, same rows."""
    for seconds in source.lengths_s:
        frames = round(seconds * source.frames_per_second)
        for number in range(source.streams):
            recipe = _recipe(source, f"{split}_streams", seed, number, frames, source.frames_per_second)
            name = f"{SOURCE}/{split}/{seconds:g}s/{number}"
            yield QuestionedStream(name, SOURCE, recipe, stream_questions(recipe, source.questions, name))


def stream_questions(recipe: StreamRecipe, number: int, name: str) -> tuple[StreamQuestion, ...]:
    """Up to `number` questions about a stream, types in turn, at times that are drawn, in the order of their times.

    A short stream may have no question of a type; it then has fewer.
    """
    random = _question_random(recipe)
    shots = shots_of(recipe)
    asked: list[tuple[int, str, Draft]] = []
    first = recipe.number % 2 == 0
    for index, answer_type in enumerate(islice(cycle(TYPES), number)):
        first = first if index % len(TYPES) else not first
        for _ in range(TRIES):
            frame = random.randrange(shots[min(1, len(shots) - 1)].first, recipe.frames)
            found = draft(answer_type, shots, frame, first, random)
            if found is not None:
                asked.append((frame, answer_type, found))
                break
    asked.sort(key=lambda entry: entry[0])
    return tuple(
        StreamQuestion(
            id=f"{name}#{index}",
            time_s=recipe.time_s(frame),
            question=found.question,
            answer=found.answer,
            kind=cast(Literal["now", "past"], answer_type.partition("_")[0]),
            answer_type=answer_type,
            alphabet=TYPES[answer_type][1],
            evidence_s=Seen(shots, frame).spans_s(found.evidence, recipe),
        )
        for index, (frame, answer_type, found) in enumerate(asked)
    )


def _recipe(
    source: StreamsSource,
    split: str,
    seed: int,
    number: int,
    frames: int,
    frames_per_second: float,
    colours: int = len(COLOUR_NAMES),
) -> StreamRecipe:
    shortest_s, longest_s = source.scene_s
    size_pixels = source.size_pixels
    return StreamRecipe(split, seed, number, frames, frames_per_second, shortest_s, longest_s, size_pixels, colours)


def _question_random(recipe: StreamRecipe) -> Random:
    return Random(f"stream questions/{recipe.seed}/{recipe.split}/{recipe.frames}/{recipe.number}")
