"""A reproduction in words: Markdown with one table of models and one of comparisons, and its figures as data.

What the numbers mean is written by people, between two marks in the page, and survives when the page is written
again. Called by `pipelines.reproduce`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sparsight.errors import DataError
from sparsight.evaluate.reproduction import Compared, Interval, Metrics, over_seeds

READING_STARTS, READING_ENDS = "<!-- reading -->", "<!-- /reading -->"


class Reproduction(NamedTuple):
    """All that a page says. `columns` are (metric, heading, format) of the table of models."""

    title: str
    introduction: str
    seeds: Sequence[Metrics]
    compared: Sequence[Compared]
    columns: Sequence[tuple[str, str, str]]
    figures: Mapping[str, float]
    machine: str
    revision: str
    pictures: Sequence[tuple[str, str]]
    """File name and caption of each plot."""


def to_json(found: Reproduction) -> str:
    """`figures`, `machine` and `revision`, and every seed's values."""
    values = {
        "figures": dict(found.figures),
        "machine": found.machine,
        "revision": found.revision,
        "seeds": [{model: dict(metrics) for model, metrics in seed.items()} for seed in found.seeds],
    }
    return json.dumps(values, indent=2) + "\n"


def reading_of(page: Path) -> str:
    """What people wrote into an earlier page, empty if there is none. Raises `DataError` where a mark is missing."""
    if not page.exists():
        return ""
    _, start, rest = page.read_text().partition(READING_STARTS)
    text, end, _ = rest.partition(READING_ENDS)
    if not (start and end):
        raise DataError(f"'{page}' lacks '{READING_STARTS}' or '{READING_ENDS}': restore them around what people wrote")
    return text.strip("\n")


def render(found: Reproduction, reading: str = "") -> str:
    """The page as Markdown."""
    pictures = [f"![{caption}]({name})" for name, caption in found.pictures]
    sections = [
        f"# {found.title}",
        found.introduction.strip(),
        f"{READING_STARTS}\n{reading}\n{READING_ENDS}",
        "## Comparisons",
        f"Differences are paired by seed; intervals are 95 %, Student's t over {len(found.seeds)} seeds.",
        _comparisons(found.compared),
        *pictures[:1],
        "## Models",
        f"Means over {len(found.seeds)} seeds, ± the half width of the 95 % interval.",
        _models(found),
        *pictures[1:],
        f"## Where\n\n- machine: {found.machine}\n- code: {found.revision}\n- figures as data: `.json` beside it",
    ]
    return "\n\n".join(sections) + "\n"


def _comparisons(compared: Sequence[Compared]) -> str:
    rows = [
        [
            it.title,
            it.metric.replace("_", " "),
            f"{gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]",
            f"**{entry.outcome}**",
            it.published,
        ]
        for entry in compared
        for it, gap in [(entry.comparison, entry.difference)]
    ]
    return _table(["compared", "metric", "difference [95 %]", "here", "published"], rows)


def _models(found: Reproduction) -> str:
    names = list(dict.fromkeys(name for seed in found.seeds for name in seed))
    rows = [
        [f"`{name}`", *(_cell(over_seeds(found.seeds, name, key), form) for key, _, form in found.columns)]
        for name in names
        if any(over_seeds(found.seeds, name, key) is not None for key, _, _ in found.columns)
    ]
    return _table(["", *(heading for _, heading, _ in found.columns)], rows)


def _cell(value: Interval | None, form: str) -> str:
    if value is None:
        return "-"
    if value.high == value.low or value.high == float("inf"):
        return format(value.mean, form)
    return f"{value.mean:{form}} ± {value.high - value.mean:{form}}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])
