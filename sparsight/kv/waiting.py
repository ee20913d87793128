"""Blocks on their way to the disk: copies in one buffer that is as large as the budget says.

A page that a caller has put is copied at once, so that his memory is his own again. Pages that waited where he had
allocated them would lie scattered between his newer ones, and an allocator such as glibc's returns no memory to the
system from between: the process would grow beyond any budget. It knows nothing of files or locks. Used by `tiers`.
"""

from collections import OrderedDict
from dataclasses import replace

import torch
from torch import Tensor

from sparsight.kv.block import KvBlock


class WaitingBlocks:
    """At most `pages` blocks of `layers` rows of `row_bytes` bytes, oldest first."""

    def __init__(self, pages: int, layers: int, row_bytes: int) -> None:
        self._places = list(torch.empty(pages, layers, row_bytes, dtype=torch.uint8))  # that are free, [L, U]
        self._blocks: OrderedDict[int, KvBlock] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def full(self) -> bool:
        return not self._places

    def add(self, block: KvBlock, mean_keys_LGC: Tensor) -> None:
        """Take a block, with equal mean keys that are kept elsewhere. There must be room for it."""
        rows_LU = self._places.pop().copy_(block.rows_LU)
        self._blocks[block.number] = replace(block, rows_LU=rows_LU, mean_keys_LGC=mean_keys_LGC)

    def blocks(self) -> list[KvBlock]:
        """Their rows are good until they are removed."""
        return list(self._blocks.values())

    def copy_row(self, number: int, layer: int, row_U: Tensor) -> bool:
        """Fill `row_U` with one layer of a block; False if the block does not wait."""
        if number not in self._blocks:
            return False
        row_U.copy_(self._blocks[number].rows_LU[layer])
        return True

    def remove(self, number: int) -> None:
        self._places.append(self._blocks.pop(number).rows_LU)
