"""A stream asked with everything retrieved says what the chat path says of the same frames as one clip."""

import pytest
import torch
from PIL import Image

from serve_apps.refusals import RequestRefusedError
from serve_apps.stream_host import FrameEncoder, QuestionAnswerer
from sparsight.config import StreamConfig
from sparsight.errors import ConfigError
from sparsight.kv.answerer import StreamAnswerer
from sparsight.kv.attention import KvTextModel
from sparsight.kv.bank import RamBank
from sparsight.kv.block import KvBlock
from sparsight.kv.retrieve import BestAndRecent
from sparsight.media.pixels import to_pixels
from sparsight.model.decode import BatchDecoder
from sparsight.model.vision_language import VisionLanguageModel
from tests.unit.serve.conftest import picture

QUESTION = "what shape is in the image?"
EVERYTHING = StreamConfig(window_tokens=400, retrieve_blocks=16, recent_blocks=2)


@pytest.fixture(scope="module")
def kv_model(model: VisionLanguageModel) -> KvTextModel:
    return KvTextModel(model.model.model.language_model)


def filled(model: VisionLanguageModel, kv_model: KvTextModel, frames: int) -> RamBank:
    """A bank with so many frames, a second apart."""
    encoder = FrameEncoder(model, kv_model, EVERYTHING)
    bank = RamBank(encoder.sink, 10**9)
    pictures, times_s = clip(frames)
    for block in encoder.encode("s", 0, nothing, pictures, times_s):
        bank.put(block)
    return bank


def clip(frames: int) -> tuple[list[Image.Image], list[float]]:
    return [picture(seed) for seed in range(frames)], [float(second) for second in range(frames)]


def nothing(_: int) -> list[KvBlock]:
    """The newest blocks of a new stream."""
    return []


def clip_decoder(model: VisionLanguageModel, frames: int) -> BatchDecoder:
    """The chat path, fed with the frames as one clip and the question."""
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]
    ids = model.chat.prompt(messages, [model.visual_tokens(frames)])
    decoder = BatchDecoder(model, 1)
    with torch.no_grad():
        features_FPD = model.features(to_pixels([picture(seed) for seed in range(frames)], model.pixels))
        decoder.feed([ids], model.clip_embeds(features_FPD[None])[0])
    return decoder


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_logits_and_answers_equal_those_of_the_chat_path(
    model: VisionLanguageModel, kv_model: KvTextModel, frames: int
) -> None:
    bank = filled(model, kv_model, frames)
    decoder = clip_decoder(model, frames)
    prompt = model.chat.frames_prompt(QUESTION)
    head, placeholder = model.model.get_output_embeddings(), model.chat.visual_id
    answerer = StreamAnswerer(kv_model, head, model.newline_D[None], never_ids={placeholder})
    retriever = BestAndRecent(14, 2)
    turn = answerer.begin(bank, torch.tensor(prompt.after_ids), retriever, question=prompt.question, room_tokens=1)
    assert turn.logits_V[placeholder] == -torch.inf
    torch.testing.assert_close(turn.logits_V, decoder.logits_BV[0], atol=1e-4, rtol=1e-4)

    answer = QuestionAnswerer(model, kv_model, EVERYTHING).ask(bank, QUESTION, 16)
    [ids] = decoder.decode([16])
    assert answer.text == model.chat.decode(ids)
    assert {moment.number for moment in answer.answer.moments()} == set(range(frames))


def test_nobody_can_write_a_picture(model: VisionLanguageModel, kv_model: KvTextModel) -> None:
    """Not even a model that would write nothing else."""
    bank, placeholder = filled(model, kv_model, 2), model.chat.visual_id
    head = model.model.get_output_embeddings()
    answerer = QuestionAnswerer(model, kv_model, EVERYTHING)
    expected = answerer.ask(bank, QUESTION, 8).answer.ids
    handle = head.register_forward_hook(lambda _, __, logits_V: logits_V.index_fill(-1, torch.tensor(placeholder), 1e6))
    with torch.no_grad():
        assert head(torch.zeros(model.newline_D.shape[0])).argmax() == placeholder
    ids = answerer.ask(bank, QUESTION, 8).answer.ids
    handle.remove()
    assert ids == expected
    assert placeholder not in ids


