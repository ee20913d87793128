"""The text of one growing answer: what may be sent now, and where a stop string ends it.

Nothing that was sent is ever taken back: the beginning of a stop string, half a character and trailing spaces wait
until what follows is known. Used by `student`, one for each request.
"""

from collections.abc import Sequence

from sparsight.media.chat import ChatEncoder

_HALF = "\ufffd"
"""What a decoder writes for a character whose bytes are not all there yet."""


class AnswerText:
    """Takes token ids, gives text. All pieces together are the stripped text before the first stop string."""

    def __init__(self, chat: ChatEncoder, stops: Sequence[str] = ()) -> None:
        self._chat = chat
        self._stops = stops
        self._ids: list[int] = []
        self._sent = ""
        self.stopped = False

    @property
    def tokens(self) -> int:
        return len(self._ids)

    def add(self, token: int) -> str:
        """The text that has become certain with one more token; `stopped` says whether it is the last."""
        self._ids.append(token)
        text = self._text()
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._send(text[: min(found)].rstrip())
        text = text.rstrip(_HALF)
        return self._send(text[: len(text) - self._undecided(text)].rstrip())

    def finish(self) -> str:
        """The text that was held back, when no token follows."""
        return "" if self.stopped else self._send(self._text().rstrip())

    def _text(self) -> str:
        return str(self._chat.tokenizer.decode(self._ids, skip_special_tokens=True)).lstrip()

    def _undecided(self, text: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        lengths = (length for stop in self._stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
        return max(lengths, default=0)

    def _send(self, text: str) -> str:
        if not text.startswith(self._sent):
            return ""
        piece, self._sent = text[len(self._sent) :], max(text, self._sent, key=len)
        return piece
