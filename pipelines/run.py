"""The whole path with one command: samples, teacher, signals, students, export, report.

Finished stages are skipped, so the same command continues a run that was stopped. Progress goes to standard error;
standard output ends with the path of the run directory. Run as `python -m pipelines.run --config FILE`.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipelines.command import run_command
from pipelines.distill import distill
from pipelines.evaluate import evaluate
from pipelines.export import export
from pipelines.label import label
from pipelines.prepare import prepare
from pipelines.report import read_evaluation
from pipelines.teacher import make_teacher
from pipelines.times import timed
from sparsight import layout
from sparsight.artifacts import MANIFEST, RunDirectory
from sparsight.config import RunConfig
from sparsight.evaluate.page import headline_table
from sparsight.observe import say
from sparsight.storage import Storage


@dataclass(frozen=True)
class Stage:
    """One step of a run: what does it, and the folders of the run in which its artefacts lie."""

    name: str
    title: str
    work: Callable[[RunConfig], object]
    folders: tuple[str, ...]


STAGES = (
    Stage("prepare", "import pictures and questions", prepare, ("samples",)),
    Stage("teacher", "make the teacher", make_teacher, (layout.TEACHER,)),
    Stage("label", "let the teacher label", label, (layout.SIGNALS,)),
    Stage("distill", "distil the students", distill, (layout.FEATURES, "pairs", "students")),
    Stage("export", "export the student and verify it", export, (layout.EXPORT,)),
    Stage("evaluate", "evaluate and write the report", evaluate, (layout.EVALUATION, layout.REPORT)),
)


def run(config: RunConfig) -> None:
    """Take every stage that is not finished, in order, then print what came out and where it lies."""
    storage = RunDirectory(config.run_dir).storage
    start_s = time.monotonic()
    for number, stage in enumerate(STAGES, start=1):
        say(f"[{number}/{len(STAGES)}] {stage.name}: {stage.title}")
        stage_s = time.monotonic()
        with timed(storage, stage.name, stage.folders):
            stage.work(config)
        say(f"[{number}/{len(STAGES)}] {stage.name}: {time.monotonic() - stage_s:.1f} s")
    say(f"all stages: {time.monotonic() - start_s:.0f} s")
    evaluation = read_evaluation(config)
    print(f"accuracy on {evaluation.headline_set} [95 %]\n{headline_table(evaluation)}\n")
    print(f"report: {storage.uri}/{layout.asked(config.evaluate.sets, layout.REPORT)}/report.md")
    print("serve the student: make serve")
    print(storage.uri)


def plan(config: RunConfig) -> list[str]:
    """One line a stage: the finished artefacts that it would meet."""
    storage = RunDirectory(config.run_dir).storage
    return [f"{stage.name}: {stage.title} ({_state(storage, stage)})" for stage in STAGES]


def _state(storage: Storage, stage: Stage) -> str:
    keys = [key for folder in stage.folders for key in storage.keys(folder) if key.endswith(f"/{MANIFEST}")]
    names = [key.removesuffix(f"/{MANIFEST}") for key in keys]
    return f"finished so far: {', '.join(names)}" if names else "nothing finished"


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("Take all stages of a run, from samples to report.", run, argv, plan)


if __name__ == "__main__":
    sys.exit(main())
