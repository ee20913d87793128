"""Which stages share a worker group."""

from typing import Any

import pytest

from pipelines.training import courses
from sparsight.config import StageConfig


def stage(name: str, **settings: Any) -> StageConfig:
    return StageConfig.model_validate({"name": name, "steps": 1, "terms": {"cross_entropy": 1.0}, **settings})


PAIRS = {"rows": "pairs", "terms": {"preference": 1.0}, "preference": {"loss": "kto_pair"}}
TOWER = {"trainable": ["tower", "projector", "text"]}


@pytest.mark.parametrize(
    ("stages", "names"),
    [
        ([stage("dense"), stage("sparse")], [["dense", "sparse"]]),
        ([stage("sparse"), stage("preference", **PAIRS), stage("last")], [["sparse"], ["preference", "last"]]),
        ([stage("all", **TOWER), stage("text")], [["all"], ["text"]]),
        ([stage("text"), stage("all", **TOWER)], [["text", "all"]]),
    ],
)
def test_stages_share_workers_until_something_must_be_made_first(
    stages: list[StageConfig], names: list[list[str]]
) -> None:
    assert [[stage.name for stage in course] for course in courses(stages)] == names
