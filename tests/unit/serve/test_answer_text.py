"""Text leaves as soon as it is certain, never earlier, and is never taken back."""

import pytest

from serve_apps.answer_text import AnswerText
from sparsight.model.vision_language import VisionLanguageModel


def spoken(model: VisionLanguageModel, text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """The pieces that come out when the tokens of `text` go in one by one."""
    answer = AnswerText(model.chat, stops)
    pieces: list[str] = []
    for token in model.chat.tokenizer(text, add_special_tokens=False)["input_ids"]:
        pieces.append(answer.add(token))
        if answer.stopped:
            return pieces, True
    return [*pieces, answer.finish()], False


@pytest.mark.parametrize("text", ["a red circle", "  spaced  out  ", "grün, 红色 🙂 done", "", "tail 🙂"])
def test_the_pieces_are_the_stripped_text(model: VisionLanguageModel, text: str) -> None:
    pieces, stopped = spoken(model, text)
    assert "".join(pieces) == text.strip()
    assert not any("\ufffd" in piece for piece in pieces)
    assert not stopped


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("one two three", ("two",), "one"),
        ("one two three", ("three", "two"), "one"),
        ("one\ntwo", ("\n",), "one"),
        ("one two", (" twice",), "one two"),
        ("aab", ("ab",), "a"),
        ("stop", ("stop",), ""),
    ],
)
def test_a_stop_string_ends_the_text_before_it(
    model: VisionLanguageModel, text: str, stops: tuple[str, ...], kept: str
) -> None:
    pieces, stopped = spoken(model, text, stops)
    assert "".join(pieces) == kept
    assert stopped == any(stop in text for stop in stops)


def test_a_broken_character_at_the_end_is_still_said(model: VisionLanguageModel) -> None:
    answer = AnswerText(model.chat)
    half = model.chat.tokenizer("🙂", add_special_tokens=False)["input_ids"][:-1]
    assert "".join(answer.add(token) for token in half) == ""
    assert "\ufffd" in answer.finish()
