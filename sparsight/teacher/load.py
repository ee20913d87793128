"""Which teacher a run uses, and opening it: identity from its files alone, the model only where it works.

The driver asks `identify` (tokenizer and config are read, no weights loaded); a labelling worker calls `load_teacher`,
a pair worker `load_answer_model`, for students too. All know the two kinds of model; nothing else does.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoTokenizer

from sparsight.config import HuggingFaceTeacherConfig
from sparsight.errors import CheckpointError
from sparsight.media.chat import ChatEncoder
from sparsight.model.vision_language import VIDEO_TOKEN, VisionLanguageModel
from sparsight.stages import VisualAsk
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
    clips: bool = False
    """Whether a `hugging_face` teacher reads pictures as clips of one frame, as students do, not as images."""

    @staticmethod
    def hugging_face(config: HuggingFaceTeacherConfig) -> "TeacherSource":
        return TeacherSource("hugging_face", config.path, config.dtype, config.attention)

    def asked_about(self, visual: VisualAsk) -> "TeacherSource":
        """The same teacher, opened so that it can say what is asked of pictures.

        Its positions must be those of students, which read clips; attention tells its weights in one kind only. Raises
        `CheckpointError` for a model that cannot read clips.
        """
        if not any(visual):
            return self
        if self.kind == "hugging_face":
            kind = str(_config(self.directory()).model_type)
            if kind != "llava_onevision":
                raise CheckpointError(
                    f"terms about pictures need a teacher that reads them as students do, a llava_onevision model, and "
                    f"'{self.uri}' is a {kind}: use another teacher, or leave visual_kl, relation and attention out"
                )
        attention = "eager" if visual.attention else self.attention
        return replace(self, clips=self.kind == "hugging_face", attention=attention)

    @property
    def reads_clips(self) -> bool:
        return self.kind == "tiny" or self.clips

    @property
    def opened_as(self) -> str:
        """Type of the weights and kind of attention, where they are not left to the checkpoint and to transformers."""
        if self.kind == "tiny":
            return ""
        chosen = {"dtype": None if self.dtype == "auto" else self.dtype, "attention": self.attention}
        chosen["pictures"] = "clips" if self.clips else None
        return ", ".join(f"{name} {value}" for name, value in chosen.items() if value is not None)

    def directory(self) -> Path:
        """The model files as a local folder. Raises `StorageError` if there are none."""
        return open_storage(self.uri).fetch()


def identify(source: TeacherSource) -> TeacherIdentity:
    """Which teacher it is, without loading its weights. Raises `CheckpointError` if it is incomplete."""
    directory = source.directory()
    model = directory_digest(directory)
    config = _config(directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the teacher's tokenizer in '{directory}': {error}") from error
    mark = VIDEO_TOKEN if source.reads_clips else visual_token_of(config, tokenizer)
    chat = ChatEncoder(tokenizer, mark)
    vocabulary = int(config.get_text_config().vocab_size)
    return TeacherIdentity(model, chat.prompt_fingerprint, chat.tokenizer_fingerprint, vocabulary, source.opened_as)


def text_sizes(source: TeacherSource) -> tuple[int, int]:
    """Width and layers of the teacher's text model. Raises `CheckpointError` where its config cannot be read."""
    text: Any = _config(source.directory()).get_text_config()
    return int(text.hidden_size), int(text.num_hidden_layers)


def _config(directory: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the teacher's config in '{directory}': {error}") from error


def load_teacher(
    source: TeacherSource, identity: TeacherIdentity, settings: SignalSettings, device: str = "cpu"
) -> Teacher:
    """Load the teacher's weights. Raises `CheckpointError` if they do not fit."""
    directory = source.directory()
    if source.reads_clips:
        attention = source.attention or "sdpa"
        return VisionLanguageTeacher.load(directory, identity, settings, _dtype(source, directory), attention, device)
    assert not any(settings.visual), "ask `asked_about` first"
    return HfTeacher.load(directory, identity, settings, source.dtype, source.attention, device)


def _dtype(source: TeacherSource, directory: Path) -> torch.dtype:
    """`auto` is the checkpoint's own type, and float32 where it names none."""
    if source.dtype != "auto":
        return getattr(torch, source.dtype)
    own: Any = _config(directory).dtype
    return own if isinstance(own, torch.dtype) else torch.float32


def load_answer_model(source: TeacherSource, device: str = "cpu") -> AnswerModel:
    """Load a model to ask it. Raises `CheckpointError` if its weights do not fit."""
    directory = source.directory()
    if source.reads_clips:
        attention = source.attention or "sdpa"
        model = VisionLanguageModel.load(directory, _dtype(source, directory), attention, device=device)
        return OneVisionModel(model)
    return ImageTextModel.load(directory, source.dtype, source.attention, device)
