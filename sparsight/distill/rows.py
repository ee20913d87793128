"""Training rows: a sample's conversation as the student's own token ids, joined with what the teacher said of it.

A row is only made when teacher and student agree on every token that is trained on; a disagreement is an
`AlignmentError` with the row's id, and nothing is ever cropped to fit. Called by the pipelines before training
starts, so that a bad store is refused before any worker runs.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from sparsight.config import StageConfig
from sparsight.data.split import choose_pictures
from sparsight.errors import AlignmentError, ConfigError
from sparsight.media.chat import ChatEncoder, EncodedChat
from sparsight.records import Sample, SparseTargets, TeacherSignal, Turn, hash_response


class Row(Protocol):
    """What the loop and the pipelines need of a row; `len` is its tokens, `positions_n` those that are learned."""

    @property
    def id(self) -> str: ...

    @property
    def content_hash(self) -> str: ...

    @property
    def positions_n(self) -> npt.NDArray[np.integer]: ...

    def __len__(self) -> int: ...


AnyRow = TypeVar("AnyRow", bound=Row)


class Asked(NamedTuple):
    """Where the words of a question stand in a row, [start, end), and the frames that its answer follows from."""

    start: int
    end: int
    frames: tuple[int, ...]


@dataclass(frozen=True)
class TrainingRow:
    """One conversation to learn from.

    `positions_n` are the positions of the answers' tokens in `input_ids`, the hidden state one earlier predicts each.
    `is_truth_n` marks tokens of answers that are ground truth (cross-entropy counts only those); `targets` are the
    teacher's distributions at the same n positions, None where there is no teacher. `starts` is where each of
    several independent questions begins, empty for a conversation. `asked` are those of them whose evidence is known.
    """

    id: str
    content_hash: str
    input_ids: npt.NDArray[np.int32]
    positions_n: npt.NDArray[np.int32]
    is_truth_n: npt.NDArray[np.bool_]
    targets: SparseTargets | None = None
    starts: tuple[int, ...] = ()
    asked: tuple[Asked, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def label_ids_n(self) -> npt.NDArray[np.int32]:
        return self.input_ids[self.positions_n]


def chosen_rows(rows: Sequence[AnyRow], stage: StageConfig, seed: int) -> list[AnyRow]:
    """The rows that a stage learns from, in order: short enough ones, of a seeded share of the pictures, at least one.

    Raises `ConfigError` where all rows are longer than the stage's `most_tokens`.
    """
    most = stage.most_tokens
    short = [row for row in rows if most is None or len(row) <= most]
    if rows and not short:
        raise ConfigError(
            f"stage '{stage.name}': no row has at most {most} tokens, the shortest has {min(map(len, rows))}: raise "
            "most_tokens"
        )
    hashes = {row.content_hash for row in short}
    chosen = choose_pictures(hashes, max(stage.share, 1.0 / max(1, len(hashes))), seed, "stage share")
    return [row for row in short if row.content_hash in chosen]


@dataclass(frozen=True)
class RowMaker:
    """Encodes samples for one student and checks the teacher's signals against that.

    `visual_tokens(frames)` is what a clip costs the student; `vocabulary` is the number of rows of its head.
    """

    chat: ChatEncoder
    visual_tokens: Callable[[int], int]
    vocabulary: int
    same_visual_tokens: bool = True

    def answered(self, samples: Iterable[Sample]) -> list[TrainingRow]:
        """Rows without a teacher, of the samples whose answers are all given; others are left out."""
        rows: list[TrainingRow] = []
        for sample in samples:
            if sample.has_ground_truth:
                encoded = self._chat_of(sample.independent, sample.turns, self.visual_tokens(len(sample.frames)))
                positions_n = encoded.response_positions_n.astype(np.int32)
                ids, truth_n = np.asarray(encoded.input_ids, np.int32), np.ones(len(positions_n), np.bool_)
                starts, asked = encoded.starts, self._asked(sample, encoded.starts, ids)
                rows.append(
                    TrainingRow(sample.id, sample.content_hash, ids, positions_n, truth_n, starts=starts, asked=asked)
                )
        return rows

    def _chat_of(self, independent: bool, turns: Sequence[Turn], visual_tokens: int) -> EncodedChat:
        encode = self.chat.encode_independent if independent else self.chat.encode
        return encode(turns, visual_tokens)

    def check_tokenizer(self, fingerprint: str | None) -> None:
        """Raises `AlignmentError` unless the signals were written with the student's tokenizer."""
        check_tokenizer("signals", fingerprint, self.chat.tokenizer_fingerprint)

    def labelled(self, samples: Iterable[Sample], signals: Iterable[TeacherSignal]) -> list[TrainingRow]:
        """Rows of the samples that have a signal, in the samples' order; samples without one are left out.

        Raises `AlignmentError` for a signal that does not fit its sample or this student, or has no sample at all.
        """
        by_id = {signal.id: signal for signal in signals}
        rows = [self.align(sample, by_id.pop(sample.id)) for sample in samples if sample.id in by_id]
        if by_id:
            raise misfit(next(iter(by_id)), "there is no sample of this id", "label these samples again")
        return rows

    def align(self, sample: Sample, signal: TeacherSignal) -> TrainingRow:
        """One sample and its signal as a row."""
        _check_content(sample, signal)
        visual_tokens = self.visual_tokens(len(sample.frames))
        if self.same_visual_tokens and visual_tokens != signal.visual_tokens:
            raise misfit(
                sample.id,
                f"its picture takes {signal.visual_tokens} tokens for the teacher, {visual_tokens} for the student",
                "use towers and patch sizes that agree, or set distill.same_visual_tokens: false",
            )
        answers = _cut(signal)
        ids, positions_n, starts = self._encode(sample, signal, answers, visual_tokens)
        if hash_response(ids[positions_n]) != signal.response_hash:
            raise misfit(sample.id, "the student cuts its answers into other tokens", "use the teacher's tokenizer")
        self._check_targets(sample.id, signal.targets, len(positions_n))
        truth_n = np.repeat(~np.asarray(signal.answered_by_teacher), signal.answer_lengths)
        asked = self._asked(sample, starts, ids)
        return TrainingRow(sample.id, signal.content_hash, ids, positions_n, truth_n, signal.targets, starts, asked)

    def _asked(self, sample: Sample, starts: Sequence[int], ids: npt.NDArray[np.int32]) -> tuple[Asked, ...]:
        """The questions that only some frames answer.

        Their words are those that retrieval takes from a stream's prompt, which is what follows the clip here.
        """
        found: list[Asked] = []
        for start, turn in zip(starts, sample.turns, strict=True) if starts else ():
            if 0 < len(turn.evidence) < len(sample.frames):
                prompt = self.chat.frames_prompt(turn.question)
                words = prompt.question
                if ids[start : start + words.stop].tolist() != prompt.after_ids[: words.stop]:
                    raise misfit(
                        sample.id,
                        f"'{turn.question}' is cut into other tokens behind a clip than in a stream's prompt",
                        "leave terms.retrieval out, or use another chat template",
                    )
                found.append(Asked(start + words.start, start + words.stop, turn.evidence))
        return tuple(found)

    def _encode(
        self, sample: Sample, signal: TeacherSignal, answers: Sequence[npt.NDArray[np.int32]], visual_tokens: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], tuple[int, ...]]:
        """Given answers are tokenized by the student; the teacher's own are the very tokens that it wrote."""
        turns = [
            replace(turn, answer="") if by_teacher else turn
            for turn, by_teacher in zip(sample.turns, signal.answered_by_teacher, strict=True)
        ]
        encoded = self._chat_of(sample.independent, turns, visual_tokens)
        ids: list[int] = []
        positions: list[int] = []
        starts: list[int] = []
        read = 0
        for (start, end), answer, by_teacher in zip(
            encoded.answer_spans, answers, signal.answered_by_teacher, strict=True
        ):
            starts += [first + len(ids) - read for first in encoded.starts if read <= first < start]
            ids += encoded.input_ids[read:start]
            written = answer.tolist() if by_teacher else encoded.input_ids[start:end]
            positions += range(len(ids), len(ids) + len(written))
            ids += written
            read = end
        ids += encoded.input_ids[read:]
        return np.asarray(ids, np.int32), np.asarray(positions, np.int32), tuple(starts)

    def _check_targets(self, row: str, targets: SparseTargets, positions: int) -> None:
        if len(targets) != positions:
            raise misfit(row, f"it has targets for {len(targets)} of {positions} answer tokens", "label it again")
        check_ids(row, targets, self.vocabulary)


