"""Questions: what they may see, what they leave behind, what they are told to stop at."""

import pytest
import torch

from sparsight.errors import StreamError
from sparsight.kv.answerer import Answer, Ask, StreamAnswerer
from sparsight.kv.bank import RamBank
from sparsight.kv.block import KvBlock
from sparsight.kv.encoder import encode_sink
from sparsight.kv.reference import full_attention_logits
from sparsight.kv.retrieve import BestAndRecent, ByNumber
from tests.unit.kv.tiny_stream import (
    FRAME_TOKENS,
    PROMPT_IDS,
    SINK_IDS,
    TinyStream,
    bank_of,
    encode,
    frames_of,
    said,
    spans_of,
    tiny_stream,
)

FRAMES = 10


@pytest.fixture(scope="module")
def stream() -> TinyStream:
    return tiny_stream("qwen3_moe")


@pytest.fixture(scope="module")
def answerer(stream: TinyStream) -> StreamAnswerer:
    return StreamAnswerer(stream.kv_model, stream.head)


@pytest.fixture
def bank(stream: TinyStream) -> RamBank:
    return bank_of(*encode(stream, frames_of(stream, FRAMES), window_tokens=21))


def test_a_question_changes_nothing_and_says_the_same_again(answerer: StreamAnswerer, bank: RamBank) -> None:
    def contents() -> tuple[object, ...]:
        blocks = [bank.sink, *(bank.get(number) for number in range(FRAMES))]
        again = [KvBlock.from_page(block.number, block.start_s, block.end_s, block.page_L2GSC) for block in blocks]
        return [block.digest for block in again], bank.index().mean_keys_LNGC.tolist(), bank.nbytes

    before = contents()
    retriever = BestAndRecent(3, recent=1)
    first = answerer.ask(bank, PROMPT_IDS, retriever, max_new_tokens=6)
    answerer.ask(bank, PROMPT_IDS.flip(0), retriever, max_new_tokens=6)
    assert contents() == before
    assert answerer.ask(bank, PROMPT_IDS, retriever, max_new_tokens=6) == first


def test_two_turns_at_once_do_not_meet(answerer: StreamAnswerer, bank: RamBank) -> None:
    retriever = BestAndRecent(2)
    expected = [answerer.ask(bank, ids, retriever, max_new_tokens=4).ids for ids in (PROMPT_IDS, PROMPT_IDS.flip(0))]
    turns = [answerer.begin(bank, ids, retriever, room_tokens=4) for ids in (PROMPT_IDS, PROMPT_IDS.flip(0))]
    found: list[list[int]] = [[], []]
    for _ in range(4):
        for ids, turn in zip(found, turns, strict=True):
            ids.append(int(turn.logits_V.argmax()))
            turn.step(ids[-1])
    assert [tuple(ids) for ids in found] == expected


def test_evidence_is_in_time_order_once_each_with_the_newest(answerer: StreamAnswerer, bank: RamBank) -> None:
    answer = answerer.ask(bank, PROMPT_IDS, BestAndRecent(3, recent=2), max_new_tokens=1)
    assert len(answer.evidence) == 3
    for layer in answer.evidence:
        assert len(layer.numbers) == len(set(layer.numbers)) == 5
        assert list(layer.numbers) == sorted(layer.numbers)
        assert layer.numbers[-2:] == (FRAMES - 2, FRAMES - 1)
        assert layer.spans_s == tuple(spans_of(FRAMES)[number] for number in layer.numbers)
        assert all(-1 <= score <= 1 for score in layer.scores)
        by_rank = sorted(zip(layer.ranks, layer.scores, strict=True))
        assert [score for _, score in by_rank] == sorted(layer.scores, reverse=True)
    assert {moment.number for moment in answer.moments()} == {
        number for layer in answer.evidence for number in layer.numbers
    }


def test_frames_after_the_question_are_hidden(stream: TinyStream, answerer: StreamAnswerer, bank: RamBank) -> None:
    retriever = BestAndRecent(3, recent=1)
    asked_then = answerer.ask(bank_of(*encode(stream, frames_of(stream, FRAMES)[:6], 21)), PROMPT_IDS, retriever,
                              max_new_tokens=3)  # fmt: skip
    asked_later = answerer.ask(bank, PROMPT_IDS, retriever, max_new_tokens=3, until_s=12.0)
    assert asked_later.ids == asked_then.ids
    assert [layer.numbers for layer in asked_later.evidence] == [layer.numbers for layer in asked_then.evidence]


def test_only_the_questions_tokens_retrieve(answerer: StreamAnswerer, bank: RamBank) -> None:
    """With the first tokens as the question, what comes after them cannot change what is retrieved."""
    retriever, question = BestAndRecent(3), slice(1, 3)
    other_end = torch.cat((PROMPT_IDS[:3], torch.tensor([1, 2, 60, 61])))
    picks = [
        [layer.numbers for layer in answerer.begin(bank, ids, retriever, question=question, room_tokens=0).evidence]
        for ids in (PROMPT_IDS, other_end)
    ]
    assert picks[0] == picks[1]


