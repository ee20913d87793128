"""Rows join samples and signals only where teacher and student agree; every disagreement names its row."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sparsight.config import StageConfig, TermsConfig
from sparsight.distill.rows import RowMaker, chosen_rows
from sparsight.errors import AlignmentError, ConfigError
from sparsight.records import Sample, TeacherSignal, Turn, hash_response
from tests.unit.distill.conftest import QUESTIONS, signal_for

MakeSignal = Callable[[Sample, Sequence[str]], TeacherSignal]

ANSWERS = ["circle", "yes", "red"]


def test_a_row_is_the_conversation_with_the_teachers_answers_filled_in(
    maker: RowMaker, sample: Sample, make_signal: MakeSignal
) -> None:
    row = maker.align(sample, make_signal(sample, ANSWERS))
    turns = [Turn(turn.question, answer) for turn, answer in zip(sample.turns, ANSWERS, strict=True)]
    encoded = maker.chat.encode(turns, maker.visual_tokens(1))
    assert row.input_ids.tolist() == encoded.input_ids
    assert row.positions_n.tolist() == encoded.response_positions_n.tolist()
    assert maker.chat.decode(row.label_ids_n[row.is_truth_n].tolist()).split() == ["circle", "red"]
    assert maker.chat.decode(row.label_ids_n[~row.is_truth_n].tolist()) == "yes"


def test_the_teachers_own_tokens_are_kept_even_if_text_would_be_cut_differently(
    maker: RowMaker, sample: Sample, make_signal: MakeSignal
) -> None:
    signal = make_signal(sample, ANSWERS)
    odd = maker.chat.tokenizer.convert_tokens_to_ids(["y", "e", "s"])
    start = signal.answer_lengths[0]
    ids = np.concatenate(
        [
            signal.response_ids_n[:start],
            [*odd, maker.chat.end_id],
            signal.response_ids_n[start + signal.answer_lengths[1] :],
        ]
    ).astype(np.int32)
    lengths = (signal.answer_lengths[0], len(odd) + 1, signal.answer_lengths[2])
    picks = np.arange(len(ids)) % len(signal.targets)
    targets = replace(signal.targets, **{name: getattr(signal.targets, name)[picks] for name in vars(signal.targets)})
    signal = replace(
        signal, response_ids_n=ids, answer_lengths=lengths, targets=targets, response_hash=hash_response(ids)
    )
    row = maker.align(sample, signal)
    assert row.label_ids_n.tolist() == ids.tolist()


def test_samples_without_a_signal_and_withheld_answers_are_left_out(
    maker: RowMaker, sample: Sample, make_signal: MakeSignal
) -> None:
    other = replace(sample, id="picture/2")
    assert [row.id for row in maker.labelled([other, sample], [make_signal(sample, ANSWERS)])] == ["picture/1"]
    complete = replace(sample, id="picture/3", turns=sample.turns[:1])
    rows = maker.answered([sample, complete])
    assert [row.id for row in rows] == ["picture/3"]
    assert bool(rows[0].is_truth_n.all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"content_hash": "0" * 32}, "another picture"),
        ({"visual_tokens": 99}, "takes 99 tokens for the teacher"),
        ({"response_hash": b"0" * 16}, "other tokens"),
        ({"answer_lengths": (1, 1, 1)}, "do not add up"),
        ({"answered_by_teacher": (False, False, False)}, "the sample has none"),
        ({"answered_by_teacher": (True, True)}, "the sample has 3"),
    ],
)
def test_a_misfit_names_the_row(
    maker: RowMaker, sample: Sample, make_signal: MakeSignal, change: dict[str, Any], message: str
) -> None:
    signal = replace(make_signal(sample, ANSWERS), **change)
    with pytest.raises(AlignmentError, match=message) as caught:
        maker.align(sample, signal)
    assert "picture/1" in str(caught.value)


def test_a_changed_answer_is_refused(maker: RowMaker, sample: Sample, make_signal: MakeSignal) -> None:
    signal = make_signal(sample, ANSWERS)
    changed = replace(sample, turns=(replace(sample.turns[0], answer="square"), *sample.turns[1:]))
    with pytest.raises(AlignmentError, match="other tokens"):
        maker.align(changed, signal)


def test_a_target_outside_the_students_vocabulary_is_refused(
    maker: RowMaker, sample: Sample, make_signal: MakeSignal
) -> None:
    small = replace(maker, vocabulary=20)
    with pytest.raises(AlignmentError, match="the student's head ends at 20"):
        small.align(sample, make_signal(sample, ANSWERS))


def test_a_signal_without_its_sample_is_refused(maker: RowMaker, sample: Sample, make_signal: MakeSignal) -> None:
    with pytest.raises(AlignmentError, match="no sample of this id"):
        maker.labelled([], [make_signal(sample, ANSWERS)])


def test_another_tokenizer_is_refused(maker: RowMaker) -> None:
    maker.check_tokenizer(maker.chat.tokenizer_fingerprint)
    both = f"tokenizer 0123456789abcdef, the student's is {maker.chat.tokenizer_fingerprint}: .* teacher's tokenizer"
    with pytest.raises(AlignmentError, match=both):
        maker.check_tokenizer("0123456789abcdef")


def test_a_stage_of_short_rows_learns_from_no_longer_one(
    maker: RowMaker, sample: Sample, make_signal: MakeSignal
) -> None:
    row = maker.align(sample, make_signal(sample, ANSWERS))
    rows = [replace(row, id=f"{cut}", content_hash=f"{cut}", input_ids=row.input_ids[cut:]) for cut in range(4)]
    stage = StageConfig(name="short", terms=TermsConfig(cross_entropy=1.0), steps=1, most_tokens=len(row) - 2)
    assert [one.id for one in chosen_rows(rows, stage, seed=0)] == ["2", "3"]
    whole = stage.model_copy(update={"most_tokens": None})
    assert chosen_rows(rows, whole, seed=0) == rows
    none = stage.model_copy(update={"most_tokens": len(row) - 4})
    with pytest.raises(ConfigError, match=f"stage 'short': no row has at most {len(row) - 4} tokens, the shortest"):
        chosen_rows(rows, none, seed=0)


def test_a_row_knows_the_words_of_questions_that_some_of_its_frames_answer(maker: RowMaker) -> None:
    turns = (
        Turn(QUESTIONS[0], "circle", evidence=(0, 1)),
        Turn(QUESTIONS[1], "yes", evidence=(1,)),
        Turn(QUESTIONS[2], "red"),
    )
    clip = Sample("clip/1", (b"one", b"two"), turns, "test", (0.0, 1.0), independent=True)
    [row] = maker.answered([clip])
    [asked] = row.asked
    assert asked.frames == (1,)
    assert maker.chat.decode(row.input_ids[asked.start : asked.end].tolist()) == QUESTIONS[1]
    assert maker.answered([replace(clip, independent=False)])[0].asked == ()


def test_the_words_are_found_behind_answers_that_the_teacher_wrote(maker: RowMaker) -> None:
    turns = (Turn(QUESTIONS[0], None), Turn(QUESTIONS[2], "red", evidence=(0,)))
    clip = Sample("clip/1", (b"one", b"two"), turns, "test", (0.0, 1.0), independent=True)
    answered = replace(clip, turns=(Turn(QUESTIONS[0], "yes red circle"), turns[1]))
    signal = signal_for(maker, answered, ANSWERS[:2])
    row = maker.align(clip, replace(signal, answered_by_teacher=(True, False)))
    [asked] = row.asked
    assert maker.chat.decode(row.input_ids[asked.start : asked.end].tolist()) == QUESTIONS[2]
