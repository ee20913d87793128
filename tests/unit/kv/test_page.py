"""Page formats: rows and back, what a grid costs and what it may change."""

import json

import pytest
import torch
from torch import Tensor

from sparsight.kv.page import Encoding, PageFormat

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def page_of(dtype: torch.dtype = torch.float32, tokens: int = 12, width: int = 8) -> Tensor:
    """Keys with channels of very different size, as trained models have them."""
    page_L2GSC = torch.randn(3, 2, 2, tokens, width, generator=torch.Generator().manual_seed(0))
    page_L2GSC[:, 0] *= torch.logspace(-2, 2, width)
    page_L2GSC[:, 0] += 5 * torch.logspace(-2, 2, width)
    return page_L2GSC.to(dtype)


def format_of(page_L2GSC: Tensor, encoding: Encoding) -> PageFormat:
    L, _, G, S, C = page_L2GSC.shape
    return PageFormat(encoding, page_L2GSC.dtype, L, G, S, C)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_rows_are_the_numbers_themselves(dtype: torch.dtype) -> None:
    page_L2GSC = page_of(dtype)
    plain = format_of(page_L2GSC, "plain")
    rows_LU = plain.pack(page_L2GSC)
    assert rows_LU.data_ptr() == page_L2GSC.data_ptr()
    assert rows_LU.shape == (3, plain.row_bytes)
    assert torch.equal(plain.unpack(rows_LU), page_L2GSC)
    assert plain.unpack(rows_LU).data_ptr() == page_L2GSC.data_ptr()
    strided = page_L2GSC.transpose(3, 4).contiguous().transpose(3, 4)
    assert torch.equal(plain.pack(strided), rows_LU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("encoding", "levels"), [("int8", 255), ("int4", 15)])
def test_no_number_moves_by_more_than_half_a_step(encoding: Encoding, levels: int, dtype: torch.dtype) -> None:
    page_L2GSC = page_of(dtype)
    quantised = format_of(page_L2GSC, encoding)
    rows_LU = quantised.pack(page_L2GSC)
    assert rows_LU.shape == (3, quantised.row_bytes)
    assert rows_LU.nbytes == quantised.page_bytes
    found_L2GSC = quantised.unpack(rows_LU)
    assert found_L2GSC.dtype == dtype
    rounding = torch.finfo(dtype).eps * page_L2GSC.float().abs()
    for part, dim in ((0, 2), (1, 3)):
        numbers = page_L2GSC[:, part].float()
        low, high = numbers.amin(dim, keepdim=True), numbers.amax(dim, keepdim=True)
        # The centre is rounded by up to 1/256 of its size, the step by a little more.
        half_a_step = 1.02 * ((high - low) + (high + low).abs() / 256) / levels / 2
        moved = (found_L2GSC[:, part].float() - numbers).abs()
        assert (moved <= half_a_step + rounding[:, part]).all()


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_rows_can_be_read_in_any_selection(encoding: Encoding) -> None:
    page_L2GSC = page_of()
    quantised = format_of(page_L2GSC, encoding)
    rows_LU = quantised.pack(page_L2GSC)
    assert torch.equal(quantised.unpack(rows_LU[[2, 0, 2]]), quantised.unpack(rows_LU)[[2, 0, 2]])


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_numbers_without_spread_or_of_great_size_are_kept(encoding: Encoding) -> None:
    page_L2GSC = page_of(torch.bfloat16)
    page_L2GSC[:, :, :, :, :2] = 0.0
    page_L2GSC[:, 0, :, :, 2] = 3.0
    page_L2GSC[:, 0, :, :, 3] = 1e30  # far outside float16
    found_L2GSC = format_of(page_L2GSC, encoding).unpack(format_of(page_L2GSC, encoding).pack(page_L2GSC))
    torch.testing.assert_close(found_L2GSC[:, 0, :, :, :4], page_L2GSC[:, 0, :, :, :4])
    assert found_L2GSC.isfinite().all()


def test_a_realistic_page_takes_half_and_a_quarter() -> None:
    """LLaVA-OneVision-0.5B: 24 layers, two heads of 64, 196 tokens a frame."""
    sizes = [PageFormat(encoding, torch.bfloat16, 24, 2, 196, 64).page_bytes for encoding in ("plain", "int8", "int4")]
    assert sizes[0] == 24 * 2 * 2 * 196 * 64 * 2
    assert sizes[1] / sizes[0] < 0.525
    assert sizes[2] / sizes[0] < 0.275


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_format_goes_through_json(dtype: torch.dtype) -> None:
    quantised = format_of(page_of(dtype), "int4")
    assert PageFormat.from_json(json.loads(json.dumps(quantised.to_json()))) == quantised
