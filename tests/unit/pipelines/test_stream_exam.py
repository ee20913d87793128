"""How one model is asked about one stream: which frames each method shows it, and what is written down."""

import math
from itertools import pairwise

import pytest
import torch

from pipelines.stream_exam import StreamExam, chosen_alone, evenly, oracle_frames
from sparsight.config import ArchitectureConfig, StreamMethod, StreamsSource
from sparsight.data.stream_questions import long_streams
from sparsight.data.streams import QuestionedStream, StreamQuestion, StreamRecipe
from sparsight.kv.head_training import projected_stream
from sparsight.kv.reference import full_attention_answer
from sparsight.kv.retrieval_head import HeadEmbedder, RetrievalHead, host_fingerprint
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.vision_language import VisionLanguageModel

RECIPE = StreamRecipe("test_streams", 0, 0, 20, 0.5, 4.0, 8.0, 64)
QUESTION = StreamQuestion("q", 18.0, "is it?", "yes", "past", "past_ever", ("yes", "no"), ((4.0, 8.0), (16.0, 20.0)))


def method(kind: str, frames: int = 4, recent: int = 1, **more: object) -> StreamMethod:
    """With as many settings as the kind reads."""
    values: dict[str, object] = {"name": kind, "kind": kind}
    if kind != "full":
        values["frames"] = frames
    if kind in ("internal", "external", "oracle"):
        values["recent"] = recent
    return StreamMethod.model_validate(values | more)


@pytest.mark.parametrize("count", [1, 4, 5, 30, 1000])
@pytest.mark.parametrize("most", [1, 3, 16])
def test_even_choices_are_distinct_ordered_and_spread(count: int, most: int) -> None:
    chosen = evenly(range(count), most)
    assert len(chosen) == min(count, most)
    assert all(one < other for one, other in pairwise(chosen))
    gaps = [other - one for one, other in pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_methods_without_a_memory_see_no_later_frame() -> None:
    assert chosen_alone(method("recent"), 9) == [6, 7, 8, 9]
    assert chosen_alone(method("recent"), 1) == [0, 1]
    assert chosen_alone(method("uniform"), 7) == [1, 3, 5, 7]


def test_the_oracle_shows_evidence_that_has_been_seen_and_the_newest_frame() -> None:
    assert oracle_frames(method("oracle", frames=8), QUESTION, 9, RECIPE) == (2, 3, 8, 9)
    assert oracle_frames(method("oracle", frames=8), QUESTION, 8, RECIPE) == (2, 3, 8)
    assert oracle_frames(method("oracle", frames=3), QUESTION, 9, RECIPE) == (3, 9)


def test_where_nothing_is_evidence_every_frame_may_deny() -> None:
    nothing = StreamQuestion("q", 18.0, "was there?", "no", "past", "past_ever", ("yes", "no"), ())
    assert oracle_frames(method("oracle", frames=4), nothing, 5, RECIPE) == (1, 3, 5)


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    sizes = ArchitectureConfig(
        tower_width=32,
        tower_layers=1,
        tower_heads=1,
        text_width=32,
        text_layers=2,
        text_heads=2,
        text_key_value_heads=1,
        text_intermediate=48,
        initializer_range=0.2,
        max_positions=600,
    )
    return make_dense(sizes, make_tokenizer(["is there a red circle now? yes no one two"], 300), seed=0)


@pytest.fixture(scope="module")
def stream() -> QuestionedStream:
    source = StreamsSource(
        kind="streams", clips=1, streams=1, lengths_s=[40.0], questions=9, frames_per_second=0.5, scene_s=(4.0, 8.0)
    )
    return next(iter(long_streams(source, "validation", 0)))


def embedder_of(model: VisionLanguageModel) -> HeadEmbedder:
    return HeadEmbedder(model, RetrievalHead(32, host=host_fingerprint(model)))


METHODS = [
    method("internal"),
    method("external"),
    method("uniform"),
    method("recent"),
    method("oracle"),
    method("full"),
    method("internal", frames=30, recent=0, name="everything"),
    method("internal", frames=30, recent=0, name="everything_int8", pages="int8"),
]


def test_every_question_is_answered_by_every_method(model: VisionLanguageModel, stream: QuestionedStream) -> None:
    rows, too_long = StreamExam(model, 200, 4, embedder_of(model)).sit("student", stream, METHODS)
    assert too_long == []
    assert len(rows) == len(stream.questions) * len(METHODS)
    assert {row.method for row in rows} == {it.name for it in METHODS}
    answers = {(row.method, row.question_id): row for row in rows}
    for question in stream.questions:
        frame = round(question.time_s * stream.recipe.frames_per_second)
        shown = {
            "everything": range(frame + 1),
            "everything_int8": range(frame + 1),
            "full": range(frame + 1),
            "uniform": chosen_alone(method("uniform"), frame),
            "recent": chosen_alone(method("recent"), frame),
            "oracle": oracle_frames(method("oracle"), question, frame, stream.recipe),
        }
        for name, frames in shown.items():
            wanted = question.recall([(stream.recipe.time_s(it), stream.recipe.time_s(it + 1)) for it in frames])
            found = answers[name, question.id].recall
            assert math.isnan(found) if wanted is None else found == pytest.approx(wanted)


def test_full_answers_as_the_unmodified_model_does(model: VisionLanguageModel, stream: QuestionedStream) -> None:
    exam = StreamExam(model, 200, 4)
    rows, _ = exam.sit("student", stream, [method("full")])
    frames_FSD = projected_stream(model, stream.recipe)
    for row, question in zip(rows, stream.questions, strict=True):
        prompt = model.chat.frames_prompt(question.question)
        seen = round(question.time_s * stream.recipe.frames_per_second) + 1
        # The newline that ends a clip stands before the prompt: as one more frame token of the last frame.
        answer = full_attention_answer(
            model.model.model.language_model,
            model.model.get_output_embeddings(),
            torch.tensor(prompt.before_ids),
            torch.cat((frames_FSD[:seen].flatten(0, 1), model.newline_D[None]))[None],
            torch.tensor(prompt.after_ids),
            4,
        )
        ids = list(answer[: answer.index(model.chat.end_id)] if model.chat.end_id in answer else answer)
        assert row.answer == model.chat.decode(ids)


def test_a_stream_that_full_attention_cannot_take_is_left_out(stream: QuestionedStream) -> None:
    sizes = ArchitectureConfig(tower_width=32, tower_layers=1, text_layers=1, max_positions=500)
    short = make_dense(sizes, make_tokenizer(["is there"], 300), seed=0)
    rows, too_long = StreamExam(short, 100, 4).sit("student", stream, [method("recent"), method("full")])
    assert too_long == ["full"]
    assert {row.method for row in rows} == {"recent"}