def _check_content(sample: Sample, signal: TeacherSignal) -> None:
    if sample.content_hash != signal.content_hash:
        raise misfit(sample.id, "the teacher saw another picture than the sample holds", "label the samples again")
    if len(signal.answered_by_teacher) != len(sample.turns) or len(signal.answer_lengths) != len(sample.turns):
        raise misfit(
            sample.id,
            f"the teacher saw {len(signal.answer_lengths)} questions, the sample has {len(sample.turns)}",
            "label the samples again",
        )
    for turn, by_teacher in zip(sample.turns, signal.answered_by_teacher, strict=True):
        _check_source(sample.id, turn, by_teacher)


def _check_source(row: str, turn: Turn, by_teacher: bool) -> None:
    if turn.answer is None and not by_teacher:
        raise misfit(row, f"the teacher was given an answer to '{turn.question}', the sample has none", "label again")


def _cut(signal: TeacherSignal) -> list[npt.NDArray[np.int32]]:
    """The response ids of each answer."""
    if sum(signal.answer_lengths) != len(signal.response_ids_n):
        raise misfit(signal.id, "the lengths of its answers do not add up to its response", "label it again")
    return np.split(signal.response_ids_n, np.cumsum(signal.answer_lengths)[:-1])


def check_ids(row: str, targets: SparseTargets, vocabulary: int) -> None:
    """Raises `AlignmentError` where the teacher's targets name a token that a head of so many rows does not have."""
    for ids in (targets.head_ids_nK, targets.tail_ids_nS):
        if ids.size and int(ids.max()) >= vocabulary:
            raise misfit(
                row,
                f"the teacher gives weight to token {int(ids.max())}, the student's head ends at {vocabulary}",
                "use a student whose vocabulary is as large as the teacher's",
            )


def check_tokenizer(store: str, theirs: str | None, ours: str) -> None:
    """Raises `AlignmentError` unless a store was written with the student's tokenizer."""
    if theirs != ours:
        raise AlignmentError(
            f"the {store} were written with tokenizer {theirs or '(not recorded)'}, the student's is {ours}: their "
            "token ids do not mean the same; use a student with the teacher's tokenizer"
        )


def misfit(row: str, what: str, remedy: str) -> AlignmentError:
    """The refusal of one row."""
    return AlignmentError(f"row '{row}' cannot be trained on: {what}; {remedy}")
