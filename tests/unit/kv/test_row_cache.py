"""The cache of rows: what leaves first, what stays, what it never mixes up."""

import pytest
import torch

from sparsight.kv.row_cache import RowCache

CPU = torch.device("cpu")


def row_of(number: int, layer: int = 0) -> torch.Tensor:
    return torch.full((8,), 10 * number + layer, dtype=torch.uint8)


def found(cache: RowCache, *numbers: int) -> list[int]:
    """The numbers whose rows are there; their content is checked."""
    rows_RU = torch.zeros(len(numbers), 8, dtype=torch.uint8)
    missing = cache.read([(number, 0) for number in numbers], rows_RU)
    there = [number for place, number in enumerate(numbers) if place not in missing]
    for row_U, number in zip(rows_RU, numbers, strict=True):
        assert torch.equal(row_U, row_of(number) if number in there else torch.zeros_like(row_U))
    return there


def test_the_least_recently_used_row_leaves_first() -> None:
    cache = RowCache(8, 3, CPU)
    for number in (1, 2, 3):
        cache.add((number, 0), row_of(number))
    assert found(cache, 1) == [1]
    cache.add((4, 0), row_of(4))
    assert found(cache, 1, 2, 3, 4) == [1, 3, 4]
    cache.add((3, 0), row_of(3))
    assert len(cache) == 3
    assert found(cache, 4, 1, 3) == [4, 1, 3]


def test_kept_rows_stay_until_they_are_released() -> None:
    cache = RowCache(8, 3, CPU)
    cache.add((1, 0), row_of(1), keep=True)
    cache.add((2, 0), row_of(2))
    cache.add((2, 0), row_of(2), keep=True)
    for number in range(3, 9):
        cache.add((number, 0), row_of(number))
    assert found(cache, *range(9)) == [1, 2, 8]
    cache.add((9, 0), row_of(9), keep=True)
    cache.add((10, 0), row_of(10))
    assert found(cache, *range(11)) == [1, 2, 9], "no row leaves for one that is not kept"
    cache.release([(1, 0), (77, 0)])
    cache.add((10, 0), row_of(10))
    assert found(cache, *range(11)) == [2, 9, 10]


def test_layers_of_a_block_are_rows_of_their_own() -> None:
    cache = RowCache(8, 4, CPU)
    for layer in (0, 1):
        cache.add((5, layer), row_of(5, layer))
    rows_RU = torch.zeros(3, 8, dtype=torch.uint8)
    assert cache.read([(5, 1), (5, 0), (5, 2)], rows_RU) == [2]
    assert rows_RU[:, 0].tolist() == [51, 50, 0]
    cache.forget([(5, 0), (6, 0)])
    assert (len(cache), cache.free) == (1, 3)


@pytest.mark.parametrize("row_bytes", [8, 4096])
def test_a_smaller_cache_loses_rows_and_mixes_none_up(row_bytes: int) -> None:
    cache = RowCache(row_bytes, 6, CPU)
    for number in range(6):
        cache.add((number, 0), row_of(number)[:1].expand(row_bytes), keep=number == 5)
    cache.shrink(9)
    assert len(cache) == 6
    cache.shrink(2)
    assert (len(cache), cache.capacity, cache.free) == (2, 2, 0)
    cache.add((7, 0), row_of(7)[:1].expand(row_bytes))
    for number in range(8):
        row_1U = torch.zeros(1, row_bytes, dtype=torch.uint8)
        if not cache.read([(number, 0)], row_1U):
            assert (row_1U == 10 * number).all()
    cache.shrink(0)
    cache.add((8, 0), row_of(8)[:1].expand(row_bytes))
    assert cache.read([(8, 0)], torch.empty(1, row_bytes, dtype=torch.uint8)) == [0]
