"""Reads a whole stream wherever it is called; a module of its own, so that a worker process imports little for it."""

import os

from torch import Tensor

from sparsight.kv.bank import BlockBank, BlockIndex
from sparsight.kv.block import KvBlock


def read_back(bank: BlockBank) -> tuple[int, KvBlock, BlockIndex, list[KvBlock], list[Tensor]]:
    """Which process this is, and all that a bank says of a stream; gathered newest first, and one block twice."""
    index = bank.index()
    numbers: list[int] = index.numbers_N.tolist()
    blocks = [bank.get(number) for number in numbers]
    pages = [bank.gather(layer, [*reversed(numbers), numbers[0]]) for layer in range(bank.sink.format.layers)]
    return os.getpid(), bank.sink, index, blocks, pages