def test_embeddings_after_the_frames_stand_between_frames_and_prompt(stream: TinyStream) -> None:
    frames_FSD = frames_of(stream, 4)
    newline_SD = torch.randn(1, stream.kv_model.width)
    turn = StreamAnswerer(stream.kv_model, stream.head, newline_SD).begin(
        bank_of(*encode(stream, frames_FSD)), PROMPT_IDS, BestAndRecent(4), room_tokens=0
    )
    one_long_frame = torch.cat((frames_FSD.flatten(0, 1), newline_SD))[None]
    expected_TV = full_attention_logits(stream.text_model, stream.head, SINK_IDS, one_long_frame, PROMPT_IDS)
    torch.testing.assert_close(turn.logits_V, expected_TV[-1], atol=5e-5, rtol=5e-5)


def test_generation_stops_and_is_heard(answerer: StreamAnswerer, bank: RamBank) -> None:
    heard: list[int] = []
    whole = answerer.ask(bank, PROMPT_IDS, BestAndRecent(4), max_new_tokens=6, on_token=heard.append)
    assert (whole.finish, len(whole.ids), heard) == ("length", 6, list(whole.ids))
    stop = next(token for place, token in enumerate(whole.ids) if place and token not in whole.ids[:place])
    cut = answerer.ask(bank, PROMPT_IDS, BestAndRecent(4), max_new_tokens=6, stop_ids={stop})
    assert (cut.finish, cut.ids) == ("stop", whole.ids[: whole.ids.index(stop)])
    assert answerer.ask(bank, PROMPT_IDS, BestAndRecent(4), max_new_tokens=0).ids == ()


def test_the_head_never_sees_a_frames_token(stream: TinyStream) -> None:
    rows: list[int] = []
    handle = stream.head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].numel()))
    bank = bank_of(*encode(stream, frames_of(stream, FRAMES)))
    StreamAnswerer(stream.kv_model, stream.head).ask(bank, PROMPT_IDS, BestAndRecent(4), max_new_tokens=3)
    handle.remove()
    assert rows == [stream.kv_model.width] * 3


def test_questions_of_a_batch_are_heard_and_leave_it_one_by_one(
    stream: TinyStream, answerer: StreamAnswerer, bank: RamBank
) -> None:
    prompts = [PROMPT_IDS, PROMPT_IDS.flip(0), PROMPT_IDS[1:]]
    alone = [answerer.ask(bank, prompt_ids_T, BestAndRecent(3), max_new_tokens=6) for prompt_ids_T in prompts]
    stop_ids = {alone[1].ids[3]}
    stopped = alone[1].ids[: alone[1].ids.index(alone[1].ids[3])]
    heard: list[tuple[int, int]] = []
    asks = [
        Ask(bank, prompts[0], BestAndRecent(3), 2, on_token=lambda token: heard.append((0, token))),
        Ask(bank, prompts[1], BestAndRecent(3), 6, stop_ids, on_token=lambda token: heard.append((1, token))),
        Ask(bank, prompts[2], BestAndRecent(3), 6, on_token=lambda token: heard.append((2, token))),
        Ask(bank, prompts[2], BestAndRecent(3), 0),
    ]
    rows: list[int] = []
    handle = stream.head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))
    answers = answerer.ask_all(asks)
    handle.remove()
    assert [(answer.ids, answer.finish) for answer in answers if isinstance(answer, Answer)] == [
        (alone[0].ids[:2], "length"), (stopped, "stop"), (alone[2].ids, "length"), ((), "length")
    ]  # fmt: skip
    for place, ids in enumerate((alone[0].ids[:2], stopped, alone[2].ids)):
        assert tuple(token for which, token in heard if which == place) == ids
    assert heard[:3] == [(place, alone[place].ids[0]) for place in (0, 1, 2)], "each token as soon as it is known"
    assert rows == [4, *(sum(fed > step for fed in (1, len(stopped), 5)) for step in range(5))]


def test_whoever_cannot_listen_any_more_ends_its_own_answer_only(answerer: StreamAnswerer, bank: RamBank) -> None:
    def leave(token: int) -> None:
        raise BrokenPipeError(f"nobody hears {token}")

    asks = [
        Ask(bank, PROMPT_IDS, BestAndRecent(3), 4, on_token=leave),
        Ask(bank, PROMPT_IDS, BestAndRecent(3), 1, on_token=leave),
        Ask(bank, PROMPT_IDS, BestAndRecent(3), 4),
    ]
    *failed, whole = answerer.ask_all(asks)
    assert isinstance(whole, Answer)
    assert whole.ids == answerer.ask(bank, PROMPT_IDS, BestAndRecent(3), max_new_tokens=4).ids
    for error in failed:
        assert isinstance(error, StreamError)
        assert isinstance(error.__cause__, BrokenPipeError)
    with pytest.raises(StreamError, match="cut short after 1 tokens: BrokenPipeError"):
        answerer.ask(bank, PROMPT_IDS, BestAndRecent(3), max_new_tokens=4, on_token=leave)


