"""One model sits the questions of one long stream, by every method that it is asked to.

The stream's frames are encoded once inside the sliding window; methods that retrieve choose among those blocks.
`uniform` and `recent` are what is done without a memory: the chosen frames become a clip of their own, encoded anew.
`full` encodes all frames under full attention. All answers are greedy, from the same prompt, and no question sees a
frame later than its own. A plain class, without Ray; run by `stream_trials`.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsight.data.streams import QuestionedStream, StreamQuestion, StreamRecipe
from sparsight.errors import StreamError
from sparsight.evaluate.stream_scores import StreamAnswerRow
from sparsight.kv.answerer import Answer, Ask, StreamAnswerer
from sparsight.kv.attention import KvTextModel
from sparsight.kv.bank import RamBank
from sparsight.kv.block import KvBlock
from sparsight.kv.encoder import StreamEncoder, encode_sink
from sparsight.kv.head_training import evidence_frames, projected_stream
from sparsight.kv.page import Encoding
from sparsight.kv.retrieval_head import HeadEmbedder
from sparsight.kv.retrieve import BestAndRecent, ByEmbedding, ByNumber, Retriever
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.trials import StreamMethod

FRAMES_PER_CALL = 64


class StreamExam:
    """A model, ready to be asked about streams. Its `embedder` serves the method `external`."""

    def __init__(
        self,
        model: VisionLanguageModel,
        window_tokens: int,
        max_answer_tokens: int,
        embedder: HeadEmbedder | None = None,
    ) -> None:
        self._model = model
        self._kv_model = KvTextModel(model.model.model.language_model)
        self._window_tokens = window_tokens
        self._max_answer_tokens = max_answer_tokens
        self._embedder = embedder
        self._sink = encode_sink(self._kv_model, torch.tensor(model.chat.frames_prompt("?").before_ids))
        self._answerer = StreamAnswerer(
            self._kv_model,
            model.model.get_output_embeddings(),
            after_frames_SD=model.newline_D.detach()[None],
            never_ids=(model.chat.visual_id,),
        )

    def sit(
        self, name: str, stream: QuestionedStream, methods: Sequence[StreamMethod]
    ) -> tuple[list[StreamAnswerRow], list[str]]:
        """The answers to all questions by all methods, and which methods the stream is too long for."""
        recipe = stream.recipe
        frames_FSD = projected_stream(self._model, recipe)
        vectors_FD = None if self._embedder is None else self._embedder.embed_projected(frames_FSD)
        banks = self._banks(methods, recipe, frames_FSD)
        fitting = [method for method in methods if method.kind != "full" or self._fits(recipe.frames)]
        rows: list[StreamAnswerRow] = []
        for question in stream.questions:
            frame = round(question.time_s * recipe.frames_per_second)
            asks = [self._ask(method, question, frame, recipe, frames_FSD, banks, vectors_FD) for method in fitting]
            for method, answer in zip(fitting, self._answerer.ask_all(asks), strict=True):
                if isinstance(answer, StreamError):
                    raise answer
                rows.append(self._row(name, method.name, stream, question, answer))
        return rows, [method.name for method in methods if method not in fitting]

    def _ask(
        self,
        method: StreamMethod,
        question: StreamQuestion,
        frame: int,
        recipe: StreamRecipe,
        frames_FSD: Tensor,
        banks: Mapping[str, RamBank],
        vectors_FD: Tensor | None,
    ) -> Ask:
        prompt = self._model.chat.frames_prompt(question.question)
        if method.kind in ("uniform", "recent"):
            numbers = chosen_alone(method, frame)
            bank = self._bank(self._encode(frames_FSD[numbers], recipe, numbers, self._kv_model.max_tokens))
            retriever: Retriever = BestAndRecent(best=len(numbers))
        else:
            bank = banks["full" if method.kind == "full" else method.pages]
            retriever = self._retriever(method, question, frame, recipe, vectors_FD)
        return Ask(
            bank,
            torch.tensor(prompt.after_ids),
            retriever,
            self._max_answer_tokens,
            stop_ids=(self._model.chat.end_id,),
            question=prompt.question,
            until_s=recipe.time_s(frame + 1),
            two_pass=method.two_pass,
        )

    def _retriever(
        self,
        method: StreamMethod,
        question: StreamQuestion,
        frame: int,
        recipe: StreamRecipe,
        vectors_FD: Tensor | None,
    ) -> Retriever:
        """How the methods with a memory choose blocks."""
        best = method.frames - method.recent
        if method.kind == "full":
            return BestAndRecent(best=frame + 1)
        if method.kind == "oracle":
            return ByNumber(oracle_frames(method, question, frame, recipe))
        if method.kind == "external":
            assert self._embedder is not None, "external retrieval needs a head"
            assert vectors_FD is not None
            question_D = self._embedder.embed_question(question.question)
            return ByEmbedding(vectors_FD, question_D, best, method.recent, method.group, method.around)
        return BestAndRecent(best, method.recent, method.similarity, method.group, method.mass, method.around)

    def _row(
        self, name: str, method: str, stream: QuestionedStream, question: StreamQuestion, answer: Answer
    ) -> StreamAnswerRow:
        recalls = [question.recall(layer.spans_s) for layer in answer.evidence]
        known = [recall for recall in recalls if recall is not None]
        return StreamAnswerRow(
            model=name,
            method=method,
            stream=stream.id,
            seconds=stream.recipe.seconds,
            question_id=question.id,
            kind=question.kind,
            answer_type=question.answer_type,
            question=question.question,
            reference=question.answer,
            answer=self._model.chat.decode(answer.ids),
            recall=sum(known) / len(known) if known else math.nan,
        )

    def _banks(self, methods: Sequence[StreamMethod], recipe: StreamRecipe, frames_FSD: Tensor) -> dict[str, RamBank]:
        """The stream's memory by kind of page, and `full`, as far as the methods need them."""
        numbers = list(range(recipe.frames))
        kept: set[Encoding] = {method.pages for method in methods if method.kind in ("internal", "external", "oracle")}
        banks: dict[str, RamBank] = {}
        if kept:
            blocks = self._encode(frames_FSD, recipe, numbers, self._window_tokens)
            for pages in sorted(kept):
                banks[pages] = self._bank(blocks if pages == "plain" else [quantised(it, pages) for it in blocks])
        if any(method.kind == "full" for method in methods) and self._fits(recipe.frames):
            banks["full"] = self._bank(self._encode(frames_FSD, recipe, numbers, self._kv_model.max_tokens))
        return banks

    def _fits(self, frames: int) -> bool:
        """Whether all frames, the longest prompt and the answer have room in the model's longest context."""
        room = 256 + self._max_answer_tokens
        return self._sink.tokens + frames * self._model.frame_tokens + room <= self._kv_model.max_tokens

    def _encode(
        self, frames_FSD: Tensor, recipe: StreamRecipe, numbers: Sequence[int], window_tokens: int
    ) -> list[KvBlock]:
        encoder = StreamEncoder(self._kv_model, self._sink, window_tokens)
        spans_s = [(recipe.time_s(number), recipe.time_s(number + 1)) for number in numbers]
        blocks: list[KvBlock] = []
        for start in range(0, len(spans_s), FRAMES_PER_CALL):
            part = slice(start, start + FRAMES_PER_CALL)
            blocks += encoder.encode(frames_FSD[part], spans_s[part])
        return blocks

    def _bank(self, blocks: Sequence[KvBlock]) -> RamBank:
        bank = RamBank(self._sink, budget_bytes=self._sink.nbytes + sum(block.nbytes for block in blocks))
        for block in blocks:
            bank.put(block)
        return bank


