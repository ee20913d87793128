"""The rows that stages hand to each other, and their Parquet schemas: the contract between the rooms.

A `Sample` is written by data preparation and read by labelling, training and evaluation. A `TeacherSignal` is
written by labelling and read by distillation, a `PreferencePair` is written by pair making and read by preference
distillation; a `VisualSignal` is what a teacher says about the picture itself (module `data.visual_signals` stores it).
None knows how it is computed; torch is not imported here.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SAMPLES_VERSION = 3
SIGNALS_VERSION = 1
PAIRS_VERSION = 1

PICTURE_MARK = "<image>"
"""Stands in a LLaVA conversation where the picture is shown; stripped before the text reaches a tokenizer."""


@dataclass(frozen=True)
class Turn:
    """One question about the picture, with its answer or, where the answer is withheld, None.

    `evidence` are the numbers of the frames that the answer follows from; none where that is not known.
    """

    question: str
    answer: str | None
    answer_type: str = "open"
    evidence: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One picture (or the frames of a clip, in time order) and a conversation about it, or a conversation alone.

    `frames` holds encoded pictures (PNG, JPEG, WebP); a picture is a clip of one frame, text alone has none.
    `frame_times_s` is as long as `frames`. `content_hash` recognises equal pictures without decoding. `independent`
    questions do not build on each other: every one is answered from the picture alone (there is one), and a model
    that answers one must not see the others (they would give answers away).
    """

    id: str
    frames: tuple[bytes, ...]
    turns: tuple[Turn, ...]
    source: str
    frame_times_s: tuple[float, ...] = (0.0,)
    independent: bool = False

    @property
    def content_hash(self) -> str:
        """Of the frames; of text alone, of its first question, which stays when answers or later turns are taken."""
        return hash_frames(self.frames or [turn.question.encode() for turn in self.turns[:1]])

    @property
    def has_ground_truth(self) -> bool:
        return all(turn.answer is not None for turn in self.turns)

    def without_answers(self) -> "Sample":
        """The same sample with every answer withheld, and where it is to be seen: what a teacher is given to label."""
        return replace(self, turns=tuple(replace(turn, answer=None, evidence=()) for turn in self.turns))

    def to_row(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "frames": list(self.frames),
            "frame_times_s": list(self.frame_times_s),
            "content_hash": self.content_hash,
            "conversation": conversation_of(self.turns, bool(self.frames)),
            "answer_types": [turn.answer_type for turn in self.turns],
            "evidence": [list(turn.evidence) for turn in self.turns],
            "source": self.source,
            "independent": self.independent,
        }

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> "Sample":
        values = [message["value"] for message in row["conversation"]]
        types = [str(kind) for kind in row["answer_types"]]
        turns = tuple(
            Turn(question.replace(PICTURE_MARK, "").strip(), answer, kind, tuple(evidence))
            for question, answer, kind, evidence in zip(values[0::2], values[1::2], types, row["evidence"], strict=True)
        )
        return Sample(
            id=str(row["id"]),
            frames=tuple(bytes(frame) for frame in row["frames"]),
            turns=turns,
            source=str(row["source"]),
            frame_times_s=tuple(float(time_s) for time_s in row["frame_times_s"]),
            independent=bool(row["independent"]),
        )


def conversation_of(turns: Sequence[Turn], shows_picture: bool) -> list[dict[str, str | None]]:
    """LLaVA form: alternating human and gpt messages, the picture mark, if any, in the first human one."""
    messages: list[dict[str, str | None]] = []
    for index, turn in enumerate(turns):
        mark = f"{PICTURE_MARK}\n" if shows_picture and index == 0 else ""
        messages.append({"from": "human", "value": mark + turn.question})
        messages.append({"from": "gpt", "value": turn.answer})
    return messages


