"""A small sample set with teacher signals, and the tiny student that fits them."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from sparsight.config import ArchitectureConfig
from sparsight.distill.rows import RowMaker
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import Sample, SparseTargets, TeacherSignal, Turn, hash_response

SMALL = ArchitectureConfig(
    picture_pixels=32,
    tower_layers=1,
    tower_width=32,
    tower_heads=1,
    text_layers=2,
    text_width=32,
    text_heads=1,
    text_key_value_heads=1,
    text_intermediate=48,
)
QUESTIONS = ["what shape is in the image?", "is there a red circle?", "what color is it?"]


@pytest.fixture(scope="session")
def student() -> VisionLanguageModel:
    tokenizer = make_tokenizer([*QUESTIONS, "circle", "yes", "red"] * 20, 300)
    return make_dense(SMALL, tokenizer, seed=0)


@pytest.fixture(scope="session")
def maker(student: VisionLanguageModel) -> RowMaker:
    return RowMaker(student.chat, student.visual_tokens, student.head_VD.shape[0])


@pytest.fixture
def sample() -> Sample:
    turns = (Turn(QUESTIONS[0], "circle"), Turn(QUESTIONS[1], None), Turn(QUESTIONS[2], "red"))
    return Sample("picture/1", (b"one",), turns, "test")


MakeSignal = Callable[[Sample, Sequence[str]], TeacherSignal]


@pytest.fixture(scope="session")
def make_signal(maker: RowMaker) -> MakeSignal:
    """The signal of a sample; the answers fill in those withheld."""
    return lambda sample, answers: signal_for(maker, sample, answers)


def signal_for(
    maker: RowMaker, sample: Sample, answers: Sequence[str], K: int = 3, S: int = 2, seed: int = 0
) -> TeacherSignal:
    """What a teacher with the student's tokenizer would store; `answers` fill in those withheld."""
    turns = [Turn(turn.question, turn.answer or answer) for turn, answer in zip(sample.turns, answers, strict=True)]
    encoded = maker.chat.encode(turns, maker.visual_tokens(len(sample.frames)))
    n = len(encoded.response_ids_n)
    random = np.random.default_rng(seed)
    logits_nV = random.normal(size=(n, maker.vocabulary))
    logprobs_nV = logits_nV - np.log(np.exp(logits_nV).sum(axis=1, keepdims=True))
    order_nV = np.argsort(-logprobs_nV, axis=1)
    tail_nS = order_nV[:, K : K + S]
    targets = SparseTargets(
        order_nV[:, :K].astype(np.int32),
        np.take_along_axis(logprobs_nV, order_nV[:, :K], 1).astype(np.float32),
        (1 - np.exp(np.take_along_axis(logprobs_nV, order_nV[:, :K], 1)).sum(axis=1)).astype(np.float32),
        tail_nS.astype(np.int32),
        np.take_along_axis(logprobs_nV, tail_nS, 1).astype(np.float32),
    )
    return TeacherSignal(
        id=sample.id,
        content_hash=sample.content_hash,
        response_ids_n=encoded.response_ids_n,
        answer_lengths=tuple(end - start for start, end in encoded.answer_spans),
        answered_by_teacher=tuple(turn.answer is None for turn in sample.turns),
        label_logprobs_n=np.zeros(n, np.float32),
        targets=targets,
        visual_tokens=encoded.visual_tokens,
        response_hash=hash_response(encoded.response_ids_n),
    )
