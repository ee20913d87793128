"""The one prompt that labelling, training, evaluation and serving share: conversation in, token ids out.

A conversation is rendered once by the tokenizer's own chat template, with marks where answers stand; the text
between marks is tokenized piece by piece, so an answer's tokens in training are exactly those that generation
would continue the prompt with. It knows nothing of pictures but how many tokens each one takes.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sparsight.errors import DataError
from sparsight.records import Turn

Value = TypeVar("Value")

Message = Mapping[str, Any]
"""A chat message in transformers' form: role, and content parts of type text or video."""

TEXT_MARK = "\ue000"
"""Stands for a text while a template renders a conversation, to be found again; text of users never holds it."""
_REMEMBERED = 10_000


@dataclass(frozen=True)
class EncodedChat:
    """Token ids of a whole conversation; `answer_spans` are [start, end) of each answer with its end-of-turn token.

    `starts` is empty for a conversation. For independent questions it says where each begins after the picture that
    they share: attention must then be packed (`sparsight.model.packing`), so that none sees another.
    """

    input_ids: list[int]
    answer_spans: list[tuple[int, int]]
    visual_tokens: int
    starts: tuple[int, ...] = ()

    @property
    def response_positions_n(self) -> npt.NDArray[np.int64]:
        """Positions of all answer tokens, in order. The hidden state one position earlier predicts each."""
        spans = [np.arange(start, end) for start, end in self.answer_spans]
        return np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)

    @property
    def response_ids_n(self) -> npt.NDArray[np.int32]:
        return np.asarray(self.input_ids, dtype=np.int32)[self.response_positions_n]


@dataclass(frozen=True)
class EncodedAnswers:
    """Token ids of one prompt and, after it, several answers to it, each computed as if it alone followed the prompt.

    `answer_spans` are [start, end) of each answer with its end-of-turn token; attention must be packed with `starts`.
    """

    input_ids: list[int]
    answer_spans: list[tuple[int, int]]
    visual_tokens: int

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(start for start, _ in self.answer_spans)

    @property
    def positions_n(self) -> npt.NDArray[np.int64]:
        """Positions of all answers' tokens, in order."""
        return np.concatenate([np.arange(start, end) for start, end in self.answer_spans])

    @property
    def before_n(self) -> npt.NDArray[np.int64]:
        """The position whose hidden state predicts each answer token: the prompt's last one for every first token."""
        last = self.answer_spans[0][0] - 1
        return np.concatenate([np.concatenate([[last], np.arange(*span)[:-1]]) for span in self.answer_spans])

    def answer_ids(self, answer: int) -> npt.NDArray[np.int32]:
        start, end = self.answer_spans[answer]
        return np.asarray(self.input_ids[start:end], dtype=np.int32)


@dataclass(frozen=True)
class FramesPrompt:
    """The ids around a clip: all that stands before its first visual token, and all after its last.

    `question` says which of `after_ids` are the question's own words.
    """

    before_ids: list[int]
    after_ids: list[int]
    question: slice


