"""Distillation: every student of the config goes through its stages, each an artefact that starts from the one before.

Rows are made and checked against the teacher's signals here, before any worker starts; training itself is
`pipelines.training`. Run as `python -m pipelines.distill --config FILE`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.command import run_command
from pipelines.label import teacher_source
from pipelines.training import START, finish_stage, save_model, stage_job
from sparsight import layout
from sparsight.artifacts import Artifact, Manifest, RunDirectory
from sparsight.config import RunConfig, StageConfig, StudentConfig, StudentRun
from sparsight.data.samples import read_samples
from sparsight.data.signals import iter_signals
from sparsight.distill.batches import steps_of
from sparsight.distill.rows import RowMaker, TrainingRow, share_of
from sparsight.distill.start import first_student
from sparsight.errors import ConfigError
from sparsight.model.text_base import text_base_digest
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.observe import say
from sparsight.records import Sample, TeacherSignal
from sparsight.storage import Storage
from sparsight.teacher.load import identify
from sparsight.teacher.protocol import directory_digest

KIND = "model"
VERSION = 1


def distill(config: RunConfig) -> None:
    """Write `students/<name>/<stage>` for all students and stages; finished ones are left alone.

    Raises `ArtifactError` where samples, teacher or signals are not there, `AlignmentError` where a signal does not
    fit its sample or the student, `ConfigError` where a stage cannot be trained as configured.
    """
    data = StageData(config)
    ended: dict[str | None, Artifact] = {}
    for student in config.distill.students:
        before = ended.get(student.start)
        for stage in student.stages:
            artifact = _artifact(data, student, stage, before)
            name = f"{student.name}/{stage.name}"
            if artifact.finished:
                say(f"distill: {name} is there")
            else:
                say(f"distill: {name}")
                _run_stage(data, student, stage, artifact, before)
            before = ended[name] = artifact


@dataclass(frozen=True)
class StageData:
    """What the stages of all students share, each part read when first needed."""

    config: RunConfig

    @cached_property
    def run(self) -> RunDirectory:
        return RunDirectory(self.config.run_dir)

    @cached_property
    def samples_artifact(self) -> tuple[Storage, Manifest]:
        return self.run.finished(layout.STUDENT_SAMPLES, "samples")

    @cached_property
    def signals_artifact(self) -> tuple[Storage, Manifest]:
        return self.run.finished(layout.SIGNALS, "signals")

    @cached_property
    def samples(self) -> list[Sample]:
        return read_samples(self.samples_artifact[0])

    @cached_property
    def signals(self) -> list[TeacherSignal]:
        return list(iter_signals(self.signals_artifact[0]))

    @cached_property
    def teacher_directory(self) -> Path:
        return teacher_source(self.config, self.run).directory()

    @cached_property
    def teacher_fingerprint(self) -> str:
        return identify(teacher_source(self.config, self.run)).model

    def rows(self, stage: StageConfig, student: VisionLanguageModel) -> list[TrainingRow]:
        """The stage's rows as this student reads them."""
        samples = self.samples
        if stage.rows == "ground_truth":
            samples = [sample for sample in samples if sample.has_ground_truth]
        same = self.config.distill.same_visual_tokens
        maker = RowMaker(student.chat, student.visual_tokens, student.head_VD.shape[0], same)
        if stage.terms.forward_kl == 0:
            return maker.answered(samples)
        self._check_signals(stage, maker)
        wanted = {sample.id for sample in samples}
        return maker.labelled(samples, [signal for signal in self.signals if signal.id in wanted])

    def _check_signals(self, stage: StageConfig, maker: RowMaker) -> None:
        details = self.signals_artifact[1].details
        maker.check_tokenizer(details.get("tokenizer_fingerprint"))
        if stage.tail == "sampled" and details.get("tail_samples", 0) == 0:
            raise ConfigError(
                f"stage '{stage.name}' uses the sampled tail, but the signals hold none: set its tail to 'bucket', or "
                "label.tail_samples above 0 and label again"
            )

    def vocabulary(self, student: VisionLanguageModel) -> int | None:
        """Where to cut the student's head, if the teacher knows fewer ids."""
        teacher = int(self.signals_artifact[1].details.get("vocabulary", 0))
        return teacher if 0 < teacher < student.head_VD.shape[0] else None


def _artifact(data: StageData, student: StudentRun, stage: StageConfig, before: Artifact | None) -> Artifact:
    """The stage's artefact: its fingerprint covers the stage, what it starts from and what it reads."""
    config = data.config
    settings: dict[str, Any] = {
        "stage": stage,
        "seed": config.seed,
        "precompute_features": config.distill.precompute_features,
        "same_visual_tokens": config.distill.same_visual_tokens,
    }
    inputs = {"samples": data.samples_artifact[1].fingerprint}
    if stage.terms.forward_kl > 0:
        inputs["signals"] = data.signals_artifact[1].fingerprint
    if before is not None:
        inputs["start"] = before.fingerprint
    else:
        settings["student"] = _new_student(config, student)
        inputs["teacher"] = data.teacher_fingerprint
        if config.student.base is not None:
            inputs["base"] = directory_digest(Path(config.student.base))
        else:
            inputs |= text_base_digest(config.student.architecture)
    return data.run.artifact(layout.student_stage(student.name, stage.name), KIND, VERSION, settings, inputs)


def _run_stage(
    data: StageData, student: StudentRun, stage: StageConfig, artifact: Artifact, before: Artifact | None
) -> None:
    artifact.begin()
    start = before.storage.child(layout.MODEL) if before is not None else _first_start(data, student, artifact.storage)
    model = VisionLanguageModel.load(start.fetch())
    rows = share_of(data.rows(stage, model), stage.share, data.config.seed)
    steps = steps_of(len(rows), stage.batch_samples, stage.epochs, stage.steps)
    vocabulary = data.vocabulary(model) if stage.terms.forward_kl > 0 else None
    job = stage_job(data.config, stage, start, artifact.storage, data.samples_artifact[0], vocabulary)
    finish_stage(artifact, job, rows, steps, data.config)


def _new_student(config: RunConfig, student: StudentRun) -> StudentConfig:
    """What a student that begins anew is made from."""
    if student.text_intermediate is None:
        return config.student
    architecture = config.student.architecture.model_copy(update={"text_intermediate": student.text_intermediate})
    return config.student.model_copy(update={"architecture": architecture})


def _first_start(data: StageData, run: StudentRun, target: Storage) -> Storage:
    """The dense student before its first stage, saved in the stage's draft."""
    student = first_student(_new_student(data.config, run), data.teacher_directory, data.config.seed)
    save_model(student, target, START)
    return target.child(START)


def _plan_lines(config: RunConfig) -> list[str]:
    lines: list[str] = []
    for student in config.distill.students:
        for stage in student.stages:
            length = f"{stage.steps} steps" if stage.steps is not None else f"{stage.epochs:g} epochs"
            sparse = f", up-cycled to {stage.upcycle.experts} experts" if stage.upcycle is not None else ""
            lines.append(
                f"train '{layout.student_stage(student.name, stage.name)}': {length} on {stage.rows} rows{sparse}"
            )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("Distil the teacher's signals into the students.", distill, argv, _plan_lines)


if __name__ == "__main__":
    sys.exit(main())
