"""Many at once is one at a time: questions over two streams, and the frames of several streams, side by side."""

import pytest
import torch

from sparsight.errors import StreamError
from sparsight.kv.answerer import Answer, Ask, StreamAnswerer, Turn
from sparsight.kv.bank import RamBank
from sparsight.kv.block import KvBlock
from sparsight.kv.encoder import StreamEncoder, StreamFrames, encode_sink
from sparsight.kv.reference import full_attention_answer
from sparsight.kv.retrieve import BestAndRecent, ByNumber
from tests.unit.kv.tiny_stream import (
    ARCHITECTURES,
    PROMPT_IDS,
    SINK_IDS,
    TinyStream,
    bank_of,
    encode,
    frames_of,
    spans_of,
    tiny_stream,
)


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def stream(request: pytest.FixtureRequest) -> TinyStream:
    return tiny_stream(request.param)


@pytest.fixture(scope="module")
def asks(stream: TinyStream) -> list[Ask]:
    """Questions that differ in everything, over a stream inside its window and one far beyond it."""
    short = bank_of(*encode(stream, frames_of(stream, 4)))
    long = bank_of(*encode(stream, frames_of(stream, 14, seed=2), window_tokens=21))
    return [
        Ask(long, PROMPT_IDS, BestAndRecent(3, recent=1), 6),
        Ask(short, PROMPT_IDS.flip(0), BestAndRecent(9), 4),
        Ask(long, PROMPT_IDS[:1], BestAndRecent(2, similarity="dot"), 1),
        Ask(long, PROMPT_IDS.repeat(2), BestAndRecent(5, mass=0.6), 8, question=slice(2, 5)),
        Ask(short, PROMPT_IDS, BestAndRecent(2), 5, question=slice(1, 4), two_pass=True),
        Ask(long, PROMPT_IDS[2:], ByNumber((2, 6, 11)), 3, until_s=16.0),
        Ask(long, PROMPT_IDS, BestAndRecent(3), 2, question=slice(3, 6), two_pass=True, until_s=20.0),
    ]


def turns_of(begun: list[Turn | StreamError]) -> list[Turn]:
    turns = [turn for turn in begun if isinstance(turn, Turn)]
    assert len(turns) == len(begun)
    return turns


def test_logits_are_those_of_each_question_alone(stream: TinyStream, asks: list[Ask]) -> None:
    newline_SD = torch.randn(1, stream.kv_model.width, generator=torch.Generator().manual_seed(5))
    answerer = StreamAnswerer(stream.kv_model, stream.head, newline_SD)
    together = turns_of(answerer.begin_all(asks))
    alone = [turns_of(answerer.begin_all([ask]))[0] for ask in asks]
    for step in range(9):
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one.logits_V, other.logits_V, atol=1e-4, rtol=1e-4)
        going = [place for place, ask in enumerate(asks) if step < ask.max_new_tokens]
        tokens = [(7 * step + place) % 97 for place in going]
        answerer.step_all([together[place] for place in going], tokens)
        for place, token in zip(going, tokens, strict=True):
            alone[place].step(token)
    for one, other in zip(together, alone, strict=True):
        assert [layer.numbers for layer in one.evidence] == [layer.numbers for layer in other.evidence]


def test_each_answer_is_plain_full_attention_over_its_own_stream(stream: TinyStream) -> None:
    frames = [frames_of(stream, 3), frames_of(stream, 8, seed=2)]
    banks = [bank_of(*encode(stream, frames_FSD)) for frames_FSD in frames]
    pairs = [(0, PROMPT_IDS), (1, PROMPT_IDS[2:]), (1, PROMPT_IDS), (0, PROMPT_IDS.flip(0))]
    answers = StreamAnswerer(stream.kv_model, stream.head).ask_all(
        [Ask(banks[place], prompt_ids_T, BestAndRecent(8), 4) for place, prompt_ids_T in pairs]
    )
    expected = [
        full_attention_answer(stream.text_model, stream.head, SINK_IDS, frames[place], prompt_ids_T, 4)
        for place, prompt_ids_T in pairs
    ]
    assert [answer.ids for answer in answers if isinstance(answer, Answer)] == expected


