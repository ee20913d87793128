"""Questions in, answers and their evidence out: the model attends to the blocks that each layer asks for.

One pass over the prompt does it all: when a layer's queries of the question are known, that layer scores every block,
fetches the best, and attends to [sink, blocks in time order, prompt] at contiguous positions (`recall`); the next
layer's queries already contain what this one found. Then greedy decoding goes on over the same context. ReKV as
published has two passes instead, one over the bare question to retrieve; `two_pass` does that.
Several questions, about one stream or several, go through the model side by side; one alone is a batch of one. A
question changes nothing in the bank, and two questions know nothing of each other, nor of earlier turns unless these
stand in the prompt. The answerer has never seen the frames: all it needs is in the bank.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from sparsight.errors import LostBlockError, StreamError
from sparsight.kv.attention import KvTextModel
from sparsight.kv.bank import BlockBank
from sparsight.kv.block import KvBlock
from sparsight.kv.evidence import LayerEvidence, Moment, moments_of
from sparsight.kv.recall import Recall
from sparsight.kv.retrieve import Retriever

Finish = Literal["stop", "length"]


@dataclass(frozen=True, eq=False)
class Ask:
    """One question of a batch.

    `prompt_ids_T` is everything that follows the frames in the chat template; earlier turns of a dialogue may be part
    of it. `question` says which of its tokens are the question, whose mean query retrieves (the template's own words
    and earlier turns would dilute it). With `two_pass`, the question is read alone first and retrieves; then the prompt
    is read over what was found. `until_s` hides the blocks that end later, but not what earlier turns say of them. A
    token of `stop_ids` ends the answer, and so does the `max_new_tokens`-th; `on_token` hears every generated id at
    once, and an error of its own ends this question alone.
    """

    bank: BlockBank
    prompt_ids_T: Tensor
    retriever: Retriever
    max_new_tokens: int
    stop_ids: Collection[int] = ()
    question: slice = field(default_factory=lambda: slice(None))
    until_s: float | None = None
    two_pass: bool = False
    on_token: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Answer:
    """Generated ids (a stop id is not among them), why generation ended, and what every layer looked at."""

    ids: tuple[int, ...]
    finish: Finish
    evidence: tuple[LayerEvidence, ...]

    def moments(self) -> tuple[Moment, ...]:
        """The moments of the stream that the answer rests on, over all layers, most important first."""
        return moments_of(self.evidence)


class StreamAnswerer:
    """Answers questions about any stream whose blocks the same model has made.

    `head` is the model's language-model head. `after_frames_SD` are embeddings that the model was trained to see
    between the last frame and the prompt (LLaVA-OneVision's `image_newline`). `never_ids` are never predicted: the
    placeholder that stands for a picture.
    """

    def __init__(
        self,
        model: KvTextModel,
        head: nn.Module,
        after_frames_SD: Tensor | None = None,
        never_ids: Collection[int] = (),
    ) -> None:
        self._model = model
        self._head = head
        self._never_ids_V = torch.tensor(list(never_ids), dtype=torch.long, device=model.device)
        self._after_frames_SD = model.embed(torch.empty(0, dtype=torch.long))
        if after_frames_SD is not None:
            self._after_frames_SD = after_frames_SD.detach().to(model.device, model.dtype)

    def ask(
        self,
        bank: BlockBank,
        prompt_ids_T: Tensor,
        retriever: Retriever,
        *,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        question: slice = slice(None),
        until_s: float | None = None,
        two_pass: bool = False,
        on_token: Callable[[int], None] | None = None,
    ) -> Answer:
        """Answer one question greedily; the arguments are those of an `Ask`. Raises what `begin_all` returns."""
        [answer] = self.ask_all(
            [Ask(bank, prompt_ids_T, retriever, max_new_tokens, stop_ids, question, until_s, two_pass, on_token)]
        )
        if isinstance(answer, StreamError):
            raise answer
        return answer

    def ask_all(self, asks: Sequence[Ask]) -> list[Answer | StreamError]:
        """Answer several questions greedily, in step; each stops on its own, and the rest go on without it.

        The results stand in the order of the questions; the errors are those of `begin_all`, and for a question whose
        `on_token` fails one that it caused.
        """
        drafts = [
            turn if isinstance(turn, StreamError) else _Draft(ask, turn)
            for ask, turn in zip(asks, self.begin_all(asks), strict=True)
        ]
        going = [draft for draft in drafts if isinstance(draft, _Draft) and draft.goes_on]
        while going:
            tokens: list[int] = torch.stack([draft.turn.logits_V for draft in going]).argmax(dim=1).tolist()
            for draft, token in zip(going, tokens, strict=True):
                draft.hear(token)
            going = [draft for draft in going if draft.goes_on]
            self.step_all([draft.turn for draft in going], [draft.ids[-1] for draft in going])
        return [draft if isinstance(draft, StreamError) else draft.result() for draft in drafts]

    def begin(
        self,
        bank: BlockBank,
        prompt_ids_T: Tensor,
        retriever: Retriever,
        *,
        room_tokens: int,
        question: slice = slice(None),
        until_s: float | None = None,
        two_pass: bool = False,
    ) -> "Turn":
        """Retrieve and read one prompt. At most `room_tokens` tokens can be stepped afterwards; the other arguments are
        those of an `Ask`. Raises what `begin_all` returns."""
        [turn] = self.begin_all(
            [Ask(bank, prompt_ids_T, retriever, room_tokens, question=question, until_s=until_s, two_pass=two_pass)]
        )
        if isinstance(turn, StreamError):
            raise turn
        return turn

    def begin_all(self, asks: Sequence[Ask]) -> list["Turn | StreamError"]:
        """Retrieve for several questions and read their prompts, in one pass.

        A block that turns out lost is left out: its question is read again without it. A question without a block or a
        question token, or with a context longer than the model's, has a `StreamError` as its own result; the others
        are as if it had not been asked.
        """
        begun: dict[int, Turn | StreamError] = {}
        while left := [place for place in range(len(asks)) if place not in begun]:
            for place, turn in zip(left, self._begin([asks[place] for place in left]), strict=True):
                if not isinstance(turn, LostBlockError):  # after which its bank has a shorter index
                    begun[place] = turn
        return [begun[place] for place in range(len(asks))]

    def step_all(self, turns: Sequence["Turn"], tokens: Sequence[int]) -> None:
        """Append one token to each of several answers, in one pass. Turns may have begun at different times."""
        embeds_BD = self._model.embed(torch.tensor(tokens, dtype=torch.long))
        self._read(turns, embeds_BD[:, None].unbind())

    def _begin(self, asks: Sequence[Ask]) -> list["Turn | StreamError"]:
        turns: list[Turn | StreamError] = []
        for ask in asks:
            try:
                turns.append(self._open(ask))
            except StreamError as error:
                turns.append(error)
        going = [(ask, turn) for ask, turn in zip(asks, turns, strict=True) if isinstance(turn, Turn)]
        bare = [(ask, turn.recall) for ask, turn in going if ask.two_pass]
        bare_embeds = [self._model.embed(ask.prompt_ids_T[ask.question]) for ask, _ in bare]
        self._model.run_all(bare_embeds, [recall for _, recall in bare])
        for _, recall in bare:
            recall.forget_the_question()
        self._read([turn for _, turn in going], [self._prompt_embeds(ask) for ask, _ in going])
        return [turn if isinstance(turn, StreamError) else turn.recall.error or turn for turn in turns]

    def _open(self, ask: Ask) -> "Turn":
        index = ask.bank.index() if ask.until_s is None else ask.bank.index().until(ask.until_s)
        if len(index) == 0:
            raise StreamError("the stream has no frame to answer from: send frames first, or ask about a later time.")
        question = range(ask.prompt_ids_T.shape[0])[ask.question]
        if len(question) == 0:
            raise StreamError(f"{ask.question} of a prompt of {ask.prompt_ids_T.shape[0]} tokens holds no question.")
        before = self._after_frames_SD.shape[0]
        self._check_fits(ask, sink=ask.bank.sink)
        rows_T = torch.arange(len(question)) if ask.two_pass else torch.tensor(question) + before
        room_tokens = before + ask.prompt_ids_T.shape[0] + ask.max_new_tokens
        rows_T = rows_T.to(self._model.device)
        return Turn(self, Recall(self._model, ask.bank, index, ask.retriever, rows_T, room_tokens))

    def _check_fits(self, ask: Ask, sink: KvBlock) -> None:
        """Before anything is computed: a question that goes through the model holds up its whole batch."""
        model, page = self._model, sink.format
        made_for = (page.layers, page.heads, page.width, page.dtype)
        if made_for != (model.layers, model.kv_heads, model.head_width, model.dtype):
            raise StreamError(f"the stream's blocks are of {page}: answer with the model that encoded them.")
        wanted = sink.tokens + self._after_frames_SD.shape[0] + ask.prompt_ids_T.shape[0] + ask.max_new_tokens
        if ask.max_new_tokens < 0:
            raise StreamError(f"an answer of {ask.max_new_tokens} tokens is impossible: ask for at least 0.")
        if wanted >= model.max_tokens:
            raise StreamError(
                f"a prompt of {ask.prompt_ids_T.shape[0]} tokens and an answer of {ask.max_new_tokens} leave no room "
                f"for a frame, the model takes {model.max_tokens}: shorten the question, leave out the oldest earlier "
                "turns, or ask for less."
            )

    def _prompt_embeds(self, ask: Ask) -> Tensor:
        return torch.cat((self._after_frames_SD, self._model.embed(ask.prompt_ids_T)))

    def _read(self, turns: Sequence["Turn"], embeds: Iterable[Tensor]) -> None:
        hidden = self._model.run_all(list(embeds), [turn.recall for turn in turns])
        if not hidden:
            return
        with torch.no_grad():
            logits_BV = self._head(torch.stack([hidden_TD[-1] for hidden_TD in hidden]))
            logits_BV[:, self._never_ids_V] = -torch.inf
        for turn, logits_V in zip(turns, logits_BV, strict=True):
            turn.logits_V = logits_V


class Turn:
    """One question being answered: `logits_V` predict the next token, `step` appends one."""

    logits_V: Tensor

    def __init__(self, answerer: StreamAnswerer, recall: Recall) -> None:
        self.recall = recall
        self._answerer = answerer

    @property
    def evidence(self) -> tuple[LayerEvidence, ...]:
        return tuple(self.recall.evidence)

    def step(self, token: int) -> None:
        """Append a token of the answer."""
        self._answerer.step_all([self], [token])


class _Draft:
    """An answer while it is written."""

    def __init__(self, ask: Ask, turn: Turn) -> None:
        self.turn = turn
        self.ids: list[int] = []
        self._ask = ask
        self._finish: Finish | None = None if ask.max_new_tokens > 0 else "length"
        self._unheard: StreamError | None = None

    @property
    def goes_on(self) -> bool:
        return self._finish is None and self._unheard is None

    def hear(self, token: int) -> None:
        """Take the next token."""
        if token in self._ask.stop_ids:
            self._finish = "stop"
            return
        self.ids.append(token)
        if len(self.ids) == self._ask.max_new_tokens:
            self._finish = "length"
        if self._ask.on_token is not None:
            try:
                self._ask.on_token(token)
            except Exception as error:  # of whoever listens, whatever it is: the other questions go on
                self._unheard = StreamError(f"the answer was cut short after {len(self.ids)} tokens: {error!r}")
                self._unheard.__cause__ = error

    def result(self) -> Answer | StreamError:
        if self._unheard is not None:
            return self._unheard
        assert self._finish is not None
        return Answer(tuple(self.ids), self._finish, self.turn.evidence)
