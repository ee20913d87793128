"""Drawing tokens: against a plain loop over the vocabulary, and the streams that rows draw from."""

import numpy as np
import pytest
import torch

from sparsight.model.sampling import SamplingSettings, TokenChooser, draw, stream_seed


def drawn_slowly(logits_V: np.ndarray, temperature: float, top_p: float, uniform: float) -> int:
    """One draw the obvious way: sort, keep, renormalise, walk along the vocabulary."""
    probs_V = np.exp(logits_V / temperature - np.max(logits_V / temperature))
    probs_V /= probs_V.sum()
    kept, mass = set(), 0.0
    for token in np.argsort(-probs_V, kind="stable"):
        if kept and mass >= top_p:
            break
        kept.add(int(token))
        mass += probs_V[token]
    walked, total = 0.0, sum(probs_V[token] for token in kept)
    for token in sorted(kept):
        walked += probs_V[token]
        if uniform * total < walked:
            return token
    raise AssertionError("the number is below the total")


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.9), (1.7, 0.5), (1.0, 0.0)])
def test_draws_are_those_of_the_plain_loop(temperature: float, top_p: float) -> None:
    random = np.random.default_rng(1)
    logits_nV, uniforms_n = 3.0 * random.normal(size=(200, 37)), random.random(200)
    ids_n = draw(
        torch.from_numpy(logits_nV),
        torch.full((200,), temperature),
        torch.full((200,), top_p),
        torch.tensor(uniforms_n),
    )
    slow = [drawn_slowly(row, temperature, top_p, u) for row, u in zip(logits_nV, uniforms_n, strict=True)]
    assert ids_n.tolist() == slow


def test_settings_of_rows_do_not_mix() -> None:
    logits_nV = torch.randn(3, 37, generator=torch.Generator().manual_seed(0))
    settings = [SamplingSettings(), SamplingSettings(1.0, 1.0, 5), SamplingSettings(0.7, 0.8, 6)]
    together = TokenChooser(settings)
    alone = [TokenChooser([setting]) for setting in settings]
    for _ in range(20):
        assert together(logits_nV) == [choose(row_V[None])[0] for choose, row_V in zip(alone, logits_nV, strict=True)]


def test_draws_come_as_often_as_they_are_probable() -> None:
    logits_V = torch.tensor([0.0, 2.0, 1.0, -1.0])
    choose = TokenChooser([SamplingSettings(1.0, 1.0, seed) for seed in range(2000)])
    shares_V = np.bincount(choose(logits_V.expand(2000, -1)), minlength=4) / 2000
    np.testing.assert_allclose(shares_V, logits_V.softmax(dim=-1).numpy(), atol=0.04)


def test_the_largest_number_still_finds_a_token() -> None:
    """The last tokens have no probability left: the draw must not fall behind the others."""
    logits_1V = torch.tensor([[1.0, 0.5, -1000.0, -1000.0]])
    one = torch.ones(1)
    assert draw(logits_1V, one, one, torch.nextafter(torch.ones(1, dtype=torch.float64), torch.zeros(1).double())) == 1


def test_streams_belong_to_seed_row_and_candidate() -> None:
    seeds = {stream_seed(seed, row, number) for seed in (0, 1) for row in ("a", "b", "a\n1") for number in range(4)}
    assert len(seeds) == 24
    assert stream_seed(0, "a", 1) == stream_seed(0, "a", 1)
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
