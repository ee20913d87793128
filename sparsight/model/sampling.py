"""Choosing the next token: the most probable one, or a draw from the row's own random stream.

A row's stream belongs to the row, not to the batch it is decoded in, and one uniform number decides one token by
inversion of the cumulative distribution in vocabulary order. So what is drawn does not depend on a row's neighbours:
rounding changes a token only where the number falls on the very edge between two. Used by decoding and serving.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SamplingSettings:
    """Temperature 0 is greedy. `top_p` keeps the smallest set of tokens with that much probability."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


def stream_seed(seed: int, row_id: str, candidate: int) -> int:
    """The seed of one candidate's random stream, a signed 64-bit number: equal wherever and whenever it is drawn."""
    key = hashlib.blake2b(f"{seed}\n{row_id}\n{candidate}".encode(), digest_size=8).digest()
    return int.from_bytes(key, "little", signed=True)


class TokenChooser:
    """Picks each row's next token; rows have their own settings and random streams."""

    def __init__(self, settings: Sequence[SamplingSettings]) -> None:
        self._drawn = [row for row, setting in enumerate(settings) if setting.temperature > 0.0]
        drawn = [settings[row] for row in self._drawn]
        self._temperature_n = torch.tensor([setting.temperature for setting in drawn])
        self._top_p_n = torch.tensor([setting.top_p for setting in drawn])
        self._streams = [torch.Generator() for _ in drawn]
        for stream, setting in zip(self._streams, drawn, strict=True):
            if setting.seed is None:
                stream.seed()
            else:
                stream.manual_seed(setting.seed)

    def __call__(self, logits_BV: torch.Tensor) -> list[int]:
        chosen: list[int] = logits_BV.argmax(dim=-1).tolist()
        if self._drawn:
            uniforms = [torch.rand((), generator=stream, dtype=torch.float64) for stream in self._streams]
            settings = (self._temperature_n, self._top_p_n, torch.stack(uniforms))
            ids_n = draw(logits_BV[self._drawn], *(values_n.to(logits_BV.device) for values_n in settings))
            for row, token in zip(self._drawn, ids_n.tolist(), strict=True):
                chosen[row] = token
        return chosen


def draw(
    logits_nV: torch.Tensor, temperature_n: torch.Tensor, top_p_n: torch.Tensor, uniforms_n: torch.Tensor
) -> torch.Tensor:
    """Ids [n]: each row's uniform number in [0, 1) through the inverse of its kept tokens' cumulative distribution."""
    probs_nV = (logits_nV.float() / temperature_n[:, None]).softmax(dim=-1)
    if bool((top_p_n < 1.0).any()):
        probs_nV = probs_nV * _nucleus(probs_nV, top_p_n)
    cumulative_nV = probs_nV.cumsum(dim=-1, dtype=torch.float64)
    total_n = cumulative_nV[:, -1].contiguous()
    below_n = torch.nextafter(total_n, torch.zeros_like(total_n))  # keeps u * total under the total after rounding
    wanted_n1 = torch.minimum(uniforms_n * total_n, below_n)[:, None]
    return torch.searchsorted(cumulative_nV, wanted_n1, right=True)[:, 0]


def _nucleus(probs_nV: torch.Tensor, top_p_n: torch.Tensor) -> torch.Tensor:
    """True for the most probable tokens up to and including the one that reaches `top_p`; at least one a row."""
    sorted_nV, order_nV = probs_nV.sort(dim=-1, descending=True, stable=True)
    before_nV = sorted_nV.cumsum(dim=-1) - sorted_nV
    kept_nV = (before_nV < top_p_n[:, None]) | (top_p_n[:, None] >= 1.0)
    kept_nV[:, 0] = True
    return torch.zeros_like(kept_nV).scatter_(1, order_nV, kept_nV)
