"""Conversations: from LLaVA's message form to turns, from many turns to conversations of a bounded length, and when
two answers are the same.

Shared by the importers and the scene generator, judges and evaluation; pictures are not looked at here.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from sparsight.errors import DataError
from sparsight.records import PICTURE_MARK, Turn


def normalise(text: str) -> str:
    """Lower case, runs of white space as one space: the only liberties that exact match takes."""
    return " ".join(text.lower().split())


def pieces(turns: Sequence[Turn], most: int) -> list[tuple[Turn, ...]]:
    """The turns, in order, in as few conversations of at most `most` turns as possible, of nearly equal length.

    For conversations about a picture, whose parts it holds together: parts of one without might be dealt to different
    splits.
    """
    parts = -(-len(turns) // most)
    cuts = [part * len(turns) // parts for part in range(parts + 1)] if parts else []
    return [tuple(turns[start:end]) for start, end in pairwise(cuts)]


def read_conversation(messages: Any) -> tuple[Turn, ...]:
    """Turns of a LLaVA conversation: alternating `{"from": "human" | "gpt", "value": …}`, human first.

    The picture mark is taken out of the questions. Raises `DataError` with the fault for any other form.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise DataError("the conversation is not a list of messages")
    if len(messages) % 2:
        raise DataError(f"the conversation has {len(messages)} messages: every question needs an answer")
    values = [_value(message, index) for index, message in enumerate(messages)]
    questions = [value.replace(PICTURE_MARK, "").strip() for value in values[0::2]]
    answers = [value.strip() for value in values[1::2]]
    if sum(value.count(PICTURE_MARK) for value in values) > 1:
        raise DataError(f"the conversation shows more than one {PICTURE_MARK}")
    for index, text in enumerate(questions + answers):
        if not text:
            raise DataError(f"{'question' if index < len(questions) else 'answer'} {index % len(questions)} is empty")
    return tuple(Turn(question, answer) for question, answer in zip(questions, answers, strict=True))


def check_unseen(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises `DataError` where a conversation that `read_conversation` accepts, without a picture, shows one."""
    if any(PICTURE_MARK in message["value"] for message in messages):
        raise DataError(f"the conversation shows an {PICTURE_MARK}, but the row holds no picture")


def _value(message: Any, index: int) -> str:
    speaker = ("human", "gpt")[index % 2]
    if not isinstance(message, Mapping) or message.get("from") != speaker:
        raise DataError(f"message {index} of the conversation is not from '{speaker}'")
    value = message.get("value")
    if not isinstance(value, str):
        raise DataError(f"message {index} of the conversation has no text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"message {index} of the conversation holds half a character (a lone surrogate)")
    return value
