"""Blocks: one page, its views, its digest, its way through bytes."""

import pickle
from contextlib import suppress

import pytest
import torch

from sparsight.errors import StreamError
from sparsight.kv.block import KvBlock
from sparsight.kv.page import Encoding


def block_of(dtype: torch.dtype = torch.float32, seed: int = 0, encoding: Encoding = "plain") -> KvBlock:
    page_L2GSC = torch.randn(3, 2, 2, 5, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return KvBlock.from_page(7, 1.25, 2.5, page_L2GSC, encoding)


def test_keys_and_values_are_views_of_one_page() -> None:
    block = block_of()
    page = block.page_L2GSC
    assert page.is_contiguous()
    storage = page.untyped_storage()
    assert storage.nbytes() == page.nbytes
    for view in (block.keys_LGSC, block.values_LGSC):
        assert view.shape == (3, 2, 5, 8)
        assert view.untyped_storage().data_ptr() == storage.data_ptr()
    assert page[1].is_contiguous(), "one layer is one run of bytes"
    assert torch.equal(torch.stack((block.keys_LGSC, block.values_LGSC), dim=1), page)
    assert block.tokens == 5
    assert block.nbytes == page.nbytes + 3 * 2 * 8 * 4


def test_the_index_vector_is_the_mean_key() -> None:
    block = block_of(torch.bfloat16)
    assert block.mean_keys_LGC.dtype == torch.float32
    torch.testing.assert_close(block.mean_keys_LGC, block.keys_LGSC.float().mean(2))


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_the_mean_key_is_taken_before_quantising(encoding: Encoding) -> None:
    block, quantised = block_of(), block_of(encoding=encoding)
    assert torch.equal(quantised.mean_keys_LGC, block.mean_keys_LGC)
    assert not torch.allclose(quantised.keys_LGSC.mean(2), block.mean_keys_LGC, rtol=1e-5)
    torch.testing.assert_close(quantised.page_L2GSC, block.page_L2GSC, atol=0.5, rtol=0.0)
    assert quantised.nbytes < block.nbytes


def test_equal_pages_have_equal_digests() -> None:
    block = block_of()
    later = KvBlock.from_page(8, 9.0, 9.5, block.page_L2GSC.clone())
    assert later.digest == block.digest
    changed = block.page_L2GSC.clone()
    changed[2, 1, 1, 4, 7] = -changed[2, 1, 1, 4, 7]
    assert KvBlock.from_page(7, 1.25, 2.5, changed).digest != block.digest
    strided = block.page_L2GSC.transpose(3, 4).contiguous().transpose(3, 4)
    assert KvBlock.from_page(7, 1.25, 2.5, strided).digest == block.digest


def fields(block: KvBlock) -> tuple[object, ...]:
    return block.number, block.start_s, block.end_s, block.digest, block.format


@pytest.mark.parametrize("encoding", ["plain", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bytes_give_the_same_block_back(dtype: torch.dtype, encoding: Encoding) -> None:
    block = block_of(dtype, encoding=encoding)
    for copy in (KvBlock.from_bytes(block.to_bytes()), pickle.loads(pickle.dumps(block))):
        assert fields(copy) == fields(block)
        assert torch.equal(copy.rows_LU, block.rows_LU)
        assert torch.equal(copy.mean_keys_LGC, block.mean_keys_LGC)


def test_one_flipped_bit_is_noticed() -> None:
    block = block_of()
    data = bytearray(block.to_bytes())
    page = block.page_L2GSC.numpy().tobytes()
    data[bytes(data).index(page) + len(page) // 2] ^= 1
    with pytest.raises(StreamError, match="block 7 does not match its digest"):
        KvBlock.from_bytes(bytes(data))


def test_no_flipped_bit_goes_unnoticed() -> None:
    """Nor does one in the block's number, times or format."""
    block = KvBlock.from_page(7, 1.5, 2.0, torch.ones(1, 2, 1, 1, 2))
    data = bytearray(block.to_bytes())
    for place in range(len(data)):
        for bit in range(8):
            data[place] ^= 1 << bit
            with suppress(StreamError):
                assert fields(KvBlock.from_bytes(bytes(data))) == fields(block), (place, bit)
            data[place] ^= 1 << bit


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_what_is_no_block_is_refused(cut: int) -> None:
    with pytest.raises(StreamError, match="are not a block"):
        KvBlock.from_bytes(block_of().to_bytes()[:cut])
