"""Blocks of random numbers, the same for the same number in any process, and what a bank is seen to hold."""

import torch

from sparsight.kv.bank import BlockBank
from sparsight.kv.block import SINK_NUMBER, KvBlock
from sparsight.kv.page import Encoding

LAYERS = 2


def block_of(
    number: int,
    tokens: int = 3,
    layers: int = LAYERS,
    dtype: torch.dtype = torch.float32,
    encoding: Encoding = "plain",
) -> KvBlock:
    """Two key/value heads of width 4, two seconds a block."""
    generator = torch.Generator().manual_seed(number + 1)
    page_L2GSC = torch.randn(layers, 2, 2, tokens, 4, generator=generator).to(dtype)
    return KvBlock.from_page(number, 2.0 * number, 2.0 * number + 2, page_L2GSC, encoding)


def sink_of(tokens: int = 5) -> KvBlock:
    return block_of(SINK_NUMBER, tokens)


PAGE_BYTES = block_of(0).rows_LU.nbytes


def contents(bank: BlockBank) -> tuple[object, ...]:
    index = bank.index()
    blocks = [bank.get(number) for number in index.numbers_N.tolist()]
    assert [block.number for block in blocks] == index.numbers_N.tolist()
    assert [[block.start_s, block.end_s] for block in blocks] == index.spans_s_N2.tolist()
    return [block.digest for block in blocks], index.mean_keys_LNGC.tolist(), bank.nbytes, len(bank), bank.sink.digest