def quantised(block: KvBlock, pages: Encoding) -> KvBlock:
    """The same block as it would have been kept with quantised pages."""
    return KvBlock.from_page(block.number, block.start_s, block.end_s, block.page_L2GSC, pages)


def chosen_alone(method: StreamMethod, frame: int) -> list[int]:
    """The frames of the methods without a memory, for a question when `frame` is the newest."""
    if method.kind == "recent":
        return list(range(max(0, frame + 1 - method.frames), frame + 1))
    return evenly(range(frame + 1), method.frames)


def oracle_frames(method: StreamMethod, question: StreamQuestion, frame: int, recipe: StreamRecipe) -> tuple[int, ...]:
    """Frames of the evidence at equal distances, or of everything so far where nothing is evidence, since any frame may
    deny then; and the newest."""
    evidence: list[int] = evidence_frames(question, recipe)[: frame + 1].nonzero().flatten().tolist()
    newest = range(max(0, frame + 1 - method.recent), frame + 1)
    return tuple(dict.fromkeys([*evenly(evidence or range(frame + 1), method.frames - method.recent), *newest]))


def evenly(numbers: Sequence[int], most: int) -> list[int]:
    """At most so many of the numbers, at equal distances, each from the middle of its stretch."""
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[int((index + 0.5) * len(numbers) / most)] for index in range(most)]
