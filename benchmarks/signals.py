"""What stored signals cost: bytes a response token for random models, as a store of the default settings keeps them.

Random hidden states and heads spread the kept tokens over the whole vocabulary, which is the worst that ids can do to
the files' compression; the demo's report has the figure of a real teacher. `python -m benchmarks.signals --json FILE`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.result import write_result
from sparsight.config import LabelConfig
from sparsight.data.signals import encode_signals, labelled_table, signal_rows
from sparsight.records import TeacherSignal, hash_response
from sparsight.teacher.targets import cut, tail_uniforms, targets_of_hidden

VOCABULARIES = (512, 151_936)
ROWS, ANSWERS, ANSWER_TOKENS = 256, 4, 4
WIDTH = 64
SPREAD = 3.0
"""Standard deviation of the logits."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the size of stored signals.")
    parser.add_argument("--json", required=True, help="where the figures go")
    arguments = parser.parse_args(argv)
    figures = {f"signal_bytes_per_token_vocabulary_{V}": bytes_per_token(V) for V in VOCABULARIES}
    write_result(Path(arguments.json), figures)
    return 0


def bytes_per_token(vocabulary: int) -> float:
    """Size of one signal file of `ROWS` rows over the number of its response tokens."""
    signals = random_signals(vocabulary)
    tokens = sum(len(signal.response_ids_n) for signal in signals)
    return len(encode_signals(signal_rows(labelled_table(signals)))) / tokens


def random_signals(vocabulary: int) -> list[TeacherSignal]:
    generator = torch.Generator().manual_seed(0)
    settings, n = LabelConfig(), ANSWERS * ANSWER_TOKENS
    hidden_nD = torch.randn(ROWS * n, WIDTH, generator=generator)
    head_VD = torch.randn(vocabulary, WIDTH, generator=generator) * SPREAD / WIDTH**0.5
    ids_n = torch.randint(vocabulary, (ROWS * n,), generator=generator).numpy().astype(np.int32)
    uniforms = np.concatenate([tail_uniforms(0, str(row), n, settings.tail_samples) for row in range(ROWS)])
    targets, logprobs_n = targets_of_hidden(
        hidden_nD, lambda part_nD: part_nD @ head_VD.T, vocabulary, ids_n, settings.head, uniforms
    )
    return [
        TeacherSignal(
            id=f"random/train/{row}",
            content_hash=f"{row:032x}",
            response_ids_n=ids_n[start : start + n],
            answer_lengths=(ANSWER_TOKENS,) * ANSWERS,
            answered_by_teacher=(True,) * ANSWERS,
            label_logprobs_n=logprobs_n[start : start + n],
            targets=cut(targets, start, start + n),
            visual_tokens=729,
            response_hash=hash_response(ids_n[start : start + n]),
        )
        for row, start in enumerate(range(0, ROWS * n, n))
    ]


if __name__ == "__main__":
    sys.exit(main())