def hash_frames(frames: Sequence[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for frame in frames:
        digest.update(len(frame).to_bytes(8, "little"))
        digest.update(frame)
    return digest.hexdigest()


SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("frames", pa.list_(pa.binary()), nullable=False),
        pa.field("frame_times_s", pa.list_(pa.float64()), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),
        pa.field("conversation", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
        pa.field("answer_types", pa.list_(pa.string())),
        pa.field("evidence", pa.list_(pa.list_(pa.int32()))),
        pa.field("source", pa.string()),
        pa.field("independent", pa.bool_()),
    ],
    metadata={"sparsight.samples": str(SAMPLES_VERSION)},
)


@dataclass(frozen=True)
class SparseTargets:
    """A teacher's next-token distributions at n positions, without their vocabulary axis.

    The exact K most probable tokens, the probability mass left outside them, and S draws (with replacement) from
    that remainder, renormalised: each draw stands for `tail_mass / S`, which makes sums over the tail unbiased
    (Sparse Logit Sampling, arXiv 2503.16870). S may be 0, and a draw of id -1 is empty (no mass was left).
    """

    head_ids_nK: npt.NDArray[np.int32]
    head_logprobs_nK: npt.NDArray[np.float32]
    tail_mass_n: npt.NDArray[np.float32]
    tail_ids_nS: npt.NDArray[np.int32]
    tail_logprobs_nS: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.tail_mass_n)


@dataclass(frozen=True)
class Relation:
    """How the head's logits Z [N, V] at N positions relate to each other: R = Z Zᵀ (LLaVA-KD, arXiv 2410.16236), up to
    a positive factor.

    Held as `matrix_NN` or as `factors_NJ` with R = F Fᵀ, whichever has fewer numbers.
    """

    matrix_NN: npt.NDArray[np.float32] | None = None
    factors_NJ: npt.NDArray[np.float32] | None = None

    def to_matrix(self) -> npt.NDArray[np.float32]:
        """R, [N, N]."""
        if self.matrix_NN is not None:
            return self.matrix_NN
        assert self.factors_NJ is not None
        return self.factors_NJ @ self.factors_NJ.T


@dataclass(frozen=True)
class VisualSignal:
    """What the teacher said at the N positions that a sample's picture takes (none, for a sample without one).

    `targets` are its next-token distributions there, `relation` is how they relate to each other. `attention_LN` says
    how much the sample's text attends to each position in each of the teacher's layers, a mean over heads and text
    positions. What no stage asked for is None.
    """

    targets: SparseTargets | None = None
    relation: Relation | None = None
    attention_LN: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class TeacherSignal:
    """What the teacher said about one sample's answers, with the proof that a student can check.

    `response_ids_n` are the tokens of all answers in order, each answer with its end-of-turn token;
    `answer_lengths` cuts them. Position i of the targets is the distribution that *predicts* `response_ids_n[i]`.
    `answered_by_teacher` says per answer whether the teacher wrote it (True) or it was given (False).
    """

    id: str
    content_hash: str
    response_ids_n: npt.NDArray[np.int32]
    answer_lengths: tuple[int, ...]
    answered_by_teacher: tuple[bool, ...]
    label_logprobs_n: npt.NDArray[np.float32]
    targets: SparseTargets
    visual_tokens: int
    response_hash: bytes = field(default=b"")
    visual: VisualSignal | None = None
    """Stored beside the row, in files of its own."""

    def to_row(self) -> dict[str, Any]:
        targets = self.targets
        return {
            "id": self.id,
            "content_hash": self.content_hash,
            "response_ids": self.response_ids_n.astype(np.int32),
            "answer_lengths": np.asarray(self.answer_lengths, dtype=np.int32),
            "answered_by_teacher": list(self.answered_by_teacher),
            "label_logprobs": self.label_logprobs_n.astype(np.float32),
            "head_ids": targets.head_ids_nK.reshape(-1),
            "head_logprobs": targets.head_logprobs_nK.astype(np.float16).reshape(-1),
            "tail_mass": targets.tail_mass_n.astype(np.float16),
            "tail_ids": targets.tail_ids_nS.reshape(-1),
            "tail_logprobs": targets.tail_logprobs_nS.astype(np.float16).reshape(-1),
            "visual_tokens": self.visual_tokens,
            "response_hash": self.response_hash or hash_response(self.response_ids_n),
        }

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> "TeacherSignal":
        response_ids_n = np.asarray(row["response_ids"], dtype=np.int32)
        n = len(response_ids_n)

        def table(name: str, dtype: Any) -> Any:
            values = np.asarray(row[name], dtype=dtype)
            return values.reshape(n, len(values) // n if n else 0)

        targets = SparseTargets(
            head_ids_nK=table("head_ids", np.int32),
            head_logprobs_nK=table("head_logprobs", np.float32),
            tail_mass_n=np.asarray(row["tail_mass"], dtype=np.float32),
            tail_ids_nS=table("tail_ids", np.int32),
            tail_logprobs_nS=table("tail_logprobs", np.float32),
        )
        return TeacherSignal(
            id=str(row["id"]),
            content_hash=str(row["content_hash"]),
            response_ids_n=response_ids_n,
            answer_lengths=tuple(int(length) for length in row["answer_lengths"]),
            answered_by_teacher=tuple(bool(flag) for flag in row["answered_by_teacher"]),
            label_logprobs_n=np.asarray(row["label_logprobs"], dtype=np.float32),
            targets=targets,
            visual_tokens=int(row["visual_tokens"]),
            response_hash=bytes(row["response_hash"]),
        )


def hash_response(response_ids_n: npt.NDArray[np.int32]) -> bytes:
    """16 bytes that two tokenizations of one response share only when they are the same tokens."""
    return hashlib.blake2b(np.ascontiguousarray(response_ids_n, dtype="<i4").tobytes(), digest_size=16).digest()


SIGNAL_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32())),
        pa.field("answer_lengths", pa.list_(pa.int32())),
        pa.field("answered_by_teacher", pa.list_(pa.bool_())),
        pa.field("label_logprobs", pa.list_(pa.float32())),
        pa.field("head_ids", pa.list_(pa.int32())),
        pa.field("head_logprobs", pa.list_(pa.float16())),
        pa.field("tail_mass", pa.list_(pa.float16())),
        pa.field("tail_ids", pa.list_(pa.int32())),
        pa.field("tail_logprobs", pa.list_(pa.float16())),
        pa.field("visual_tokens", pa.int32()),
        pa.field("response_hash", pa.binary(16)),
    ],
    metadata={"sparsight.signals": str(SIGNALS_VERSION)},
)


