"""Comparisons over seeds: intervals by hand, outcomes in the right direction, people's words kept."""

import math
from pathlib import Path

import pytest

from sparsight.errors import DataError
from sparsight.evaluate.reproduction import Compared, Comparison, compare, interval, metrics_of, over_seeds
from sparsight.evaluate.reproduction_page import READING_ENDS, READING_STARTS, Reproduction, reading_of, render
from sparsight.evaluate.results import Evaluation, ModelResult, SetResult
from sparsight.evaluate.scores import Share

BETTER = Comparison("gain", "one than other", "one", "other", "accuracy", "better")
LESS = Comparison("less", "one than other", "one", "other", "chair_response", "better")


def seeds(*gaps: float, metric: str = "accuracy") -> list[dict[str, dict[str, float]]]:
    return [{"one": {metric: 0.5 + gap}, "other": {metric: 0.5}} for gap in gaps]


def test_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - found.mean == pytest.approx(4.303 / math.sqrt(3.0), rel=1e-4)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_one_seed_decides_nothing() -> None:
    (found,) = compare([BETTER], seeds(0.4))
    assert math.isinf(found.difference.high)
    assert found.outcome == "not decided"


@pytest.mark.parametrize(
    ("comparison", "gaps", "outcome"),
    [
        (BETTER, (0.10, 0.11, 0.12), "better"),
        (BETTER, (-0.10, -0.11, -0.12), "worse"),
        (BETTER, (0.10, -0.11, 0.02), "not decided"),
        (LESS, (-0.10, -0.11, -0.12), "better"),
        (LESS, (0.10, 0.11, 0.12), "worse"),
    ],
)
def test_outcome_knows_which_way_is_better(comparison: Comparison, gaps: tuple[float, ...], outcome: str) -> None:
    (found,) = compare([comparison], seeds(*gaps, metric=comparison.metric))
    assert found.outcome == outcome


def test_what_a_seed_lacks_is_left_out() -> None:
    runs = [*seeds(0.1), {"one": {"accuracy": 0.5}}]
    assert compare([BETTER], runs) == []
    assert over_seeds(runs, "other", "accuracy") is None


def test_words_of_people_survive_the_next_page(tmp_path: Path) -> None:
    compared = [Compared(BETTER, interval([0.1, 0.11, 0.12]))]
    found = Reproduction(
        title="A paper",
        introduction="What was done.",
        seeds=seeds(0.1, 0.11, 0.12),
        compared=compared,
        columns=[("accuracy", "accuracy", ".3f"), ("absent", "absent", ".3f")],
        figures={},
        machine="a machine",
        revision="abc",
        pictures=[],
    )
    target = tmp_path / "page.md"
    page = render(found, "It holds, because.\n\nSecond paragraph.")
    target.write_text(page)
    target.write_text(render(found, reading_of(target)))
    assert reading_of(target) == "It holds, because.\n\nSecond paragraph."
    assert page.count(READING_STARTS) == page.count(READING_ENDS) == 1
    assert "| `one` | 0.610 ± 0.025 | - |" in page
    assert "+0.1100 [+0.0852, +0.1348] | **better**" in page


def test_a_page_whose_marks_are_damaged_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert reading_of(page) == ""
    page.write_text(f"# A paper\n{READING_STARTS}\nIt holds.\n")
    with pytest.raises(DataError, match=r"page\.md"):
        reading_of(page)


def test_accuracy_is_over_the_closed_questions_of_all_sets() -> None:
    def answered(*kinds: tuple[str, int, int]) -> SetResult:
        shares = {kind: Share(right=right, count=count, low=0.0, high=1.0) for kind, right, count in kinds}
        return SetResult(accuracy=Share(right=0, count=1, low=0.0, high=1.0), by_type=shares)

    model = ModelResult(
        name="mimic",
        directory="d",
        activated_parameters=10,
        total_parameters=20,
        sets={"one": answered(("yes_no", 3, 4), ("caption", 0, 50)), "two": answered(("count", 1, 6))},
    )
    evaluation = Evaluation(headline_set="one", models={"student": model}, baselines={})
    assert metrics_of(evaluation)["mimic"] == {
        "accuracy": pytest.approx(0.4),
        "activated_parameters": 10,
        "total_parameters": 20,
    }
