"""The report's pictures: accuracy bars with intervals, training curves, expert load and what led to it. PNG bytes out.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; sizes fit a page as wide as a README. Figures
are built without pyplot, so that no state outlives a call.
"""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from sparsight.evaluate.results import BaselineResult, Evaluation
from sparsight.model.routing import load_entropy

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
NEUTRAL = "#8c8c8c"
ON_COLOUR = ("white", "black", "white", "black", "black", "white", "black")
"""Text that can be read on each of the colours."""
CURVE_NAMES = {
    "cross_entropy": "cross-entropy",
    "forward_kl": "forward KL",
    "visual_kl": "forward KL at pictures",
    "relation": "relation (1 - cosine)",
    "attention": "attention (1 - cosine)",
}
WIDTH_IN, DPI = 8.4, 110
MOST_LABELLED = 8
"""Tables of more experts than this, and bars of more models, are drawn without numbers."""
LEGEND_COLUMNS = 5
HATCHES = (None, "////", "....")
"""Tell apart what has the same colour, where there are more models than colours."""

Curve = Sequence[tuple[float, float]]
"""(step, value) pairs."""


class LoadCurves(NamedTuple):
    """One sparse layer over training: every expert's share of the routing decisions, and the entropy of the shares."""

    steps: Sequence[float]
    load_nE: Sequence[Sequence[float]]
    entropy_n: Sequence[float]


