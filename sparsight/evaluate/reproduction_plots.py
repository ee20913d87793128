"""A reproduction's pictures: differences with intervals, models in a plane or side by side. PNG bytes out."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from matplotlib.figure import Figure

from sparsight.evaluate.plots import COLOURS, DPI, NEUTRAL, WIDTH_IN
from sparsight.evaluate.reproduction import LOWER_IS_BETTER, Compared, Metrics, Row, over_seeds

FORMS = "DsoX^"
"""Markers, one after the other when the colours are used up."""
OUTCOME_COLOURS = {"better": "#009E73", "worse": "#D55E00", "not decided": NEUTRAL}


def differences(compared: Sequence[Compared]) -> bytes:
    """One line a comparison: its mean and 95 % interval, and every seed as a dot."""
    figure = Figure(figsize=(WIDTH_IN, 1.0 + 0.42 * len(compared)), dpi=DPI, layout="constrained")
    axes: Any = figure.subplots()
    for place, entry in enumerate(reversed(compared)):
        gap, colour = entry.difference, OUTCOME_COLOURS[entry.outcome]
        if len(gap.values) > 1:
            axes.plot([gap.low, gap.high], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot(gap.values, [place] * len(gap.values), "o", color="white", markeredgecolor="black", markersize=4)
        axes.plot([gap.mean], [place], "D", color=colour, markersize=6)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(compared)), [_label(entry) for entry in reversed(compared)], fontsize=8)
    axes.set_xlabel(
        "difference (share of questions, answers or objects)\ndots are seeds, bars 95 % intervals", fontsize=8
    )
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.25)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return _png(figure)


def _label(entry: Compared) -> str:
    it = entry.comparison
    better = "less is better" if it.metric in LOWER_IS_BETTER else "more is better"
    return f"{it.title}\n{it.metric.replace('_', ' ')}, {better}"


def plane(
    seeds: Sequence[Metrics], models: Sequence[str], metrics: tuple[str, str], headings: tuple[str, str]
) -> bytes:
    """Every model in the plane of two metrics: seeds as dots, their mean with the name; colour and form tell who."""
    across, up = metrics
    figure = Figure(figsize=(WIDTH_IN, max(4.2, 0.7 + 0.21 * len(models))), dpi=DPI, layout="constrained")
    axes: Any = figure.subplots()
    for index, model in enumerate(models):
        points = [(seed[model][across], seed[model][up]) for seed in seeds]
        colour = COLOURS[index % len(COLOURS)]
        axes.plot([x for x, _ in points], [y for _, y in points], "o", color=colour, markersize=4, alpha=0.5)
        middle = sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
        form = FORMS[index // len(COLOURS) % len(FORMS)]
        axes.plot(*middle, form, color=colour, markersize=8, markeredgecolor="white", linestyle="", label=model)
    axes.set_xlabel(headings[0])
    axes.set_ylabel(headings[1])
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return _png(figure)


def side_by_side(seeds: Sequence[Metrics], row: Row) -> bytes:
    """Under each heading the models next to each other: mean, 95 % interval over the seeds, every seed as a dot."""
    figure = Figure(figsize=(WIDTH_IN, 3.8), dpi=DPI, layout="constrained")
    axes: Any = figure.subplots()
    width = 0.8 / len(row.models)
    for index, model in enumerate(row.models):
        colour, label = COLOURS[index % len(COLOURS)], model
        for place, metric in enumerate(row.metrics):
            value = over_seeds(seeds, model, metric)
            if value is None:
                continue
            x = place + (index - (len(row.models) - 1) / 2) * width
            axes.plot([x] * len(value.values), value.values, "o", color=colour, markersize=3, alpha=0.5)
            if len(value.values) > 1:
                axes.plot([x, x], [value.low, value.high], color=colour, linewidth=1.5)
            axes.plot([x], [value.mean], "D", color=colour, markersize=5, label=label)
            label = None
    axes.set_xticks(range(len(row.metrics)), list(row.metrics.values()), fontsize=8)
    axes.set_ylabel(row.unit, fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(
        fontsize=8, frameon=False, ncols=min(3, len(row.models)), loc="upper center", bbox_to_anchor=(0.5, -0.1)
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
