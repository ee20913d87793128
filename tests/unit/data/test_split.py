"""Choosing pictures: exact in number, the same everywhere, and whole pictures by construction."""

import subprocess
import sys

import pytest

from sparsight.data.split import choose_pictures

HASHES = [f"picture {index}" for index in range(1000)]


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.05, 0.1, 0.333, 0.5, 0.9999, 1.0])
@pytest.mark.parametrize("number", [0, 1, 7, 1000])
def test_exactly_the_rounded_share(fraction: float, number: int) -> None:
    chosen = choose_pictures(HASHES[:number], fraction, 0, "validation")
    assert len(chosen) == round(fraction * number)
    assert chosen <= set(HASHES[:number])


def test_order_and_repetition_do_not_matter() -> None:
    assert choose_pictures(HASHES, 0.1, 3, "x") == choose_pictures([*reversed(HASHES), *HASHES], 0.1, 3, "x")


def test_larger_shares_contain_smaller_ones() -> None:
    shares = [choose_pictures(HASHES, fraction, 0, "x") for fraction in (0.05, 0.1, 0.5)]
    assert shares[0] < shares[1] < shares[2]


def test_seeds_and_purposes_choose_independently() -> None:
    one = choose_pictures(HASHES, 0.5, 0, "x")
    for other in (choose_pictures(HASHES, 0.5, 1, "x"), choose_pictures(HASHES, 0.5, 0, "y")):
        assert 200 < len(one & other) < 300  # 250 expected


def test_another_process_chooses_the_same() -> None:
    code = (
        "from sparsight.data.split import choose_pictures\n"
        "print(sorted(choose_pictures([f'picture {i}' for i in range(1000)], 0.01, 7, 'x')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(sorted(choose_pictures(HASHES, 0.01, 7, "x")))
