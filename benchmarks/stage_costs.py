"""What every training stage of a configuration costs on this machine: seconds an optimiser step, and peak memory.

Each stage takes a few steps in a fresh process with the configuration's threads, as the only worker: its model is
built as the pipelines build it, with its real language weights but otherwise untrained, its rows are drawn scenes.
Hours are of the process's CPU time over its threads, which is near to what an idle machine takes, and a little too low:
what runs on one thread only counts less than it takes. The wall time of a step stands beside it. Not in the figures:
starting workers, checkpoints, labelling, evaluation, stages that learn from pairs or have terms at pictures or the
retrieval term. Run as `python -m benchmarks.stage_costs --json FILE`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.distill_step import HEAD, TAIL, RandomFeatures, timed_step
from benchmarks.result import write_result
from sparsight.config import ArchitectureConfig, RunConfig, ScenesSource, TinyTeacherConfig, load
from sparsight.data.scene_questions import scene_samples
from sparsight.distill.loop import StageTrainer
from sparsight.distill.rows import RowMaker, TrainingRow
from sparsight.model.text_base import make_model
from sparsight.model.tiny import make_tokenizer
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import SparseTargets
from sparsight.stages import StageConfig

SCENES = 60
"""The rows that batches are taken from."""


class Measured(NamedTuple):
    """A stage, the architecture that it starts from, and the stages before it."""

    name: str
    stage: StageConfig
    architecture: ArchitectureConfig
    before: Sequence[StageConfig]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--config", type=Path, default=Path("configs/smollm.yaml"))
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each stage, after one that is not")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    config = load(arguments.config)
    if arguments.stage:
        (found,) = (item for item in stages(config) if item.name == arguments.stage)
        print(json.dumps(measure(config, found, arguments.steps)))
        return 0
    figures: dict[str, float] = {}
    for item in stages(config):
        given = ["--json", "-", "--config", str(arguments.config), "--steps", str(arguments.steps)]
        command = [sys.executable, "-m", "benchmarks.stage_costs", *given, "--stage", item.name]
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # a thread that waits takes no CPU time
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        costs = json.loads(done.stdout.splitlines()[-1])
        figures |= {f"{item.name.replace('/', '_')}_{name}": value for name, value in costs.items()}
    figures["training_hours"] = sum(value for name, value in figures.items() if name.endswith("_hours"))
    figures["peak_gib"] = max(value for name, value in figures.items() if name.endswith("_peak_gib"))
    write_result(arguments.json, figures)
    return 0


def stages(config: RunConfig) -> Iterator[Measured]:
    """The stages of the teacher, if it is made here, and of the first student."""
    groups = [("student", config.student.architecture, config.distill.students[0].stages)]
    if isinstance(config.teacher, TinyTeacherConfig):
        groups.insert(0, ("teacher", config.teacher.architecture, config.teacher.stages))
    for name, architecture, listed in groups:
        for index, stage in enumerate(listed):
            if stage.rows != "pairs" and not stage.terms.visual and not stage.terms.retrieval:
                yield Measured(f"{name}/{stage.name}", stage, architecture, listed[:index])


def measure(config: RunConfig, item: Measured, steps: int) -> dict[str, float]:
    """Median seconds of a step, hours of the stage's own number of steps, and this process's peak memory in GiB."""
    threads = config.resources.threads_per_worker
    torch.set_num_threads(threads)
    model = start(config, item)
    short = item.stage.model_copy(update={"steps": steps + 1, "epochs": None})
    architecture = item.architecture
    patches = (architecture.picture_pixels // architecture.patch_pixels) ** 2
    features = RandomFeatures(patches, architecture.tower_width)
    trainer = StageTrainer(model, short, rows(config, model, short), features, seed=0)
    took = [timed_step(trainer) for _ in range(steps + 1)][1:]
    step_s = statistics.median(one.cpu_s for one in took) / threads
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    wall_s = statistics.median(one.wall_s for one in took)
    costs = {"step_s": step_s, "step_wall_s": wall_s, "peak_gib": peak / 2**30}
    return costs if item.stage.steps is None else {**costs, "hours": item.stage.steps * step_s / 3600}


def start(config: RunConfig, item: Measured) -> VisionLanguageModel:
    model = make_model(item.architecture, lambda: make_tokenizer(["is there a red circle?"] * 20, 512), config.seed)
    for stage in [*item.before, item.stage]:
        if stage.upcycle is not None:
            model = upcycle(model, stage.upcycle, config.seed)
    return model


def rows(config: RunConfig, model: VisionLanguageModel, stage: StageConfig) -> list[TrainingRow]:
    """Drawn scenes with as many questions as the run packs together; random targets where the stage reads some."""
    source = ScenesSource(kind="scenes", pictures=SCENES, size_pixels=model.pixels.side)
    maker = RowMaker(model.chat, model.visual_tokens, model.head_VD.shape[0])
    made = maker.answered(scene_samples(source, "train", 0, config.data.turns_per_sample))
    if stage.terms.forward_kl == 0:
        return made
    random = np.random.default_rng(0)
    return [replace(row, targets=targets_of(random, len(row.positions_n), maker.vocabulary)) for row in made]


def targets_of(random: np.random.Generator, n: int, vocabulary: int) -> SparseTargets:
    """Random targets of n positions."""
    logits_nV = torch.from_numpy(random.normal(size=(n, vocabulary)) * 4)
    logprobs_nJ, ids_nJ = logits_nV.log_softmax(dim=-1).topk(HEAD + TAIL)
    head_nK, tail_nS = logprobs_nJ[:, :HEAD].float().numpy(), logprobs_nJ[:, HEAD:].float().numpy()
    ids = ids_nJ.int().numpy()
    mass_n = (1.0 - np.exp(head_nK).sum(axis=1)).clip(min=0.0)
    return SparseTargets(ids[:, :HEAD], head_nK, mass_n, ids[:, HEAD:], tail_nS)


if __name__ == "__main__":
    sys.exit(main())
