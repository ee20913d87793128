"""Where a student's training starts: a dense student from a directory, language weights or nothing, with the
teacher's tower.

Later stages start from the stage before. Called by the distillation pipeline.
"""

from pathlib import Path

from transformers import AutoTokenizer

from sparsight.config import StudentConfig
from sparsight.errors import CheckpointError, ConfigError
from sparsight.model.text_base import make_model
from sparsight.model.vision_language import VisionLanguageModel


def first_student(settings: StudentConfig, teacher_directory: Path, seed: int) -> VisionLanguageModel:
    """The dense student before its first stage; equal arguments give equal weights.

    Raises `ConfigError` where the teacher's tower is asked for but has other sizes, `CheckpointError` where a
    directory cannot be read.
    """
    if settings.base is not None:
        student = VisionLanguageModel.load(settings.base)
    else:
        student = make_model(settings.architecture, lambda: _tokenizer(teacher_directory), seed)
    if settings.tower_from_teacher:
        _copy_tower(VisionLanguageModel.load(teacher_directory), student)
    return student


def _tokenizer(directory: Path) -> object:
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the teacher's tokenizer in '{directory}': {error}") from error


def _copy_tower(teacher: VisionLanguageModel, student: VisionLanguageModel) -> None:
    theirs = teacher.model.model.vision_tower.state_dict()
    ours = student.model.model.vision_tower.state_dict()
    if theirs.keys() != ours.keys() or any(theirs[name].shape != ours[name].shape for name in ours):
        raise ConfigError(
            "the student's tower has other sizes than the teacher's: give student.architecture the teacher's tower_* "
            "and picture sizes, or set student.tower_from_teacher: false"
        )
    student.model.model.vision_tower.load_state_dict(theirs)
    student.pixels = teacher.pixels