def test_an_encoder_goes_on_where_another_ended(model: VisionLanguageModel, kv_model: KvTextModel) -> None:
    config = StreamConfig(window_tokens=40)
    pictures, times_s = clip(9)
    blocks = FrameEncoder(model, kv_model, config).encode("s", 0, nothing, pictures, times_s)
    fresh = FrameEncoder(model, kv_model, config)
    rest = fresh.encode("s", 6, lambda _: blocks[3:6], pictures[6:8], times_s[6:8])
    rest += fresh.encode("s", 8, impossible, pictures[8:], times_s[8:])
    assert [block.number for block in rest] == [6, 7, 8]
    for block, expected in zip(rest, blocks[6:], strict=True):
        torch.testing.assert_close(block.page_L2GSC, expected.page_L2GSC, atol=1e-5, rtol=1e-5)


def test_an_encoder_takes_up_a_stream_that_went_on_without_it(
    model: VisionLanguageModel, kv_model: KvTextModel
) -> None:
    """Blocks that it made and nobody kept, and those of others that it has not seen."""
    config = StreamConfig(window_tokens=40)
    pictures, times_s = clip(9)
    blocks = FrameEncoder(model, kv_model, config).encode("s", 0, nothing, pictures, times_s)
    for had in (slice(0, 3), slice(0, 8)):
        encoder = FrameEncoder(model, kv_model, config)
        encoder.encode("s", 0, nothing, pictures[had], times_s[had])
        [block] = encoder.encode("s", 6, lambda _: blocks[3:6], pictures[6:7], times_s[6:7])
        torch.testing.assert_close(block.page_L2GSC, blocks[6].page_L2GSC, atol=1e-5, rtol=1e-5)


def test_an_encoder_keeps_no_more_streams_than_there_can_be(model: VisionLanguageModel, kv_model: KvTextModel) -> None:
    """Those that ended somewhere else are never forgotten by name."""
    encoder = FrameEncoder(model, kv_model, StreamConfig(window_tokens=40, max_streams=2))
    pictures, times_s = clip(2)
    first = encoder.encode("0", 0, nothing, pictures[:1], times_s[:1])
    for stream_id in ("1", "2"):
        encoder.encode(stream_id, 0, nothing, pictures[:1], times_s[:1])
    encoder.encode("2", 1, impossible, pictures[1:], times_s[1:])
    with pytest.raises(AssertionError):
        encoder.encode("0", 1, impossible, pictures[1:], times_s[1:])
    assert [block.number for block in encoder.encode("0", 1, lambda _: first, pictures[1:], times_s[1:])] == [1]


def impossible(_: int) -> list[KvBlock]:
    raise AssertionError("this encoder has had these frames itself")


def test_frames_and_prompt_leave_the_answer_what_room_there_is(
    model: VisionLanguageModel, kv_model: KvTextModel
) -> None:
    """To the token: nothing that is let through fails later, and what leaves no room for one token is refused."""
    most = kv_model.max_tokens // model.frame_tokens
    bank = filled(model, kv_model, most)
    prompt = model.chat.frames_prompt(QUESTION)
    text_tokens = len(prompt.before_ids) + len(prompt.after_ids)
    blocks = max(blocks for blocks in range(most) if model.visual_tokens(blocks) + text_tokens < kv_model.max_tokens)
    room = kv_model.max_tokens - model.visual_tokens(blocks) - text_tokens
    answerer = QuestionAnswerer(model, kv_model, StreamConfig(retrieve_blocks=blocks, recent_blocks=1))
    answer = answerer.ask(bank, QUESTION, room + 5)
    assert answer.prompt_tokens == text_tokens + model.visual_tokens(blocks)
    assert len(answer.answer.ids) <= room
    with pytest.raises(RequestRefusedError) as refused:
        answerer.ask(bank, QUESTION + " really" * room, 1)
    assert (refused.value.refusal.status, refused.value.refusal.code) == (400, "context_length_exceeded")


def test_frames_that_leave_no_room_for_a_question_are_refused_at_the_start(
    model: VisionLanguageModel, kv_model: KvTextModel
) -> None:
    too_many = kv_model.max_tokens // model.frame_tokens
    with pytest.raises(ConfigError, match=f"{too_many} retrieve_blocks take"):
        QuestionAnswerer(model, kv_model, StreamConfig(retrieve_blocks=too_many))


@pytest.mark.parametrize("question", ["assistant user", "hi", "?", "<video> <|end|>", "red circle  \n"])
def test_the_prompt_is_cut_where_the_clip_stands(model: VisionLanguageModel, question: str) -> None:
    prompt = model.chat.frames_prompt(question)
    text = model.chat.plain(question).strip()
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}]
    placeholder = model.chat.visual_id
    assert prompt.before_ids + [placeholder] * 3 + prompt.after_ids == model.chat.prompt(messages, [3])
    assert model.chat.decode(prompt.after_ids[prompt.question]) == text
    assert len(prompt.after_ids) > len(prompt.after_ids[prompt.question])
