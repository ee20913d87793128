"""What layers attended to, put together as moments of the stream."""

import pytest

from sparsight.kv.evidence import LayerEvidence, moments_of


def test_moments_are_fused_by_rank() -> None:
    span_s = {1: (0.0, 1.0), 2: (1.0, 2.0), 5: (4.0, 5.0)}
    evidence = [
        LayerEvidence((1, 5), (span_s[1], span_s[5]), (0.9, 0.1), (0, 3)),
        LayerEvidence((2, 5), (span_s[2], span_s[5]), (7.0, 0.3), (0, 1)),
    ]
    moments = moments_of(evidence)
    assert [(moment.number, moment.start_s, moment.weight) for moment in moments] == [
        (1, 0.0, 0.5), (2, 1.0, 0.5), (5, 4.0, 0.375)
    ]  # fmt: skip
    assert [moment.score for moment in moments] == [0.9, 7.0, pytest.approx(0.2)]
