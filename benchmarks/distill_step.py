"""What offline distillation costs beside plain supervised fine-tuning, and what its loss needs in memory.

Steps: two copies of the tiny configuration's sparse student train on the same batches in turn, one on cross-entropy
alone (through the same chunked head at response positions), one on forward KL and cross-entropy; the figure is the
median of the ratios of neighbouring steps. It is taken from the process's CPU time, which on one thread is the wall
time of an idle machine and leaves out what other programs take; the ratio of wall times stands beside it. Memory:
the growth of peak resident memory while loss and gradients are computed at vocabulary 151,936, the teacher's targets
being inputs: the median of fresh processes. Run as `python -m benchmarks.distill_step --json FILE`.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.result import write_result
from sparsight.config import ArchitectureConfig, StageConfig, TermsConfig, UpcycleConfig
from sparsight.distill.loop import StageTrainer
from sparsight.distill.losses import ResponseTargets, SparseTargetTensors, response_loss
from sparsight.distill.pictures import Clips
from sparsight.distill.rows import RowMaker, TrainingRow
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import Sample, SparseTargets, Turn

VOCABULARY = 151_936
WIDTH = 896
HEAD, TAIL = 12, 8
BATCH = 32
WARM_STEPS = 10
PROCESSES = 3
"""In which the memory of a loss is measured."""
ANSWERS = ("yes", "no", "circle", "triangle", "red", "teal", "two", "a red circle and a blue rectangle")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each kind")
    parser.add_argument("--positions", type=int, default=2048, help="response positions of the memory measurement")
    parser.add_argument("--measure", choices=["sparse", "full"], help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.positions)))
        return 0
    figures = time_steps(arguments.steps) | compare_memory(arguments.positions)
    write_result(arguments.json, figures)
    return 0


class Took(NamedTuple):
    """Seconds of one step, by the clock and of this process."""

    wall_s: float
    cpu_s: float


class RandomFeatures:
    """One clip of tower features for whatever is asked: what the features are does not change a step's cost."""

    def __init__(self, patches: int, width: int) -> None:
        self.features_PD = torch.randn(patches, width)

    def load(self, content_hashes: Sequence[str]) -> Clips:
        count = len(content_hashes)
        return Clips(self.features_PD.expand(count, -1, -1).contiguous(), [1] * count, are_features=True)


def time_steps(steps: int) -> dict[str, float]:
    """Milliseconds of both kinds of step, and the median of their ratios."""
    torch.set_num_threads(1)
    sft, distill = (
        trainer(TermsConfig(cross_entropy=1.0, balance=0.01), steps),
        trainer(TermsConfig(cross_entropy=0.5, forward_kl=1.0, balance=0.01), steps),
    )
    pairs: list[tuple[Took, Took]] = []
    for number in range(steps + WARM_STEPS):
        if number % 2:
            first = timed_step(sft)
            pairs.append((first, timed_step(distill)))
        else:
            first = timed_step(distill)
            pairs.append((timed_step(sft), first))
    pairs = pairs[WARM_STEPS:]
    return {
        "distill_vs_sft_step": statistics.median(kd.cpu_s / plain.cpu_s for plain, kd in pairs),
        "distill_vs_sft_step_wall": statistics.median(kd.wall_s / plain.wall_s for plain, kd in pairs),
        "sft_step_cpu_ms": 1e3 * statistics.median(plain.cpu_s for plain, _ in pairs),
        "distill_step_cpu_ms": 1e3 * statistics.median(kd.cpu_s for _, kd in pairs),
    }


def timed_step(one: StageTrainer) -> Took:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    one.train_step()
    return Took(time.perf_counter() - wall_s, time.process_time() - cpu_s)


