"""Which models a finished run holds, the teacher and the last stage of every student, and how one is loaded."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsight import layout
from sparsight.artifacts import RunDirectory
from sparsight.config import HuggingFaceTeacherConfig, RunConfig
from sparsight.errors import ArtifactError, ConfigError
from sparsight.evaluate.results import STUDENT, TEACHER
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.observe import say
from sparsight.storage import Storage, open_storage
from sparsight.teacher.protocol import directory_digest


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies. `name` is its role in figures, `label` what the configuration calls it."""

    name: str
    label: str
    storage: Storage
    key: str
    fingerprint: str

    @property
    def uri(self) -> str:
        return f"{self.storage.uri}/{self.key}" if self.key else self.storage.uri

    def fetch(self) -> Path:
        """The model directory on this machine."""
        return self.storage.fetch(self.key)

    def load(self) -> VisionLanguageModel:
        """The model on this process's device."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        return VisionLanguageModel.load(self.fetch(), dtype=dtype, device=device)


def evaluated_models(config: RunConfig) -> list[ModelSource]:
    """The teacher, where it is of the students' architecture, and the students, the first one as `student`.

    Raises `ArtifactError` where one is not finished, `ConfigError` where a student has the name of a role.
    """
    run = RunDirectory(config.run_dir)
    teacher = _teacher(config, run)
    models = [teacher] if teacher is not None else []
    for index, student in enumerate(config.distill.students):
        name = STUDENT if index == 0 else student.name
        if index and name in (STUDENT, TEACHER):
            raise ConfigError(f"distill.students.{index}: the name '{name}' is a role in the report; choose another")
        storage, manifest = run.finished(layout.student_stage(student.name, student.stages[-1].name), "model")
        models.append(ModelSource(name, student.name, storage, layout.MODEL, manifest.fingerprint))
    return models


def exported_student(config: RunConfig) -> ModelSource:
    """The student that is exported and served: the configuration's first, after its last stage."""
    student = config.distill.students[0]
    storage, manifest = RunDirectory(config.run_dir).finished(
        layout.student_stage(student.name, student.stages[-1].name), "model"
    )
    return ModelSource(STUDENT, student.name, storage, layout.MODEL, manifest.fingerprint)


def _teacher(config: RunConfig, run: RunDirectory) -> ModelSource | None:
    if not isinstance(config.teacher, HuggingFaceTeacherConfig):
        storage, manifest = run.finished(layout.TEACHER, "model")
        return ModelSource(TEACHER, "teacher", storage, layout.MODEL, manifest.fingerprint)
    storage = open_storage(config.teacher.path)
    if not storage.exists("config.json"):
        raise ArtifactError(f"'{storage.uri}' holds no model (config.json is missing): correct teacher.path")
    if json.loads(storage.read_bytes("config.json")).get("model_type") != "llava_onevision":
        say(f"the teacher '{config.teacher.path}' is not a LLaVA-OneVision model: it labels, but is not evaluated")
        return None
    return ModelSource(TEACHER, config.teacher.path, storage, "", directory_digest(storage.fetch()))
