"""Pairs become rows only where teacher and student agree on picture and tokens; every disagreement names its pair."""

from dataclasses import replace
from typing import Any

import pytest

from sparsight.config import StageConfig, TermsConfig
from sparsight.distill.pair_rows import PairRowMaker
from sparsight.distill.rows import chosen_rows
from sparsight.errors import AlignmentError
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import PreferencePair, Turn, hash_answers

QUESTION = "what shape is in the image?"


@pytest.fixture(scope="module")
def maker(student: VisionLanguageModel) -> PairRowMaker:
    return PairRowMaker(student.chat, student.visual_tokens, student.head_VD.shape[0], {"0f": 1, "f0": 2})


@pytest.fixture(scope="module")
def pair(student: VisionLanguageModel) -> PreferencePair:
    turns = [Turn(QUESTION, answer) for answer in ("a red circle", "circle")]
    ids = [student.chat.encode([turn], 1).response_ids_n for turn in turns]
    return PreferencePair(
        id="picture/1#2",
        source="test",
        content_hash="0f",
        question=QUESTION,
        chosen="a red circle",
        rejected="circle",
        answer_type="open",
        candidates=(),
        judge="truth",
        margin=1.0,
        teacher_chosen_logprob=-2.5,
        teacher_rejected_logprob=-7.0,
        visual_tokens=student.visual_tokens(),
        answers_hash=hash_answers(ids),
    )


def test_a_row_holds_both_answers_after_one_prompt(maker: PairRowMaker, pair: PreferencePair) -> None:
    (row,) = maker.rows([pair])
    chat = maker.chat
    for index, answer in enumerate((pair.chosen, pair.rejected)):
        alone = chat.encode([Turn(QUESTION, answer)], maker.visual_tokens(1))
        start, _ = alone.answer_spans[0]
        assert [*row.answers.input_ids[: row.answers.starts[0]], *row.answers.answer_ids(index)] == alone.input_ids
        assert row.answers.starts[0] == start
    assert row.teacher_logprobs == (-2.5, -7.0)
    assert row.chosen_tokens == len(row.answers.answer_ids(0))
    assert len(row.positions_n) == len(row) - row.answers.starts[0]


def test_each_answers_first_token_is_predicted_by_the_prompts_last(maker: PairRowMaker, pair: PreferencePair) -> None:
    answers = maker.align(pair).answers
    last = answers.starts[0] - 1
    (first, middle), (_, end) = answers.answer_spans
    expected = [last, *range(first, middle - 1), last, *range(middle, end - 1)]
    assert answers.before_n.tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"content_hash": "aa"}, "not among the student's samples"),
        ({"content_hash": "f0"}, "tokens for the teacher"),
        ({"visual_tokens": 99}, "takes 99 tokens for the teacher"),
        ({"answers_hash": bytes(16)}, "other tokens"),
        ({"chosen": "a blue circle"}, "other tokens"),
        ({"question": "is there a red circle?", "rejected": "a red circle"}, "other tokens"),
        ({"teacher_chosen_logprob": float("nan")}, "log-probs"),
        ({"teacher_rejected_logprob": 0.5}, "log-probs"),
    ],
)
def test_a_misfit_names_the_pair(
    maker: PairRowMaker, pair: PreferencePair, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(AlignmentError, match=message) as caught:
        maker.align(replace(pair, **change))
    assert "picture/1#2" in str(caught.value)


def test_two_answers_of_the_same_tokens_are_refused(maker: PairRowMaker, pair: PreferencePair) -> None:
    chosen_ids = maker.align(pair).answers.answer_ids(0)
    same = replace(pair, rejected=pair.chosen, answers_hash=hash_answers([chosen_ids, chosen_ids]))
    with pytest.raises(AlignmentError, match="the same"):
        maker.align(same)


def test_tokens_beyond_the_smaller_head_are_refused(maker: PairRowMaker, pair: PreferencePair) -> None:
    with pytest.raises(AlignmentError, match="the smaller head ends at 20"):
        replace(maker, vocabulary=20).align(pair)


def test_another_tokenizer_is_refused(maker: PairRowMaker) -> None:
    maker.check_tokenizer(maker.chat.tokenizer_fingerprint)
    with pytest.raises(AlignmentError, match="the pairs were written with tokenizer 0123"):
        maker.check_tokenizer("0123")


def test_a_share_is_of_pictures(maker: PairRowMaker, pair: PreferencePair) -> None:
    row = maker.align(pair)
    rows = [replace(row, id=f"{index}", content_hash=f"{index % 4}") for index in range(12)]
    kept = chosen_rows(rows, StageConfig(name="some", terms=TermsConfig(cross_entropy=1.0), steps=1, share=0.5), seed=0)
    assert len(kept) == 6
    assert len({one.content_hash for one in kept}) == 2
