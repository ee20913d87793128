"""What distillation costs beside plain supervised fine-tuning, and what its loss needs in memory.

Steps: copies of the tiny configuration's sparse student train on the same batches in turn: on cross-entropy alone
(through the same chunked head at response positions); with forward KL beside it (`distill`); with LLaVA-KD's whole loss
from stored signals (`dft`); and with the same from the teacher in this process (`online`). A figure is the median of
the ratios of steps of one round. It is taken from the process's CPU time, which on one thread is the wall
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
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.result import write_result
from sparsight.config import ArchitectureConfig, LabelConfig, StageConfig, TermsConfig, UpcycleConfig
from sparsight.data.signals import labelled_table
from sparsight.data.visual_signals import SUFFIX, VisualStore, encode_visual, visual_rows
from sparsight.distill.loop import StageTrainer
from sparsight.distill.losses import ResponseTargets, SparseTargetTensors, response_loss
from sparsight.distill.pictures import Clips
from sparsight.distill.rows import RowMaker, TrainingRow
from sparsight.distill.taught import LiveSide, StoredSide, TeacherSide
from sparsight.media.images import encode_png
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import Sample, TeacherSignal, Turn
from sparsight.stages import VisualAsk
from sparsight.storage import LocalStorage
from sparsight.teacher.protocol import SignalSettings, TeacherIdentity
from sparsight.teacher.vision_language import VisionLanguageTeacher

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


TERMS = {
    "sft": TermsConfig(cross_entropy=1.0, balance=0.01),
    "distill": TermsConfig(cross_entropy=0.5, forward_kl=1.0, balance=0.01),
    "dft": TermsConfig(cross_entropy=1.0, forward_kl=1.0, visual_kl=1.0, relation=0.5, balance=0.01),
    "online": TermsConfig(cross_entropy=1.0, forward_kl=1.0, visual_kl=1.0, relation=0.5, balance=0.01),
}


def time_steps(steps: int) -> dict[str, float]:
    """Milliseconds of every kind of step, and the medians of their ratios to a supervised one of the same round."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        lesson = prepare(Path(folder))
        trainers = {kind: trainer(kind, lesson, steps) for kind in TERMS}
        rounds: list[dict[str, Took]] = []
        for number in range(steps + WARM_STEPS):
            order = list(trainers) if number % 2 else list(reversed(trainers))
            rounds.append({kind: timed_step(trainers[kind]) for kind in order})
    rounds = rounds[WARM_STEPS:]
    figures = {f"{kind}_step_cpu_ms": 1e3 * statistics.median(took[kind].cpu_s for took in rounds) for kind in TERMS}
    for kind in [*TERMS][1:]:
        figures[f"{kind}_vs_sft_step"] = statistics.median(took[kind].cpu_s / took["sft"].cpu_s for took in rounds)
        wall = statistics.median(took[kind].wall_s / took["sft"].wall_s for took in rounds)
        figures[f"{kind}_vs_sft_step_wall"] = wall
    return figures


def timed_step(one: StageTrainer) -> Took:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    one.train_step()
    return Took(time.perf_counter() - wall_s, time.process_time() - cpu_s)


class Lesson(NamedTuple):
    """What all trainers learn from: rows with targets, and the teacher's side of their pictures, stored and live."""

    student: VisionLanguageModel
    rows: list[TrainingRow]
    sides: dict[str, TeacherSide]


def prepare(folder: Path) -> Lesson:
    """Pictures of noise with eight questions each, labelled by a teacher of the tiny configuration's size."""
    tokenizer = make_tokenizer([*ANSWERS, "is there a red circle in the image?"] * 20, 512)
    teacher = make_dense(ArchitectureConfig(), tokenizer, seed=1)
    student = make_dense(ArchitectureConfig(text_layers=2), tokenizer, seed=0)
    settings = SignalSettings(LabelConfig(head=HEAD, tail_samples=TAIL), visual=VisualAsk(targets=True, relation=True))
    labels = VisionLanguageTeacher(teacher, TeacherIdentity("", "", "", 0), settings)
    samples = [sample(index) for index in range(8 * BATCH)]
    signals = [signal for signal in labels.label(samples) if isinstance(signal, TeacherSignal)]
    assert len(signals) == len(samples)
    (folder / f"visual-0{SUFFIX}").write_bytes(encode_visual(visual_rows(labelled_table(signals))))
    rows = RowMaker(student.chat, student.visual_tokens, student.head_VD.shape[0]).labelled(samples, signals)
    stored = StoredSide(VisualStore(LocalStorage(folder)))
    live = LiveSide(labels.label, {one.id: one for one in samples}, student.chat, student.head_VD.shape[0])
    return Lesson(student, rows, {"dft": stored, "online": live})


def sample(index: int) -> Sample:
    noise = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    random = Random(index)
    turns = tuple(Turn("is there a red circle in the image?", random.choice(ANSWERS)) for _ in range(8))
    return Sample(f"row/{index}", (encode_png(Image.fromarray(noise)),), turns, "benchmark")


def trainer(kind: str, lesson: Lesson, steps: int) -> StageTrainer:
    stage = StageConfig(name="timed", terms=TERMS[kind], steps=steps + WARM_STEPS, batch_samples=BATCH)
    student = upcycle(lesson.student, UpcycleConfig(), seed=0)
    architecture = ArchitectureConfig()
    patches = (architecture.picture_pixels // architecture.patch_pixels) ** 2
    pictures = RandomFeatures(patches, architecture.tower_width)
    return StageTrainer(student, stage, lesson.rows, pictures, seed=0, side=lesson.sides.get(kind))


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
