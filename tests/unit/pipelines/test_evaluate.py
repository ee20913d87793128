"""Which sets of questions models are asked: those that the configuration has, finished, the headline set first."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluate import evaluation_sets
from pipelines.prepare import prepare
from sparsight import layout
from sparsight.artifacts import RunDirectory, digest
from sparsight.config import EvaluateConfig, RunConfig
from sparsight.data.samples import iter_samples
from sparsight.errors import ArtifactError, ConfigError

STAGE = {"name": "only", "terms": {"cross_entropy": 1.0}, "steps": 1}
EASY_VQA = {"kind": "easy_vqa", "limit": 6}
SCENES = {"kind": "scenes", "pictures": 8, "test_pictures": 4}


def config(run_dir: Path, *sources: dict[str, Any], **data: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "data": {"sources": list(sources), **data},
            "teacher": {"kind": "tiny", "stages": [STAGE]},
            "distill": {"students": [{"name": "student", "stages": [STAGE]}]},
        }
    )


def on_validation(settings: RunConfig) -> RunConfig:
    return settings.model_copy(update={"evaluate": EvaluateConfig(sets="validation")})


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose preparation is finished."""
    folder = tmp_path_factory.mktemp("run")
    prepare(config(folder, SCENES, EASY_VQA))
    return folder


def test_the_headline_set_is_first(run_dir: Path) -> None:
    sets = evaluation_sets(config(run_dir, SCENES, EASY_VQA))
    assert list(sets.questions) == ["easy_vqa", "scenes"]
    assert list(sets.hallucination) == ["pope"]


@pytest.mark.parametrize(
    ("sources", "data", "names"),
    [
        ([SCENES, EASY_VQA], {"hallucination": {"pictures": 0}}, ["easy_vqa", "scenes"]),
        ([SCENES], {}, ["scenes", "pope"]),
        ([EASY_VQA], {}, ["easy_vqa"]),
        ([EASY_VQA, {**SCENES, "test_pictures": 0}], {}, ["easy_vqa"]),
    ],
)
def test_sets_of_an_earlier_configuration_are_not_asked(
    run_dir: Path, sources: list[dict[str, Any]], data: dict[str, Any], names: list[str]
) -> None:
    assert list(evaluation_sets(config(run_dir, *sources, **data)).all) == names


def test_a_set_that_is_not_finished_is_refused(run_dir: Path, tmp_path: Path) -> None:
    llava = {"kind": "llava", "path": "rows.json", "pictures": "pictures", "test_fraction": 0.5}
    with pytest.raises(ArtifactError, match=r"samples/test_llava' holds no finished artefact"):
        evaluation_sets(config(run_dir, SCENES, llava))
    with pytest.raises(ConfigError, match="give data a source with test pictures"):
        evaluation_sets(config(tmp_path, {**SCENES, "test_pictures": 0}))


def test_validation_pictures_are_asked_by_source(tmp_path: Path) -> None:
    settings = on_validation(config(tmp_path, SCENES, EASY_VQA, validation_fraction=0.5))
    prepare(settings)
    sets = evaluation_sets(settings)
    assert list(sets.all) == list(sets.questions) == ["validation_easy_vqa", "validation_scenes"]
    together = list(iter_samples(RunDirectory(str(tmp_path)).storage.child(layout.VALIDATION_SAMPLES)))
    for name, asked in sets.all.items():
        own = [sample for sample in together if f"validation_{sample.source}" == name]
        assert list(asked.samples()) == own
        assert asked.questions == sum(len(sample.turns) for sample in own) > 0


def test_validation_that_is_not_there_is_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs a data\.validation_fraction above 0"):
        evaluation_sets(on_validation(config(run_dir, SCENES)))
    with pytest.raises(ArtifactError, match="samples/validation' holds no finished artefact"):
        evaluation_sets(on_validation(config(run_dir, SCENES, validation_fraction=0.5)))


def test_the_choice_of_sets_counts_only_where_it_is_made() -> None:
    assert "sets" not in EvaluateConfig().model_dump(mode="json")
    assert digest(EvaluateConfig()) != digest(EvaluateConfig(sets="validation"))