def accuracy_bars(evaluation: Evaluation, test_set: str) -> bytes:
    """Accuracy of every model on a test set, overall and by answer type, with 95 % intervals and the majority."""
    kinds = ["all", *next(iter(evaluation.models.values())).sets[test_set].by_type]
    bars = len(evaluation.models) + 1
    figure, axes = _figure(3.4 + 0.2 * -(-bars // LEGEND_COLUMNS))
    width = 0.8 / bars
    for index, (name, model) in enumerate(evaluation.models.items()):
        result = model.sets[test_set]
        shares = [result.accuracy, *(result.by_type[kind] for kind in kinds[1:])]
        values = [share.value for share in shares]
        errors = [[share.value - share.low for share in shares], [share.high - share.value for share in shares]]
        places = [place + (index - (bars - 1) / 2) * width for place in range(len(kinds))]
        again, colour = divmod(index, len(COLOURS))
        style: dict[str, Any] = {"color": COLOURS[colour], "hatch": HATCHES[again % len(HATCHES)], "edgecolor": "white"}
        drawn: Any = axes.bar(places, values, width, label=name, linewidth=0.0, **style)
        axes.errorbar(places, values, yerr=errors, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        if bars <= MOST_LABELLED:
            _write_values(axes, drawn, values, ON_COLOUR[index % len(COLOURS)])
    _majority_bars(axes, evaluation.baselines[test_set], kinds, width, bars)
    axes.set_xticks(range(len(kinds)), [kind.replace("_", "/") for kind in kinds])
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("accuracy (share of questions)")
    axes.set_xlabel("answer type")
    axes.set_title(f"Test set {test_set}: accuracy with 95 % intervals", fontsize=11)
    figure.legend(ncols=min(bars, LEGEND_COLUMNS), fontsize=8, loc="outside lower center", frameon=False)
    return _png(figure)


def _majority_bars(axes: Any, baseline: BaselineResult, kinds: Sequence[str], width: float, bars: int) -> None:
    shares = [baseline.majority, *(baseline.majority_by_type[kind] for kind in kinds[1:])]
    places = [place + (bars - 1) / 2 * width for place in range(len(kinds))]
    values = [share.value for share in shares]
    drawn: Any = axes.bar(places, values, width, color="#dddddd", edgecolor=NEUTRAL, label="majority answer")
    if bars <= MOST_LABELLED:
        _write_values(axes, drawn, values, "black")


def _write_values(axes: Any, bars: Any, values: Sequence[float], colour: str) -> None:
    """Each value upright at the foot of its bar, where no interval or neighbour is in the way."""
    for bar, value in zip(bars, values, strict=True):
        place = bar.get_x() + bar.get_width() / 2
        axes.text(place, 0.02, f"{value:.3f}", rotation=90, ha="center", va="bottom", fontsize=7, color=colour)


def training_curves(stages: Mapping[str, Mapping[str, Curve]]) -> bytes:
    """One panel a stage: what it minimised, against optimiser steps. Noisy curves are drawn with a running mean."""
    columns = min(3, max(1, len(stages)))
    rows = max(1, -(-len(stages) // columns))
    figure = Figure(figsize=(WIDTH_IN, 2.5 * rows), dpi=DPI, layout="constrained")
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    names = sorted({name for curves in stages.values() for name in curves})
    colour_of = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    for axes, (stage, curves) in zip(grid.flat, stages.items(), strict=False):
        for name, curve in curves.items():
            steps, values = [step for step, _ in curve], [value for _, value in curve]
            axes.plot(steps, values, color=colour_of[name], linewidth=0.6, alpha=0.3)
            axes.plot(
                steps, _running_mean(values), color=colour_of[name], linewidth=1.4, label=CURVE_NAMES.get(name, name)
            )
        axes.set_title(stage, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        if any(value > 0 for curve in curves.values() for _, value in curve):
            axes.set_yscale("log")
        axes.legend(fontsize=7, frameon=False)
    for axes in list(grid.flat)[len(stages) :]:
        axes.set_axis_off()
    figure.supxlabel("optimiser step", fontsize=9)
    figure.supylabel("loss (nats a token where not said, logarithmic)", fontsize=9)
    return _png(figure)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of a thirtieth of the curve, shorter at its ends."""
    half = len(values) // 60
    windows = (values[max(0, place - half) : place + half + 1] for place in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def expert_load(load: Mapping[int, Mapping[str, Sequence[float]]], title: str) -> bytes:
    """A table of colours a sparse layer: share of routing decisions by group of tokens and expert, and its entropy."""
    groups = list(next(iter(load.values())))
    columns = min(3, len(load))
    rows = -(-len(load) // columns)
    figure = Figure(figsize=(WIDTH_IN, 0.5 + (0.7 + 0.36 * len(groups)) * rows), dpi=DPI, layout="constrained")
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    image: Any = None
    most = max(max(shares[group]) for shares in load.values() for group in groups)
    for place, (layer, shares) in enumerate(load.items()):
        axes = grid.flat[place]
        table = [list(shares[group]) for group in groups]
        experts = range(len(table[0]))
        image = axes.imshow(table, vmin=0.0, vmax=most, cmap="cividis", aspect="auto")
        size = 8 if len(experts) * columns <= 2 * MOST_LABELLED else 6
        for row, values in enumerate(table):
            for column, value in enumerate(values):
                colour = "black" if value > 0.55 * most else "white"
                axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=size)
            axes.text(len(values) - 0.4, row, f"{load_entropy(values):.2f}", va="center", fontsize=8)
        axes.set_title(f"text layer {layer}", fontsize=9)
        axes.set_title("entropy\n/ ln E", fontsize=7, loc="right", ha="left")
        axes.set_xticks(experts, [str(expert) for expert in experts])
        axes.set_xlabel("expert", fontsize=8)
        named = [group.replace("_", "/") for group in groups] if place % columns == 0 else []
        axes.set_yticks(range(len(groups)) if named else [], named)
        axes.tick_params(labelsize=8)
    for axes in list(grid.flat)[len(load) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=11)
    figure.colorbar(image, ax=list(grid.flat), label="share of routing decisions", shrink=0.9)
    return _png(figure)


def load_history(layers: Mapping[int, LoadCurves], stages: Mapping[str, float], title: str) -> bytes:
    """One row a sparse layer: load of every expert, and its entropy, against steps; `stages` maps names to first steps.

    A collapse shows as lines that leave the even share and as an entropy that falls.
    """
    experts = len(next(iter(layers.values())).load_nE[0])
    figure = Figure(figsize=(WIDTH_IN, 1.3 + 1.8 * len(layers)), dpi=DPI, layout="constrained")
    grid: Any = figure.subplots(len(layers), 2, squeeze=False, sharex=True)
    lowest = min(value for curves in layers.values() for value in _running_mean(curves.entropy_n))
    for (left, right), (layer, curves) in zip(grid, layers.items(), strict=True):
        left.axhline(1 / experts, color=NEUTRAL, linewidth=0.8, linestyle=":", label="even share")
        for expert in range(experts):
            style = {"color": COLOURS[expert % len(COLOURS)], "linestyle": "-" if expert < len(COLOURS) else "--"}
            shares = [load_E[expert] for load_E in curves.load_nE]
            left.plot(curves.steps, shares, linewidth=0.5, alpha=0.2, **style)
            left.plot(curves.steps, _running_mean(shares), linewidth=1.3, label=f"expert {expert}", **style)
        right.plot(curves.steps, curves.entropy_n, color="black", linewidth=0.5, alpha=0.2)
        right.plot(curves.steps, _running_mean(curves.entropy_n), color="black", linewidth=1.3)
        left.set_ylim(bottom=0.0)
        right.set_ylim(min(0.9, lowest - 0.02), 1.005)
        left.set_ylabel(f"text layer {layer}\nshare of decisions", fontsize=8)
        right.set_ylabel("entropy / ln E", fontsize=8)
        for axes in (left, right):
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.25)
            for start in list(stages.values())[1:]:
                axes.axvline(start, color=NEUTRAL, linewidth=0.8, linestyle="--")
    grid[0, 0].set_title("routing decisions that each expert received", fontsize=9)
    grid[0, 1].set_title("entropy of these shares (1: even, 0: one expert has all)", fontsize=9)
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False
    )
    for axes in grid[-1]:
        axes.set_xlabel(f"optimiser step ({', then '.join(stages)})", fontsize=8)
    figure.suptitle(title, fontsize=11)
    return _png(figure)


def co_activation(layers: Mapping[int, Sequence[Sequence[float]]], title: str) -> bytes:
    """A table of colours a sparse layer: the share of tokens that were sent to both of two experts [E, E]."""
    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(WIDTH_IN, 0.7 + 2.5 * rows), dpi=DPI, layout="constrained")
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    most = max(value for table in layers.values() for row in table for value in row)
    image: Any = None
    for axes, (layer, table) in zip(grid.flat, layers.items(), strict=False):
        E = len(table)
        cells = [[math.nan if i == j else table[i][j] for j in range(E)] for i in range(E)]
        image = axes.imshow(cells, vmin=0.0, vmax=most, cmap="cividis", aspect="auto")
        for i, j in ((i, j) for i in range(E) for j in range(E) if i != j and E <= MOST_LABELLED):
            colour = "black" if table[i][j] > 0.55 * most else "white"
            axes.text(j, i, f"{table[i][j]:.0%}", ha="center", va="center", color=colour, fontsize=7)
        even = sum(map(sum, table)) / (E * (E - 1))  # all pairs of a token count, so their mean is the even share
        axes.set_title(f"text layer {layer} (even: {even:.1%})", fontsize=9)
        axes.set_xticks(range(E))
        axes.set_yticks(range(E))
        axes.tick_params(labelsize=8)
        axes.set_xlabel("expert", fontsize=8)
        axes.set_ylabel("expert", fontsize=8)
    for axes in list(grid.flat)[len(layers) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=list(grid.flat), label="share of tokens sent to both", shrink=0.9)
    figure.suptitle(title, fontsize=11)
    return _png(figure)


def _figure(height_in: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout="constrained")
    axes: Any = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