def test_a_question_may_begin_while_others_are_answered(stream: TinyStream) -> None:
    bank = bank_of(*encode(stream, frames_of(stream, 6)))
    answerer = StreamAnswerer(stream.kv_model, stream.head)
    first, second = (answerer.begin(bank, ids, BestAndRecent(3), room_tokens=3) for ids in (PROMPT_IDS, PROMPT_IDS[1:]))
    expected = []
    for turn in (first, second):
        for token in (11, 12, 13):
            turn.step(token)
        expected.append(turn.logits_V)
    early = answerer.begin(bank, PROMPT_IDS, BestAndRecent(3), room_tokens=3)
    early.step(11)
    late = answerer.begin(bank, PROMPT_IDS[1:], BestAndRecent(3), room_tokens=3)
    answerer.step_all([late, early], [11, 12])
    answerer.step_all([early, late], [13, 12])
    late.step(13)
    torch.testing.assert_close(early.logits_V, expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(late.logits_V, expected[1], atol=1e-4, rtol=1e-4)


def test_frames_of_several_streams_give_the_blocks_of_each_alone(stream: TinyStream) -> None:
    """Windows, frame sizes and chunks differ; one stream joins late, and one chunk is refused."""
    sink = encode_sink(stream.kv_model, SINK_IDS)
    windows = (500, 23, 12, 14)
    frames = [frames_of(stream, 12, seed=seed) for seed in (1, 2, 3)] + [frames_of(stream, 12, seed=4)[:, :3]]
    together, alone = ([StreamEncoder(stream.kv_model, sink, window) for window in windows] for _ in range(2))
    found: list[list[KvBlock]] = [[] for _ in windows]
    expected: list[list[KvBlock]] = [[] for _ in windows]
    for round_, chunks in enumerate([(4, 1, 0, 2), (1, 6, 3, 1), (3, 3, 3, 5)]):
        batch: list[tuple[int, StreamFrames]] = []
        for place, chunk in enumerate(chunks):
            if chunk > 0:
                done = len(expected[place])
                frames_FSD, spans_s = frames[place][done : done + chunk], spans_of(chunk, done)
                expected[place] += alone[place].encode(frames_FSD, spans_s)
                batch.append((place, StreamFrames(together[place], frames_FSD, spans_s)))
        if round_ == 1:
            backwards = StreamFrames(together[0], frames[0][:1], [(0.0, 1.0)])
            results = StreamEncoder.encode_all([backwards, *(entry for place, entry in batch if place > 0)])
            assert isinstance(results[0], StreamError)
            results = [*StreamEncoder.encode_all([batch[0][1]]), *results[1:]]
        else:
            results = StreamEncoder.encode_all([entry for _, entry in batch])
        for (place, _), blocks in zip(batch, results, strict=True):
            assert not isinstance(blocks, StreamError)
            found[place] += blocks
    for blocks, others in zip(found, expected, strict=True):
        for block, other in zip(blocks, others, strict=True):
            assert (block.number, block.start_s, block.end_s) == (other.number, other.start_s, other.end_s)
            torch.testing.assert_close(block.page_L2GSC, other.page_L2GSC, atol=2e-5, rtol=2e-5)


def test_nothing_at_once_is_nothing(stream: TinyStream) -> None:
    assert StreamAnswerer(stream.kv_model, stream.head).ask_all([]) == []
    assert StreamEncoder.encode_all([]) == []
    empty = RamBank(encode_sink(stream.kv_model, SINK_IDS), 2**20)
    [refused] = StreamAnswerer(stream.kv_model, stream.head).ask_all([Ask(empty, PROMPT_IDS, BestAndRecent(1), 1)])
    assert isinstance(refused, StreamError)