def test_a_question_that_is_refused_harms_no_other(stream: TinyStream, answerer: StreamAnswerer, bank: RamBank) -> None:
    empty = RamBank(encode_sink(stream.kv_model, SINK_IDS), 2**20)
    good = Ask(bank, PROMPT_IDS, BestAndRecent(3), 4)
    other = Ask(bank, PROMPT_IDS.flip(0), BestAndRecent(2), 4, question=slice(2, 4), two_pass=True)
    asks = [
        Ask(empty, PROMPT_IDS, BestAndRecent(3), 4),
        good,
        Ask(bank, PROMPT_IDS, BestAndRecent(3), 4, question=slice(4, 4)),
        Ask(bank, PROMPT_IDS, BestAndRecent(3), 600),
        other,
        Ask(bank, PROMPT_IDS, ByNumber((99,)), 4, two_pass=True),
    ]
    expected = [said(answerer.ask_all([ask])[0]) for ask in (good, other)]
    answers = answerer.ask_all(asks)
    assert [said(answers[1]), said(answers[4])] == expected
    refused = [str(answers[place]) for place in (0, 2, 3, 5)]
    for message, why in zip(
        refused, ("no frame to", "holds no question", "the model takes 512", "none of"), strict=True
    ):
        assert why in message
    assert said(answerer.ask_all(asks[1:2])[0]) == expected[0], "the stream is as it was"


def test_what_cannot_be_answered_is_refused_before_anything_is_read(stream: TinyStream, bank: RamBank) -> None:
    """Else it would hold up all questions that are asked with it."""
    answerer = StreamAnswerer(stream.kv_model, stream.head)
    passes: list[int] = []
    hook = stream.text_model.embed_tokens.register_forward_hook(lambda *_: passes.append(1))
    other = tiny_stream("qwen3_moe", dtype=torch.bfloat16)
    foreign = bank_of(*encode(other, frames_of(other, 2)))
    refused = [
        Ask(bank, PROMPT_IDS.repeat(100), BestAndRecent(3), 4),
        Ask(bank, PROMPT_IDS, BestAndRecent(3), -1),
        Ask(foreign, PROMPT_IDS, BestAndRecent(3), 4),
    ]
    errors = [str(answer) for answer in answerer.ask_all(refused)]
    hook.remove()
    for error, why in zip(errors, ("the model takes 512", "-1 tokens is impossible", "torch.bfloat16"), strict=True):
        assert why in error
    assert passes == []


def test_a_stream_that_was_empty_answers_when_it_has_frames(stream: TinyStream, answerer: StreamAnswerer) -> None:
    sink, blocks = encode(stream, frames_of(stream, 3))
    bank = RamBank(sink, 2**30)
    with pytest.raises(StreamError, match="no frame to answer from"):
        answerer.ask(bank, PROMPT_IDS, BestAndRecent(2), max_new_tokens=3)
    for block in blocks:
        bank.put(block)
    expected = answerer.ask(bank_of(sink, blocks), PROMPT_IDS, BestAndRecent(2), max_new_tokens=3)
    assert answerer.ask(bank, PROMPT_IDS, BestAndRecent(2), max_new_tokens=3) == expected


def test_questions_that_cannot_be_answered(stream: TinyStream, answerer: StreamAnswerer, bank: RamBank) -> None:
    empty = RamBank(encode_sink(stream.kv_model, SINK_IDS), 2**20)
    retriever = BestAndRecent(2)
    with pytest.raises(StreamError, match="no frame to answer from"):
        answerer.ask(empty, PROMPT_IDS, retriever, max_new_tokens=1)
    with pytest.raises(StreamError, match="no frame to answer from"):
        answerer.ask(bank, PROMPT_IDS, retriever, max_new_tokens=1, until_s=1.0)
    with pytest.raises(StreamError, match="holds no question"):
        answerer.ask(bank, PROMPT_IDS, retriever, max_new_tokens=1, question=slice(4, 4))
    tokens = len(SINK_IDS) + 2 * FRAME_TOKENS + len(PROMPT_IDS)
    with pytest.raises(StreamError, match="need 513 tokens, the model takes 512"):
        answerer.ask(bank, PROMPT_IDS, retriever, max_new_tokens=513 - tokens)
    assert answerer.begin(bank, PROMPT_IDS, retriever, room_tokens=512 - tokens).logits_V.isfinite().all()
    with pytest.raises(StreamError, match="ask for at least one"):
        BestAndRecent(0)
