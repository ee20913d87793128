"""How one frame's keys and values lie in memory, on disk and on the wire: one row of bytes a layer.

`PageFormat` turns numbers into rows and back. `plain` rows are the model's own numbers. `int8` and `int4` rows are
codes on grids of equal steps: a grid for every key channel over the frame's tokens (a few channels of keys are far
larger than the rest) and one for every value token over its channels, as in KIVI (arXiv 2402.02750). It knows nothing
of blocks or banks. Used by `block`, and by the banks for what `gather` returns.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Encoding = Literal["plain", "int8", "int4"]
_BITS: dict[Encoding, int] = {"int8": 8, "int4": 4}
_GRID = torch.bfloat16  # the range of every floating type; the codes are found on the rounded grid
_TINIEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class PageFormat:
    """Encoding, and the shape [layers, 2, heads, tokens, width] and type of the numbers that it stands for."""

    encoding: Encoding
    dtype: torch.dtype
    layers: int
    heads: int
    tokens: int
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes `U` of one layer's row."""
        numbers = 2 * self.heads * self.tokens * self.width
        if self.encoding == "plain":
            return numbers * self.dtype.itemsize
        return numbers * _BITS[self.encoding] // 8 + self._grid_numbers * _GRID.itemsize

    @property
    def page_bytes(self) -> int:
        return self.layers * self.row_bytes

    @property
    def _grid_numbers(self) -> int:
        """A centre and a step for each key channel and each value token."""
        return 2 * self.heads * (self.width + self.tokens)

    def empty_rows(self, rows: int, device: torch.device | None = None, page_locked: bool = False) -> Tensor:
        """Room for R rows: [R, U]; from a page-locked one, a GPU copies at its full rate."""
        return torch.empty(rows, self.row_bytes, dtype=torch.uint8, device=device, pin_memory=page_locked)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "PageFormat":
        """Raises `TypeError`, `AttributeError` or `KeyError` for what `to_json` did not write."""
        return cls(**{**fields, "dtype": getattr(torch, fields["dtype"])})

    def pack(self, page_L2GSC: Tensor) -> Tensor:
        """Rows [L, U] of bytes; of a plain page that is contiguous, a view."""
        if self.encoding == "plain":
            return page_L2GSC.contiguous().flatten(1).view(torch.uint8)
        key_codes, key_grids = _to_grid(page_L2GSC[:, 0], dim=2, bits=_BITS[self.encoding])
        value_codes, value_grids = _to_grid(page_L2GSC[:, 1], dim=3, bits=_BITS[self.encoding])
        codes_LI = torch.cat((key_codes.flatten(1), value_codes.flatten(1)), dim=1)
        if self.encoding == "int4":
            codes_LI = codes_LI[:, ::2] | codes_LI[:, 1::2] << 4
        grids_LI = torch.cat([grid.flatten(1) for grid in (*key_grids, *value_grids)], dim=1)
        return torch.cat((codes_LI, grids_LI.view(torch.uint8)), dim=1)

    def unpack(self, rows_RU: Tensor) -> Tensor:
        """Keys and values [R, 2, G, S, C] of any R rows, in the model's type; of plain rows, a view."""
        R, G, S, C = rows_RU.shape[0], self.heads, self.tokens, self.width
        if self.encoding == "plain":
            return rows_RU.view(self.dtype).view(R, 2, G, S, C)
        bits = _BITS[self.encoding]
        codes_RI, grids_RI = rows_RU.split([2 * G * S * C * bits // 8, self._grid_numbers * _GRID.itemsize], dim=1)
        if self.encoding == "int4":
            codes_RI = torch.stack((codes_RI & 15, codes_RI >> 4), dim=2)
        numbers_R2GSC = codes_RI.reshape(R, 2, G, S, C).float()
        grids = grids_RI.contiguous().view(_GRID).float().split([G * C, G * C, G * S, G * S], dim=1)
        key_centres, key_steps = (grid.view(R, G, 1, C) for grid in grids[:2])
        value_centres, value_steps = (grid.view(R, G, S, 1) for grid in grids[2:])
        middle = (2**bits - 1) / 2
        numbers_R2GSC[:, 0].sub_(middle).mul_(key_steps).add_(key_centres)
        numbers_R2GSC[:, 1].sub_(middle).mul_(value_steps).add_(value_centres)
        return numbers_R2GSC.to(self.dtype)


def _to_grid(numbers: Tensor, dim: int, bits: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Codes (uint8, one each) and the (centres, steps) of grids that span all numbers along `dim`."""
    numbers = numbers.float()
    low, high = numbers.amin(dim, keepdim=True), numbers.amax(dim, keepdim=True)
    centres = (low / 2 + high / 2).to(_GRID)
    middle = (2**bits - 1) / 2
    reach = torch.maximum(high - centres.float(), centres.float() - low)
    steps = (reach / middle * (1 + torch.finfo(_GRID).eps)).clamp_min(_TINIEST).to(_GRID)  # rounded, still spans all
    codes = ((numbers - centres.float()) / steps.float() + middle).round().clamp(0, 2 * middle)
    return codes.to(torch.uint8), (centres, steps)