@dataclass(frozen=True)
class Candidate:
    """One answer that was considered: who wrote it, with which seed (0 where none was drawn), and the judge's score."""

    text: str
    origin: Literal["student", "teacher", "ground_truth", "imported"]
    seed: int
    score: float


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one question about one picture, the better and the worse, and why they are held to be so.

    The picture is the one of this content hash among the student's samples. `margin` is the difference of the two
    scores that `judge` gave. The log-probs are the teacher's, summed over each answer's tokens with its end-of-turn
    token; `answers_hash` proves which tokens these were (`hash_answers`), and `visual_tokens` what the picture took.
    """

    id: str
    source: str
    content_hash: str
    question: str
    chosen: str
    rejected: str
    answer_type: str
    candidates: tuple[Candidate, ...]
    judge: str
    margin: float
    teacher_chosen_logprob: float
    teacher_rejected_logprob: float
    visual_tokens: int
    answers_hash: bytes

    def to_row(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> "PreferencePair":
        values: dict[str, Any] = dict(row)
        values["candidates"] = tuple(Candidate(**candidate) for candidate in row["candidates"])
        return PreferencePair(**values)


def hash_answers(answer_ids: Sequence[npt.NDArray[np.int32]]) -> bytes:
    """16 bytes that equal lists of answers share only when each is cut into the same tokens."""
    digest = hashlib.blake2b(digest_size=16)
    for ids_n in answer_ids:
        digest.update(hash_response(ids_n))
    return digest.digest()


_CANDIDATE = pa.struct([("text", pa.string()), ("origin", pa.string()), ("seed", pa.int64()), ("score", pa.float64())])

PAIR_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("chosen", pa.string(), nullable=False),
        pa.field("rejected", pa.string(), nullable=False),
        pa.field("answer_type", pa.string(), nullable=False),
        pa.field(
            "candidates",
            pa.list_(
                pa.struct(
                    [("text", pa.string()), ("origin", pa.string()), ("seed", pa.int64()), ("score", pa.float64())]
                )
            ),
        ),
        pa.field("judge", pa.string(), nullable=False),
        pa.field("margin", pa.float64(), nullable=False),
        pa.field("teacher_chosen_logprob", pa.float64(), nullable=False),
        pa.field("teacher_rejected_logprob", pa.float64(), nullable=False),
        pa.field("visual_tokens", pa.int32(), nullable=False),
        pa.field("answers_hash", pa.binary(16), nullable=False),
    ],
    metadata={"sparsight.pairs": str(PAIRS_VERSION)},
)


@dataclass(frozen=True)
class Quarantined:
    """A row that could not be used: which, where it came from, and why. Counted, never silently replaced."""

    id: str
    source: str
    reason: str


QUARANTINE_SCHEMA = pa.schema([("id", pa.string()), ("source", pa.string()), ("reason", pa.string())])
