"""What an answer rests on: which blocks each layer attended to, and the moments of the stream that these come to.

Values only: nothing is chosen or scored here. Written by `recall`, returned with every answer of `answerer`.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerEvidence:
    """The blocks that one layer attended to, in time order: number, times, score, rank among all blocks (0 = best)."""

    numbers: tuple[int, ...]
    spans_s: tuple[tuple[float, float], ...]
    scores: tuple[float, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Moment:
    """One block's part in an answer: `start_s` is when its frame was taken, the time of its thumbnail.

    `weight` is the mean over the layers of 1 / (1 + rank), 0 where the block was not taken; `score` is its mean score
    in the layers that took it.
    """

    number: int
    start_s: float
    end_s: float
    weight: float
    score: float


def moments_of(evidence: Sequence[LayerEvidence]) -> tuple[Moment, ...]:
    """Every block that some layer attended to, most important first; of equals the earlier comes first.

    Layers differ in the scale of their scores, so they are combined by rank (reciprocal rank fusion).
    """
    spans_s: dict[int, tuple[float, float]] = {}
    scores: dict[int, list[float]] = {}
    weights: dict[int, float] = {}
    for layer in evidence:
        for number, span_s, score, rank in zip(layer.numbers, layer.spans_s, layer.scores, layer.ranks, strict=True):
            spans_s[number] = span_s
            scores.setdefault(number, []).append(score)
            weights[number] = weights.get(number, 0.0) + 1 / (1 + rank) / len(evidence)
    moments = (
        Moment(number, *spans_s[number], weights[number], sum(scores[number]) / len(scores[number]))
        for number in spans_s
    )
    return tuple(sorted(moments, key=lambda moment: (-moment.weight, moment.number)))