def trainer(terms: TermsConfig, steps: int) -> StageTrainer:
    architecture = ArchitectureConfig(text_layers=2)
    tokenizer = make_tokenizer([*ANSWERS, "is there a red circle in the image?"] * 20, 512)
    student = upcycle(make_dense(architecture, tokenizer, seed=0), UpcycleConfig(), seed=0)
    stage = StageConfig(name="timed", terms=terms, steps=steps + WARM_STEPS, batch_samples=BATCH)
    patches = (architecture.picture_pixels // architecture.patch_pixels) ** 2
    return StageTrainer(student, stage, rows(student), RandomFeatures(patches, architecture.tower_width), seed=0)


def rows(student: VisionLanguageModel) -> list[TrainingRow]:
    """Eight answered questions a picture, with random targets of the default sizes."""
    random, numbers = Random(0), np.random.default_rng(0)
    maker = RowMaker(student.chat, student.visual_tokens, student.head_VD.shape[0])
    made: list[TrainingRow] = []
    for index in range(8 * BATCH):
        turns = tuple(Turn("is there a red circle in the image?", random.choice(ANSWERS)) for _ in range(8))
        (row,) = maker.answered([Sample(f"row/{index}", (b"",), turns, "benchmark")])
        targets = targets_of(numbers, len(row.positions_n), maker.vocabulary)
        made.append(TrainingRow(row.id, row.content_hash, row.input_ids, row.positions_n, row.is_truth_n, targets))
    return made


def targets_of(random: np.random.Generator, n: int, vocabulary: int) -> SparseTargets:
    logits_nV = torch.from_numpy(random.normal(size=(n, vocabulary)) * 4)
    logprobs_nJ, ids_nJ = logits_nV.log_softmax(dim=-1).topk(HEAD + TAIL)
    head_nK, tail_nS = logprobs_nJ[:, :HEAD].float().numpy(), logprobs_nJ[:, HEAD:].float().numpy()
    ids = ids_nJ.int().numpy()
    mass_n = (1.0 - np.exp(head_nK).sum(axis=1)).clip(min=0.0)
    return SparseTargets(ids[:, :HEAD], head_nK, mass_n, ids[:, HEAD:], tail_nS)


def compare_memory(positions: int) -> dict[str, float]:
    """Peak memory and time of both losses: medians over processes of their own, because what the allocator and the
    matrix products keep beside the tensors differs from one to the next."""
    found: dict[str, list[dict[str, float]]] = {"sparse": [], "full": []}
    for kind in [*found] * PROCESSES:
        command = [sys.executable, "-m", "benchmarks.distill_step", "--json", "-", "--measure", kind]
        done = subprocess.run([*command, "--positions", str(positions)], capture_output=True, text=True, check=True)
        found[kind].append(json.loads(done.stdout))
    sparse, full = (
        {name: statistics.median(one[name] for one in measured) for name in measured[0]} for measured in found.values()
    )
    return {
        "sparse_vs_full_loss_memory": sparse["peak_bytes"] / full["peak_bytes"],
        "sparse_loss_peak_bytes": sparse["peak_bytes"],
        "full_loss_peak_bytes": full["peak_bytes"],
        "sparse_vs_full_loss_time": sparse["time_s"] / full["time_s"],
        "positions": positions,
        "width": WIDTH,
        "vocabulary": VOCABULARY,
    }


def measure(kind: str, positions: int) -> dict[str, float]:
    """Growth of this process's peak memory (bytes) and the time while loss and gradients are made."""
    torch.manual_seed(0)
    hidden_ND = torch.empty(positions, WIDTH).normal_().requires_grad_()
    head_VD = torch.empty(VOCABULARY, WIDTH).normal_(0.0, 0.05).requires_grad_()
    labels_N = torch.randint(VOCABULARY, (positions,))
    teacher = sparse_teacher(positions) if kind == "sparse" else full_teacher(positions)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # inputs grow in place: this is what they take
    start_s = time.perf_counter()
    if isinstance(teacher, SparseTargetTensors):
        weights_N = torch.full((positions,), 1.0 / positions)
        loss = response_loss(hidden_ND, head_VD, ResponseTargets(labels_N, weights_N, weights_N, teacher)).total
    else:
        loss = full_loss(hidden_ND, head_VD, labels_N, teacher)
    loss.backward()
    took_s = time.perf_counter() - start_s
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"peak_bytes": grown * (1 if sys.platform == "darwin" else 1024), "time_s": took_s}


def full_loss(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, labels_N: torch.Tensor, teacher_NV: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy and forward KL from whole logits, as plain PyTorch has them."""
    student_NV = (hidden_ND @ head_VD.T).log_softmax(dim=-1)
    kl = torch.nn.functional.kl_div(student_NV, teacher_NV, reduction="batchmean", log_target=True)
    return kl + torch.nn.functional.nll_loss(student_NV, labels_N)


def full_teacher(positions: int) -> torch.Tensor:
    """Log-probs, all but normalised."""
    return torch.empty(positions, VOCABULARY).normal_().sub_(math.log(VOCABULARY) + 0.5)


def sparse_teacher(positions: int) -> SparseTargetTensors:
    ids_NJ = torch.randint(VOCABULARY, (positions, HEAD + TAIL))
    logprobs_NJ = torch.randn(positions, HEAD + TAIL).log_softmax(dim=-1) - 0.1
    mass_N = 1.0 - logprobs_NJ[:, :HEAD].exp().sum(dim=-1)
    return SparseTargetTensors(ids_NJ[:, :HEAD], logprobs_NJ[:, :HEAD], mass_N, ids_NJ[:, HEAD:], logprobs_NJ[:, HEAD:])


if __name__ == "__main__":
    sys.exit(main())
