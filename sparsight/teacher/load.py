"""Which teacher a run uses, and opening it: identity from its files alone, the model only where it works.

The driver asks `identify` (tokenizer and config are read, no weights loaded); a labelling worker calls `load_teacher`,
a pair worker `load_answer_model`, for students too. All know the two kinds of model; nothing else does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoTokenizer

from sparsight.config import HuggingFaceTeacherConfig
from sparsight.errors import CheckpointError
from sparsight.media.chat import ChatEncoder
from sparsight.model.vision_language import VIDEO_TOKEN, VisionLanguageModel
from sparsight.storage import open_storage
from sparsight.teacher.answering import AnswerModel
from sparsight.teacher.hugging_face import HfTeacher, ImageTextModel, visual_token_of
from sparsight.teacher.protocol import SignalSettings, Teacher, TeacherIdentity, directory_digest
from sparsight.teacher.vision_language import OneVisionModel, VisionLanguageTeacher


@dataclass(frozen=True)
class TeacherSource:
    """Where a teacher's directory is and how to open it. Plain data: it travels to the workers."""

    kind: Literal["tiny", "hugging_face"]
    uri: str
    """A folder or s3:// prefix that holds the model files."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    attention: str | None = None

    @staticmethod
    def hugging_face(config: HuggingFaceTeacherConfig) -> "TeacherSource":
        return TeacherSource("hugging_face", config.path, config.dtype, config.attention)

    @property
    def opened_as(self) -> str:
        """Type of the weights and kind of attention, where they are not left to the checkpoint and to transformers."""
        if self.kind == "tiny":
            return ""
        chosen = {"dtype": None if self.dtype == "auto" else self.dtype, "attention": self.attention}
        return ", ".join(f"{name} {value}" for name, value in chosen.items() if value is not None)

    def directory(self) -> Path:
        """The model files as a local folder. Raises `StorageError` if there are none."""
        return open_storage(self.uri).fetch()


def identify(source: TeacherSource) -> TeacherIdentity:
    """Which teacher it is, without loading its weights. Raises `CheckpointError` if it is incomplete."""
    directory = source.directory()
    model = directory_digest(directory)
    try:
        config: Any = AutoConfig.from_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the teacher's config and tokenizer in '{directory}': {error}") from error
    mark = VIDEO_TOKEN if source.kind == "tiny" else visual_token_of(config, tokenizer)
    chat = ChatEncoder(tokenizer, mark)
    vocabulary = int(config.get_text_config().vocab_size)
    return TeacherIdentity(model, chat.prompt_fingerprint, chat.tokenizer_fingerprint, vocabulary, source.opened_as)


def load_teacher(
    source: TeacherSource, identity: TeacherIdentity, settings: SignalSettings, device: str = "cpu"
) -> Teacher:
    """Load the teacher's weights. Raises `CheckpointError` if they do not fit."""
    directory = source.directory()
    attention = "eager" if settings.visual.attention else source.attention  # others do not return their weights
    if source.kind == "tiny":
        dtype = torch.float32 if source.dtype == "auto" else getattr(torch, source.dtype)
        return VisionLanguageTeacher.load(directory, identity, settings, dtype, attention or "sdpa", device)
    return HfTeacher.load(directory, identity, settings, source.dtype, attention, device)


def load_answer_model(source: TeacherSource, device: str = "cpu") -> AnswerModel:
    """Load a model to ask it. Raises `CheckpointError` if its weights do not fit."""
    directory = source.directory()
    if source.kind == "tiny":
        dtype = torch.float32 if source.dtype == "auto" else getattr(torch, source.dtype)
        model = VisionLanguageModel.load(directory, dtype, source.attention or "sdpa", device=device)
        return OneVisionModel(model)
    return ImageTextModel.load(directory, source.dtype, source.attention, device)
