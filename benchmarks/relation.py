"""What the relation loss costs beside one that is written down plainly, in time and in memory, for one picture.

`naive` makes the picture's logits Z [N, V] and Z Zᵀ, takes 1 - cos, and leaves the gradient to autograd; ours is
`sparsight/distill/relation.py`, which is given no Wᵀ W: it is made anew in every step, as for a head that trains. With
`kept_gram` it is there already, as for a frozen head. The head is frozen but in the figures of a `trainable_head`,
where its gradient [V, D] is made, too. The teacher's matrix is an input. N = 729, D = 1152, V = 151,936, float32.

The limit is arithmetic, in FLOPs with a gradient to the hidden states:

- naive: 4 N V D (logits and back) + 6 N² V (Z Zᵀ, and two products back) = 995 G; the gradient of a head that trains
  adds 2 N V D = 255 G;
- ours: V D² (1 + 1/8) for the upper block triangle of Wᵀ W = 227 G, and 4 N D² + 6 N² D = 8 G for the rest; a head
  that trains adds 2 V D² = 403 G.

At equal speed ours takes 0.24 of the naive time, 0.51 with a head that trains, and 0.01 with a kept Wᵀ W. A step's
further pictures cost the naive version everything again, and ours the 8 G. Naive memory is three [N, V] = 1.3 GB.

Steps take turns; times are CPU time of one thread, which leaves out what other programs take, and figures are medians
of the rounds' ratios, those of wall times beside them. Memory is the growth of peak resident memory while loss and
gradient are made, medians of fresh processes. Errors are ours against naive, of the loss and, in Frobenius norm, of the
gradient to the hidden states; all is float32, but for the naive cosine of the finished matrices. Run as
`python -m benchmarks.relation --json FILE`.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.result import write_result
from sparsight.distill.relation import relation_loss
from sparsight.model.relation_matrix import head_gram, relation_matrix

POSITIONS, WIDTH, VOCABULARY = 729, 1152, 151_936
NOISE = 0.5
"""What the teacher's hidden states have on top of the student's, which are normal."""
PROCESSES = 3
"""In which memory is measured."""


class Learned(NamedTuple):
    """Of one step: the loss, and its gradients to the hidden states and, where the head trains, to the head."""

    loss: torch.Tensor
    gradients: Sequence[torch.Tensor]


class Took(NamedTuple):
    """Seconds of one step, by the clock and of this process."""

    wall_s: float
    cpu_s: float


Step = Callable[[], Learned]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=["naive", "ours"], help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.measure:
        print(measure(arguments.measure))
        return 0
    figures = compare_memory() | compare_steps(arguments.rounds)
    write_result(arguments.json, figures | {"positions": POSITIONS, "width": WIDTH, "vocabulary": VOCABULARY})
    return 0


def naive_step(hidden_ND: torch.Tensor, head_VD: torch.Tensor, teacher_NN: torch.Tensor) -> Learned:
    logits_NV = hidden_ND @ head_VD.T
    relation_NN = logits_NV @ logits_NV.T
    # in float64, because that of half a million float32 numbers is off by 1e-5
    cosine = torch.cosine_similarity(relation_NN.flatten().double(), teacher_NN.flatten().double(), dim=0)
    loss = 1.0 - cosine
    return learned(loss, hidden_ND, head_VD)


def our_step(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, teacher_NN: torch.Tensor, gram_DD: torch.Tensor | None = None
) -> Learned:
    gram_DD = head_gram(head_VD) if gram_DD is None else gram_DD
    losses_B = relation_loss(hidden_ND, gram_DD, [len(hidden_ND)], [teacher_NN], centred=False)
    return learned(losses_B[0], hidden_ND, head_VD)


def learned(loss: torch.Tensor, *inputs: torch.Tensor) -> Learned:
    gradients = torch.autograd.grad(loss, [tensor for tensor in inputs if tensor.requires_grad])
    return Learned(loss.detach(), gradients)


def student() -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states, with a gradient, and a head of a usual scale, without."""
    hidden_ND = torch.empty(POSITIONS, WIDTH).normal_().requires_grad_()
    return hidden_ND, torch.empty(VOCABULARY, WIDTH).normal_(0.0, 0.02)


