"""A paper's comparisons over seeds: what holds, what does not, and how sure one may be.

Each seed is a whole run of its own (data, teacher, labels, students). A comparison is paired by seed and its interval
is Student's over the seeds' differences, so it covers everything that a seed changes. Reads evaluations, knows no
models; `pipelines.reproduce` calls it and `reproduction_page` puts it into words.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sparsight.evaluate.results import Evaluation, figures

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % points of Student's t for 1, 2, … degrees of freedom."""

OPEN_TYPES = frozenset({"caption"})
"""Answer types that are judged as descriptions, not by exact match."""

ACCURACY, CHAIR_RESPONSE, CHAIR_OBJECT, CHAIR_RECALL = "accuracy", "chair_response", "chair_object", "chair_recall"
LOWER_IS_BETTER = frozenset({CHAIR_RESPONSE, CHAIR_OBJECT})
METRICS = (ACCURACY, CHAIR_RESPONSE, CHAIR_OBJECT, CHAIR_RECALL, "pope_adversarial_f1", "kl_nats", "top1_agreement")
"""What is kept of a model, beside its size; a metric that an evaluation lacks is left out."""

SIGNAL_BYTES = "signal_bytes_per_token"
"""A metric of the teacher: what its labels take in the store, per response token."""

Metrics = Mapping[str, Mapping[str, float]]
"""Of one seed: values by model and metric."""


class Interval(NamedTuple):
    """A mean over seeds with its 95 % interval (Student's t), infinite for a single seed, and the seeds' values."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of values that differ by seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf, tuple(values))
    half = T_975[min(len(values) - 2, len(T_975) - 1)] * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, tuple(values))


class Comparison(NamedTuple):
    """A claim as a difference `one` minus `other` in one metric; `published` says what the paper reports."""

    key: str
    title: str
    one: str
    other: str
    metric: str
    published: str


class Headline(NamedTuple):
    """A figure that is one model's mean over the seeds."""

    key: str
    model: str
    metric: str


class Row(NamedTuple):
    """A drawing of some models' metrics side by side, each metric under a heading of its own."""

    name: str
    caption: str
    metrics: Mapping[str, str]
    """Headings by metric."""
    models: Sequence[str]
    unit: str = "share of right answers"


class Study(NamedTuple):
    """A paper's comparisons, and how their page is laid out.

    `columns` are (metric, heading, format) of the table of models, `plane` the two metrics that models are drawn in,
    those of `in_plane` or all, `rows` more drawings. `best_of` names a figure as the difference of one model to the
    best of others: (key, one, others).
    """

    name: str
    title: str
    introduction: str
    comparisons: Sequence[Comparison]
    columns: Sequence[tuple[str, str, str]]
    headlines: Sequence[Headline]
    plane: tuple[str, str]
    best_of: tuple[str, str, Sequence[str]] | None = None
    rows: Sequence[Row] = ()
    in_plane: Sequence[str] = ()

    @property
    def models(self) -> set[str]:
        """Every model that is compared or named."""
        compared = {model for it in self.comparisons for model in (it.one, it.other)}
        best = () if self.best_of is None else (self.best_of[1], *self.best_of[2])
        drawn = {model for row in self.rows for model in row.models}
        return compared | {it.model for it in self.headlines} | set(best) | drawn


class Compared(NamedTuple):
    """A comparison with what came out."""

    comparison: Comparison
    difference: Interval

    @property
    def outcome(self) -> str:
        """Whether `one` is the better model: better, worse, or not decided by these seeds."""
        low, high = self.difference.low, self.difference.high
        if low <= 0.0 <= high:
            return "not decided"
        better = high < 0.0 if self.comparison.metric in LOWER_IS_BETTER else low > 0.0
        return "better" if better else "worse"


def closed_accuracy(evaluation: Evaluation, model: str) -> float:
    """Share of right answers over the closed questions of all test sets; descriptions are left out."""
    right = count = 0
    for result in evaluation.models[model].sets.values():
        for kind, share in result.by_type.items():
            if kind not in OPEN_TYPES:
                right, count = right + share.right, count + share.count
    return right / count if count else math.nan


def metrics_of(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """The kept metrics of every model, under the names that the configuration gives the models."""
    known = figures(evaluation)
    found: dict[str, dict[str, float]] = {}
    for role, model in evaluation.models.items():
        values = {metric: known[f"{role}_{metric}"] for metric in METRICS if f"{role}_{metric}" in known}
        values[ACCURACY] = closed_accuracy(evaluation, role)
        values["activated_parameters"] = model.activated_parameters
        values["total_parameters"] = model.total_parameters
        found[model.name] = values
    return found


def compare(comparisons: Sequence[Comparison], seeds: Sequence[Metrics]) -> list[Compared]:
    """Every comparison whose models and metric all seeds have; a metric that is not a number, none has."""
    found: list[Compared] = []
    for it in comparisons:
        values = [seed.get(model, {}).get(it.metric, math.nan) for seed in seeds for model in (it.one, it.other)]
        if all(map(math.isfinite, values)):
            gaps = [seed[it.one][it.metric] - seed[it.other][it.metric] for seed in seeds]
            found.append(Compared(it, interval(gaps)))
    return found


def over_seeds(seeds: Sequence[Metrics], model: str, metric: str) -> Interval | None:
    """A model's metric over the seeds; None where it was not measured."""
    if not all(math.isfinite(seed.get(model, {}).get(metric, math.nan)) for seed in seeds):
        return None
    return interval([seed[model][metric] for seed in seeds])


def figures_of(study: Study, seeds: Sequence[Metrics], compared: Sequence[Compared]) -> dict[str, float]:
    """The study's headlines as means over the seeds, and every comparison with its interval, by flat names."""
    found: dict[str, float] = {"seeds": len(seeds)}
    for entry in compared:
        key, gap = entry.comparison.key, entry.difference
        found[key] = gap.mean
        if len(seeds) > 1:
            found |= {f"{key}_ci_low": gap.low, f"{key}_ci_high": gap.high}
    for key, model, metric in study.headlines:
        value = over_seeds(seeds, model, metric)
        if value is not None:
            found[key] = value.mean
    if study.best_of is not None:
        key, one, others = study.best_of
        means = {model: over_seeds(seeds, model, ACCURACY) for model in (one, *others)}
        known = {model: value.mean for model, value in means.items() if value is not None}
        if len(known) == len(means):
            found[key] = known[one] - max(known[model] for model in others)
    return found
