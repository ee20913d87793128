"""The role of a teacher: samples in, signals out, and a name by which its signals can be told from another's.

Implemented by `VisionLanguageTeacher` and `HfTeacher`; called by the labelling worker. Where samples come from and
signals go is not its business.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from sparsight.artifacts import digest
from sparsight.config import LabelConfig
from sparsight.data.visual_signals import VISUAL_VERSION
from sparsight.errors import CheckpointError
from sparsight.records import Quarantined, Sample, TeacherSignal
from sparsight.sources import MAX_PICTURE_BYTES, MAX_PICTURE_PIXELS
from sparsight.stages import VisualAsk

_MODEL_FILES = frozenset({".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py"})
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class SignalSettings:
    """What a signal holds, and the limits under which a teacher makes it."""

    label: LabelConfig = field(default_factory=LabelConfig)
    seed: int = 0
    """Start of every sample's own random stream for the tail draws."""
    max_picture_bytes: int = MAX_PICTURE_BYTES
    max_picture_pixels: int = MAX_PICTURE_PIXELS
    visual: VisualAsk = field(default_factory=VisualAsk)
    """What is wanted about pictures."""

    @property
    def kept(self) -> tuple[int, int]:
        """Exact and drawn tokens a position."""
        return self.label.head, self.label.tail_samples

    @property
    def content(self) -> dict[str, int]:
        """The settings that change what a row says; batch and file sizes do not."""
        asked = {f"visual_{name}": VISUAL_VERSION for name, wanted in self.visual._asdict().items() if wanted}
        return asked | {
            "head": self.label.head,
            "tail_samples": self.label.tail_samples,
            "max_answer_tokens": self.label.max_answer_tokens,
            "seed": self.seed,
            "max_picture_bytes": self.max_picture_bytes,
            "max_picture_pixels": self.max_picture_pixels,
        }


@dataclass(frozen=True)
class TeacherIdentity:
    """Which teacher: digests of its directory, its prompt and its tokenizer, the width of its head, and how its weights
    are opened."""

    model: str
    prompt: str
    tokenizer: str
    vocabulary: int
    opened_as: str = ""
    """Settings that change what the same weights compute; empty where checkpoint and transformers choose."""

    @property
    def fingerprint(self) -> str:
        """Equal only for teachers that label in the same way."""
        values = asdict(self)
        if not self.opened_as:
            del values["opened_as"]
        return digest(values)


class Teacher(Protocol):
    """Labels samples."""

    @property
    def identity(self) -> TeacherIdentity: ...

    def label(self, samples: Sequence[Sample]) -> list[TeacherSignal | Quarantined]:
        """One result a sample, in order: its signal, or why it has none.

        Answers that are None are written greedily first, each conditioned on the ones before. A row depends on its
        sample, the teacher and the settings only, not on its neighbours (up to rounding of the forward pass).
        """
        ...


def directory_digest(directory: Path) -> str:
    """A hash over the names and contents of all files that make up a model directory.

    Raises `CheckpointError` if it holds no model.
    """
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"'{directory}' holds no model (config.json is missing): make or download the teacher")
    total = hashlib.blake2b(digest_size=8)
    for path in sorted(directory.iterdir()):
        if path.suffix in _MODEL_FILES and path.is_file():
            total.update(f"{path.name}\n{path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while piece := file.read(_READ_BYTES):
                    total.update(piece)
    return total.hexdigest()