class ChatEncoder:
    """Wraps a tokenizer that has a chat template and a token that stands for one visual position."""

    def __init__(self, tokenizer: Any, visual_token: str) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(f"the tokenizer at '{tokenizer.name_or_path}' has no chat template: add one and try again")
        self.tokenizer = tokenizer
        self.visual_token = visual_token
        self.visual_id = int(tokenizer.convert_tokens_to_ids(visual_token))
        self.pad_id = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
        self.end_id = int(tokenizer.eos_token_id)
        self._special = sorted(map(str, tokenizer.all_special_tokens), key=len, reverse=True)
        self._remembered: dict[tuple[object, ...], Any] = {}

    @property
    def tokenizer_fingerprint(self) -> str:
        """Equal for two tokenizers exactly when they cut text into the same ids."""
        return hashlib.blake2b(self.tokenizer.backend_tokenizer.to_str().encode(), digest_size=8).hexdigest()

    @property
    def prompt_fingerprint(self) -> str:
        """Equal when the chat template wraps text in the same way."""
        text = f"{self.tokenizer.chat_template}\n{self.visual_token}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def plain(self, text: str) -> str:
        """The text with the tokenizer's special tokens broken up, so that users cannot forge turns or pictures."""
        text = text.replace(TEXT_MARK, "")
        for token in self._special:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def encode(self, turns: Sequence[Turn], visual_tokens: int) -> EncodedChat:
        """A whole conversation about one picture that takes `visual_tokens` tokens, 0 where there is none.

        Every answer must be present.
        """
        if len(turns) == 1:
            key = ("chat", turns[0].question, turns[0].answer, visual_tokens)
            return self._once(key, lambda: self._encode(turns, visual_tokens))
        return self._encode(turns, visual_tokens)

    def _encode(self, turns: Sequence[Turn], visual_tokens: int) -> EncodedChat:
        pieces = self._pieces(turns, visual_tokens)
        texts: list[str] = [pieces[0]]
        for turn, piece in zip(turns, pieces[1:], strict=True):
            end, rest = self.split_end(piece)
            texts += [self.plain(_answer_of(turn)) + end, rest]
        ids = self._tokenize(texts)
        input_ids = self._first(ids[0], visual_tokens)
        spans: list[tuple[int, int]] = []
        for answer_ids, rest_ids in zip(ids[1::2], ids[2::2], strict=True):
            spans.append((len(input_ids), len(input_ids) + len(answer_ids)))
            input_ids += answer_ids + rest_ids
        return EncodedChat(input_ids, spans, visual_tokens)

    def encode_independent(self, turns: Sequence[Turn], visual_tokens: int) -> EncodedChat:
        """Questions that share one picture and nothing else: the picture once, then what follows it in each prompt."""
        assert visual_tokens > 0, "what questions share is a picture"
        alone = [self.encode([turn], visual_tokens) for turn in turns]
        last_visual = max(index for index, token in enumerate(alone[0].input_ids) if token == self.visual_id)
        input_ids = alone[0].input_ids[: last_visual + 1]
        starts: list[int] = []
        spans: list[tuple[int, int]] = []
        for chat in alone:
            assert chat.input_ids[: last_visual + 1] == input_ids[: last_visual + 1]
            shift = len(input_ids) - last_visual - 1
            starts.append(len(input_ids))
            spans += [(start + shift, end + shift) for start, end in chat.answer_spans]
            input_ids = input_ids + chat.input_ids[last_visual + 1 :]
        return EncodedChat(input_ids, spans, visual_tokens, tuple(starts))

    def encode_answers(self, question: str, answers: Sequence[str], visual_tokens: int) -> EncodedAnswers:
        """Several answers to one question about a picture, if any: the prompt once, then each answer with its end."""
        pieces = self._pieces([Turn(question, None)], visual_tokens)
        end, _ = self.split_end(pieces[1])
        prompt, *answer_ids = self._tokenize([pieces[0], *(self.plain(answer) + end for answer in answers)])
        input_ids = self._first(prompt, visual_tokens)
        spans: list[tuple[int, int]] = []
        for ids in answer_ids:
            spans.append((len(input_ids), len(input_ids) + len(ids)))
            input_ids += ids
        return EncodedAnswers(input_ids, spans, visual_tokens)

    def turn_prompts(self, turns: Sequence[Turn], visual_tokens: int) -> list[list[int]]:
        """What to feed before each answer: the first holds the picture, if there is one (`visual_tokens` above 0),
        later ones what follows an answer's end."""
        if len(turns) == 1:
            key = ("prompt", turns[0].question, visual_tokens)
            return self._once(key, lambda: self._turn_prompts(turns, visual_tokens))
        return self._turn_prompts(turns, visual_tokens)

    def _turn_prompts(self, turns: Sequence[Turn], visual_tokens: int) -> list[list[int]]:
        pieces = self._pieces(turns, visual_tokens)
        texts = [pieces[0]] + [self.split_end(piece)[1] for piece in pieces[1:-1]]
        first, *later = self._tokenize(texts)
        return [self._first(first, visual_tokens), *later]

    def _once(self, key: tuple[object, ...], make: Callable[[], Value]) -> Value:
        """What was made of a single question, remembered: benchmarks ask few questions about many pictures."""
        if key not in self._remembered:
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = make()
        return self._remembered[key]

    def prompt(self, messages: Sequence[Message], visual_tokens: Sequence[int] = ()) -> list[int]:
        """Ids of a chat that ends where the assistant's answer begins; one count per video part, in order."""
        text = str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
        return self._expand(self._tokenize([text])[0], visual_tokens)

    def frames_prompt(self, question: str, earlier: Sequence[Turn] = ()) -> FramesPrompt:
        """The prompt of one question (not empty) about a clip, cut where the clip stands.

        `earlier` are the turns of a dialogue before it: the clip stands in the first, so what is before it is the same
        with and without them. How many fit beside the clip is the caller's to know. Raises `DataError` for an earlier
        turn without an answer.
        """
        if earlier:
            return self._frames_prompt(question, earlier)
        return self._once(("frames", question), lambda: self._frames_prompt(question))

    def _frames_prompt(self, question: str, earlier: Sequence[Turn] = ()) -> FramesPrompt:
        question = self.plain(question).strip()
        texts = [self.plain(text).strip() for turn in earlier for text in (turn.question, _answer_of(turn))]
        messages = _messages([*texts, TEXT_MARK], clip=True)
        rendered = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        before, *after = rendered.split(TEXT_MARK)
        text = before + question + "".join(after)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoding["input_ids"])
        if ids.count(self.visual_id) != 1 or len(after) != 1:
            raise DataError("the tokenizer's chat template does not show a clip and a question: streams need both")
        visual = ids.index(self.visual_id)
        own = [
            index
            for index, (first, last) in enumerate(encoding["offset_mapping"])
            if index > visual and last > len(before) and first < len(before) + len(question)
        ]
        return FramesPrompt(ids[:visual], ids[visual + 1 :], slice(own[0] - visual - 1, own[-1] - visual))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _pieces(self, turns: Sequence[Turn], visual_tokens: int) -> list[str]:
        """The rendered conversation cut where the answers stand: one piece more than there are turns."""
        texts = [text for turn in turns for text in (self.plain(turn.question), TEXT_MARK)]
        messages = _messages(texts, clip=visual_tokens > 0)
        text = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        pieces = text.split(TEXT_MARK)
        if len(pieces) != len(turns) + 1:
            raise DataError("the tokenizer's chat template drops or repeats answers: it cannot be trained on")
        return pieces

    def split_end(self, piece: str) -> tuple[str, str]:
        """The end-of-turn token that closes an answer, and the text after it."""
        for token in self._special:
            if piece.startswith(token):
                return token, piece[len(token) :]
        raise DataError("the chat template closes an answer without an end-of-turn token: generation could not stop")

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def _first(self, ids: list[int], visual_tokens: int) -> list[int]:
        """The piece before the first answer, which shows the picture if it takes any tokens."""
        return self._expand(ids, [visual_tokens] if visual_tokens else [])

    def _expand(self, ids: list[int], visual_tokens: Sequence[int]) -> list[int]:
        expanded: list[int] = []
        counts = iter(visual_tokens)
        for token in ids:
            expanded += [token] * next(counts, 0) if token == self.visual_id else [token]
        placeholders = ids.count(self.visual_id)
        if placeholders != len(visual_tokens):
            raise DataError(f"the conversation shows {placeholders} pictures but {len(visual_tokens)} were given")
        return expanded


def _messages(texts: Sequence[str], clip: bool) -> list[Message]:
    """User and assistant in turn, the user first; with a clip, that stands before the first message's text."""
    messages: list[Message] = []
    for index, text in enumerate(texts):
        content: list[Message] = [{"type": "video"}] if clip and index == 0 else []
        content.append({"type": "text", "text": text})
        messages.append({"role": "assistant" if index % 2 else "user", "content": content})
    return messages


def _answer_of(turn: Turn) -> str:
    if turn.answer is None:
        raise DataError(f"the answer to '{turn.question}' is withheld: label the sample first")
    return turn.answer