def compare_steps(rounds: int) -> dict[str, float]:
    """Ratios of the steps' times, and how far apart their results are."""
    hidden_ND, head_VD = student()
    gram_DD = head_gram(head_VD)
    teacher_NN = relation_matrix(hidden_ND.detach() + NOISE * torch.randn_like(hidden_ND), gram_DD)
    trained_VD = head_VD.detach().requires_grad_()  # the same memory
    steps: dict[str, Step] = {
        "naive": lambda: naive_step(hidden_ND, head_VD, teacher_NN),
        "ours": lambda: our_step(hidden_ND, head_VD, teacher_NN),
        "kept": lambda: our_step(hidden_ND, head_VD, teacher_NN, gram_DD),
        "naive_trained": lambda: naive_step(hidden_ND, trained_VD, teacher_NN),
        "ours_trained": lambda: our_step(hidden_ND, trained_VD, teacher_NN),
    }
    naive, ours = steps["naive"](), steps["ours"]()
    times = time_steps(steps, rounds)
    return {
        "relation_time_ratio": ratio(times, "ours", "naive"),
        "relation_time_ratio_kept_gram": ratio(times, "kept", "naive"),
        "relation_time_ratio_trainable_head": ratio(times, "ours_trained", "naive_trained"),
        "relation_time_ratio_wall": ratio(times, "ours", "naive", wall=True),
        "relation_time_ratio_trainable_head_wall": ratio(times, "ours_trained", "naive_trained", wall=True),
        "naive_relation_step_cpu_s": statistics.median(took.cpu_s for took in times["naive"]),
        "relation_step_cpu_s": statistics.median(took.cpu_s for took in times["ours"]),
        "relation_loss": float(ours.loss),
        "relation_relative_error": difference(ours.loss, naive.loss),
        "relation_gradient_error": difference(ours.gradients[0], naive.gradients[0]),
    }


def time_steps(steps: Mapping[str, Step], rounds: int) -> dict[str, list[Took]]:
    """Every step once a round, in an order that rotates."""
    names = list(steps)
    times: dict[str, list[Took]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            steps[name]()
            times[name].append(Took(time.perf_counter() - wall_s, time.process_time() - cpu_s))
    return times


def ratio(times: Mapping[str, Sequence[Took]], one: str, other: str, wall: bool = False) -> float:
    """Median over rounds of one step's time over another's."""
    pairs = zip(times[one], times[other], strict=True)
    return statistics.median(a.wall_s / b.wall_s if wall else a.cpu_s / b.cpu_s for a, b in pairs)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted|, of numbers that are float32, in float64."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def compare_memory() -> dict[str, float]:
    """Growth of peak memory in processes of their own: a peak is never taken back."""
    found: dict[str, list[int]] = {"naive": [], "ours": []}
    for kind in [*found] * PROCESSES:
        command = [sys.executable, "-m", "benchmarks.relation", "--json", "-", "--measure", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[kind].append(json.loads(done.stdout))
    naive, ours = statistics.median(found["naive"]), statistics.median(found["ours"])
    return {
        "relation_memory_ratio": ours / naive,
        "relation_peak_bytes": ours,
        "naive_relation_peak_bytes": naive,
    }


def measure(kind: str) -> int:
    """Bytes by which this process's peak memory grows in one step. Nothing is multiplied before: what a product keeps
    beside its tensors counts."""
    hidden_ND, head_VD = student()
    half_NN = torch.rand(POSITIONS, POSITIONS)
    teacher_NN = half_NN + half_NN.T
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (naive_step if kind == "naive" else our_step)(hidden_ND, head_VD, teacher_NN)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return grown * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(main())
