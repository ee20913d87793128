"""Which stages wait for the model of the one before, and so for other workers."""

from typing import Any

import pytest

from pipelines.training import waits_for
from sparsight.config import StageConfig


def stage(**settings: Any) -> StageConfig:
    values = {"name": "stage", "steps": 1, "terms": {"cross_entropy": 1.0}}
    return StageConfig.model_validate({**values, **settings})


PAIRS = {"rows": "pairs", "terms": {"preference": 1.0}, "preference": {"loss": "kto_pair"}}
TOWER = {"trainable": ["tower", "projector", "text"]}


@pytest.mark.parametrize(
    ("before", "after", "waits"),
    [
        (stage(), stage(), False),
        (stage(), stage(**PAIRS), True),
        (stage(**PAIRS), stage(), False),
        (stage(**TOWER), stage(), True),
        (stage(), stage(**TOWER), False),
    ],
)
def test_a_stage_waits_for_pairs_and_for_features_of_a_new_tower(
    before: StageConfig, after: StageConfig, waits: bool
) -> None:
    assert waits_for(after, before) is waits
