"""Scoring a pair: chosen and rejected answer behind one prompt in one forward, against two requests of their own.

A request is a picture of 14 × 14 visual tokens and their newline (197), a question, and an answer of about 30 tokens,
through a text model of SmolLM2's width (576, 9 heads of 64, 3 key-value heads, feed-forward 1536; 4 layers, since
layers only repeat) with a head of 8192 rows; the tower is computed once for neither side, so that only what packing
saves is timed. Both sides score the same pairs with the same model, batch and threads; rounds alternate, and the figure
is the median of their ratios. It is taken from the process's CPU time, which on one thread is the wall time of an idle
machine and leaves out what other programs take; the ratio of wall times stands beside it.

The limit is the ratio of tokens: a packed row has prompt + 2 answers, two requests have 2 prompts + 2 answers, about
(P + 2 A) / (2 P + 2 A) = 0.56 for P = 226 and A = 31 (`token_ratio`). What is left above it is attention, whose packed
mask keeps PyTorch's general kernel where two plain causal requests may take the causal one, and padding. Longer
pictures and prompts bring the limit towards 1/2. Run as `python -m benchmarks.pairs --json FILE`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

from benchmarks.result import write_result
from sparsight.config import ArchitectureConfig
from sparsight.media.chat import EncodedAnswers
from sparsight.model.answer_scores import answer_sums, score_answers
from sparsight.model.label_logprobs import label_logprobs
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.vision_language import VisionLanguageModel

SIZES = ArchitectureConfig(
    picture_pixels=28 * 8,
    patch_pixels=8,
    tower_layers=1,
    tower_width=64,
    tower_heads=2,
    text_width=576,
    text_layers=4,
    text_heads=9,
    text_key_value_heads=3,
    head_width=64,
    text_intermediate=1536,
)
TEXT = (
    "a red circle stands left of the small blue rectangle while two yellow triangles lie below it near green water and "
    "an old brown dog looks at people who walk along this quiet road under tall trees in evening light"
)
ANSWER_WORDS = 30
HEAD_ROWS = 8192


class Took(NamedTuple):
    """Seconds of one side of one round, by the clock and of this process."""

    wall_s: float
    cpu_s: float


class Requests(NamedTuple):
    """The same pairs, packed and apart; `visual_SD` are the visual tokens of one picture."""

    packed: list[EncodedAnswers]
    chosen: list[EncodedAnswers]
    rejected: list[EncodedAnswers]
    visual_SD: torch.Tensor


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of one batch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    model = build()
    requests = make_requests(model, arguments.pairs)
    check(model, requests)
    rounds = alternate(lambda: shared(model, requests), lambda: separate(model, requests), arguments.rounds)
    tokens = sum(len(row.input_ids) for row in requests.packed)
    apart = sum(len(row.input_ids) for row in (*requests.chosen, *requests.rejected))
    ratios = [packed.cpu_s / plain.cpu_s for packed, plain in rounds]
    figures = {
        "shared_vs_separate_scoring": statistics.median(ratios),
        "shared_vs_separate_scoring_wall": statistics.median(packed.wall_s / plain.wall_s for packed, plain in rounds),
        "shared_vs_separate_scoring_lowest": min(ratios),
        "shared_vs_separate_scoring_highest": max(ratios),
        "token_ratio": tokens / apart,
        "shared_cpu_ms_a_pair": 1e3 * statistics.median(packed.cpu_s for packed, _ in rounds) / arguments.pairs,
        "separate_cpu_ms_a_pair": 1e3 * statistics.median(plain.cpu_s for _, plain in rounds) / arguments.pairs,
        "visual_tokens": requests.packed[0].visual_tokens,
        "prompt_tokens": requests.packed[0].starts[0],
        "answer_tokens": (tokens - sum(row.starts[0] for row in requests.packed)) / (2 * arguments.pairs),
        "pairs": arguments.pairs,
        "threads": arguments.threads,
    }
    write_result(arguments.json, figures)
    return 0


def build() -> VisionLanguageModel:
    """A random model whose tokenizer takes a token a word, and whose head has `HEAD_ROWS` rows."""
    model = make_dense(SIZES, make_tokenizer([TEXT] * 20, 512), seed=0)
    model.model.resize_token_embeddings(HEAD_ROWS, mean_resizing=False)
    return model


def make_requests(model: VisionLanguageModel, pairs: int) -> Requests:
    random, words = Random(0), TEXT.split()
    visual_tokens = model.visual_tokens()
    packed: list[EncodedAnswers] = []
    apart: tuple[list[EncodedAnswers], list[EncodedAnswers]] = ([], [])
    for _ in range(pairs):
        question = "what does the picture show and where? " + " ".join(random.choices(words, k=6))
        answers = [" ".join(random.choices(words, k=ANSWER_WORDS)) for _ in apart]
        packed.append(model.chat.encode_answers(question, answers, visual_tokens))
        for rows, answer in zip(apart, answers, strict=True):
            rows.append(model.chat.encode_answers(question, [answer], visual_tokens))
    visual_SD = torch.randn(visual_tokens, SIZES.text_width, generator=torch.Generator().manual_seed(1))
    return Requests(packed, *apart, visual_SD)


def shared(model: VisionLanguageModel, requests: Requests) -> list[float]:
    """Every pair in one packed row."""
    visual_ND = requests.visual_SD.repeat(len(requests.packed), 1)
    return torch.cat(score_answers(model, requests.packed, visual_ND)).tolist()


@torch.no_grad()
def separate(model: VisionLanguageModel, requests: Requests) -> list[float]:
    """A batch of the chosen answers, then a batch of the rejected ones: plain causal rows, each with its own prompt."""
    visual_ND = requests.visual_SD.repeat(len(requests.packed), 1)
    sides = [score_plainly(model, rows, visual_ND) for rows in (requests.chosen, requests.rejected)]
    return torch.stack(sides, dim=1).flatten().tolist()


def score_plainly(model: VisionLanguageModel, rows: Sequence[EncodedAnswers], visual_ND: torch.Tensor) -> torch.Tensor:
    """Scores of rows with one answer each, through the same chunked head."""
    ids_BT, mask_BT = model.pad([row.input_ids for row in rows])
    hidden_BTD = model.hidden(ids_BT, mask_BT, visual_ND)
    places = [(row, position) for row, chat in enumerate(rows) for position in chat.positions_n.tolist()]
    rows_N, positions_N = torch.tensor(places).unbind(dim=1)
    logprobs_N = label_logprobs(hidden_BTD[rows_N, positions_N - 1], model.head_VD, ids_BT[rows_N, positions_N])
    return answer_sums(logprobs_N, [end - start for chat in rows for start, end in chat.answer_spans])


def check(model: VisionLanguageModel, requests: Requests) -> None:
    """Both ways give the same scores; raises `RuntimeError` where they do not. Warms both up as well."""
    largest = max(
        abs(one - other) for one, other in zip(shared(model, requests), separate(model, requests), strict=True)
    )
    if largest > 1e-2:
        raise RuntimeError(f"packed and separate scores differ by {largest}: the timing would compare different work")


def alternate(one: Callable[[], object], other: Callable[[], object], rounds: int) -> list[tuple[Took, Took]]:
    """Both works in every round, first in turn, so that a busy machine slows both."""
    times: list[tuple[Took, Took]] = []
    for number in range(rounds):
        if number % 2:
            first = timed(one)
            times.append((first, timed(other)))
        else:
            first = timed(other)
            times.append((timed(one), first))
    return times


def timed(work: Callable[[], object]) -> Took:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    return Took(time.perf_counter() - wall_s, time.process_time() - cpu_s)


if __name__ == "__main__":
    sys.exit(main())
