"""Which models are compared: a teacher from a directory counts as another one when any of its files changes."""

from pathlib import Path

import pytest

from pipelines.models import evaluated_models
from sparsight.artifacts import RunDirectory
from sparsight.config import RunConfig
from sparsight.errors import ArtifactError, ConfigError

STAGE = {"name": "mimic", "terms": {"forward_kl": 1.0}, "steps": 10}


def config(folder: Path, *students: str) -> RunConfig:
    """A run with finished students and a teacher of the students' architecture in `folder/teacher`."""
    (folder / "teacher").mkdir()
    (folder / "teacher/config.json").write_text('{"model_type": "llava_onevision"}')
    (folder / "teacher/model.safetensors").write_bytes(b"weights")
    run = RunDirectory(str(folder / "run"))
    for name in students:
        run.artifact(f"students/{name}/mimic", "model", 1, {}).commit()
    return RunConfig.model_validate(
        {
            "run_dir": str(folder / "run"),
            "data": {"sources": [{"kind": "scenes"}]},
            "teacher": {"kind": "hugging_face", "path": str(folder / "teacher")},
            "distill": {"students": [{"name": name, "stages": [STAGE]} for name in students]},
        }
    )


def test_roles_come_in_order(tmp_path: Path) -> None:
    models = evaluated_models(config(tmp_path, "sparse", "sft_student"))
    assert [(model.name, model.label) for model in models] == [
        ("teacher", str(tmp_path / "teacher")),
        ("student", "sparse"),
        ("sft_student", "sft_student"),
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "video_preprocessor_config.json"])
def test_a_teacher_with_another_file_is_another_teacher(tmp_path: Path, name: str) -> None:
    settings = config(tmp_path, "sparse")
    before = fingerprints(settings)
    assert fingerprints(settings) == before
    (tmp_path / "teacher" / name).write_bytes(b"changed")
    after = fingerprints(settings)
    assert after.pop("teacher") != before.pop("teacher")
    assert after == before


def fingerprints(settings: RunConfig) -> dict[str, str]:
    return {model.name: model.fingerprint for model in evaluated_models(settings)}


def test_a_teacher_that_cannot_be_asked_as_a_student_is_left_out(tmp_path: Path) -> None:
    settings = config(tmp_path, "sparse")
    (tmp_path / "teacher/config.json").write_text('{"model_type": "qwen3_vl"}')
    assert [model.name for model in evaluated_models(settings)] == ["student"]


def test_what_is_missing_or_misnamed_is_refused(tmp_path: Path) -> None:
    settings = config(tmp_path, "sparse", "teacher")
    with pytest.raises(ConfigError, match=r"distill\.students\.1: the name 'teacher' is a role"):
        evaluated_models(settings)
    (tmp_path / "teacher/config.json").unlink()
    with pytest.raises(ArtifactError, match=r"correct teacher\.path"):
        evaluated_models(settings)
