"""Distillation: every student of the config goes through its stages, each an artefact that starts from the one before.

Rows are made here from the teacher's signals, or from preference pairs, and checked before any worker starts; pairs
that are not there yet are made on the way (`pipelines.pairs`). Training itself is `pipelines.training`.
Run as `python -m pipelines.distill --config FILE`.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.command import run_command
from pipelines.label import signal_settings, teacher_source
from pipelines.pairs import make_pairs, pairs_artifact
from pipelines.train_worker import START, LiveTeacher, StageJob, Teaching, save_model
from pipelines.training import stage_job, train, waits_for
from sparsight import layout
from sparsight.artifacts import Artifact, Manifest, RunDirectory
from sparsight.config import RunConfig, StageConfig, StudentConfig, StudentRun
from sparsight.data.pairs import read_pairs
from sparsight.data.samples import iter_samples, read_samples
from sparsight.data.signals import iter_signals
from sparsight.distill.pair_rows import PairRowMaker
from sparsight.distill.rows import Row, RowMaker, TrainingRow, chosen_rows
from sparsight.distill.start import first_student
from sparsight.errors import AlignmentError, ConfigError
from sparsight.model.text_base import text_base_digest
from sparsight.model.tower_fingerprint import tower_fingerprint
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.observe import say
from sparsight.records import Sample, TeacherSignal
from sparsight.stages import visual_ask
from sparsight.storage import Storage
from sparsight.teacher.load import identify
from sparsight.teacher.protocol import SignalSettings, directory_digest

KIND = "model"
VERSION = 1


def distill(config: RunConfig) -> None:
    """Write `students/<name>/<stage>` for all students and stages; finished ones are left alone.

    Raises `ArtifactError` where samples, teacher or signals are not there, `AlignmentError` where a signal or pair does
    not fit its sample or the student, `ConfigError` where a stage cannot be trained as configured, and as
    `pipelines.pairs` where pairs are made.
    """
    data = StageData(config)
    ended: dict[str | None, Artifact] = {}
    waiting: dict[str, OpenStage] = {}
    for student in config.distill.students:
        before = ended.get(student.start)
        for stage in student.stages:
            artifact = stage_artifact(data, student, stage, before)
            name = f"{student.name}/{stage.name}"
            if artifact.finished:
                say(f"distill: {name} is there")
            else:
                last = waiting.get(before.storage.uri) if before is not None else None
                if last is not None and waits_for(stage, last.stage):
                    train(_jobs(data, waiting), config.resources)
                    waiting = {}
                say(f"distill: {name}")
                waiting[artifact.storage.uri] = OpenStage(student, stage, artifact, before)
            before = ended[name] = artifact
    if waiting:
        train(_jobs(data, waiting), config.resources)


class OpenStage(NamedTuple):
    """A stage that is not finished, and the one that it continues."""

    student: StudentRun
    stage: StageConfig
    artifact: Artifact
    before: Artifact | None


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

    @cached_property
    def _rows(self) -> dict[tuple[str, bool, str], list[TrainingRow]]:
        return {}

    def rows(self, stage: StageConfig, student: VisionLanguageModel) -> list[TrainingRow]:
        """The stage's rows as this student reads them; stages that read the same share them."""
        key = (stage.rows, stage.terms.of_teacher, student.chat.tokenizer_fingerprint)
        if key not in self._rows:
            self._rows[key] = self._make_rows(stage, student)
        if stage.terms.of_teacher:
            self._check_tail(stage)
        return self._rows[key]

    def _make_rows(self, stage: StageConfig, student: VisionLanguageModel) -> list[TrainingRow]:
        samples = self.samples
        if stage.rows == "ground_truth":
            samples = [sample for sample in samples if sample.has_ground_truth]
        same = self.config.distill.same_visual_tokens
        maker = RowMaker(student.chat, student.visual_tokens, student.head_VD.shape[0], same)
        if not stage.terms.of_teacher:
            return maker.answered(samples)
        maker.check_tokenizer(self.signals_artifact[1].details.get("tokenizer_fingerprint"))
        wanted = {sample.id for sample in samples}
        return maker.labelled(samples, [signal for signal in self.signals if signal.id in wanted])

    def _check_tail(self, stage: StageConfig) -> None:
        if stage.tail != "sampled" or not (stage.terms.forward_kl > 0 or stage.terms.visual_kl > 0):
            return
        if stage.teacher == "live":
            draws = _live_settings(self.config, stage).label.tail_samples
            remedy = "live_tail_samples above 0"
        else:
            draws = int(self.signals_artifact[1].details.get("tail_samples", 0))
            remedy = "label.tail_samples above 0 and label again"
        if draws == 0:
            raise ConfigError(
                f"stage '{stage.name}' uses the sampled tail, but the teacher's side holds none: set its tail to "
                f"'bucket', or {remedy}"
            )

    def check_visual(self, stage: StageConfig) -> None:
        """Raises `ConfigError` unless the store holds what the stage's terms at pictures need."""
        held = set(self.signals_artifact[1].details.get("visual", []))
        missing = [name for name, wanted in visual_ask([stage])._asdict().items() if wanted and name not in held]
        if missing:
            raise ConfigError(
                f"stage '{stage.name}' needs the {' and '.join(missing)} of pictures, which the signals do not hold: "
                "label again (python -m pipelines.label), or set the stage's teacher: live"
            )

    @cached_property
    def teacher_tower(self) -> str:
        known = self.signals_artifact[1].details.get("tower_fingerprint")
        return known or tower_fingerprint(self.teacher_directory)

    def check_tower(self, directory: Path) -> None:
        """Raises `AlignmentError` unless the student has the teacher's tower: positions in pictures then agree."""
        student = tower_fingerprint(directory)
        if student != self.teacher_tower:
            raise AlignmentError(
                f"terms about pictures need one tower: the teacher's is {self.teacher_tower}, the student's {student}; "
                "use student.tower_from_teacher: true and train the tower in no stage before, or leave visual_kl, "
                "relation and attention out"
            )

    def vocabulary(self, student: VisionLanguageModel) -> int | None:
        """Where to cut the student's head, if the teacher knows fewer ids."""
        teacher = int(self.signals_artifact[1].details.get("vocabulary", 0))
        return teacher if 0 < teacher < student.head_VD.shape[0] else None


class Lesson(NamedTuple):
    """What a stage learns from: its rows, the samples that hold their pictures, and where to cut the student's head."""

    rows: Sequence[Row]
    samples: Storage
    vocabulary: int | None


def _lesson(
    data: StageData, run: StudentRun, stage: StageConfig, student: VisionLanguageModel, before: Artifact | None
) -> Lesson:
    if stage.rows != "pairs":
        vocabulary = data.vocabulary(student) if stage.terms.of_teacher else None
        return Lesson(data.rows(stage, student), data.samples_artifact[0], vocabulary)
    assert before is not None, "the configuration asks for a stage before pairs"
    pairs, manifest = make_pairs(data.config, run, before)
    samples, _ = data.run.finished(manifest.details["samples"], "samples")
    known = min(int(manifest.details["vocabulary"]), student.head_VD.shape[0])
    frames = {sample.content_hash: len(sample.frames) for sample in iter_samples(samples)}
    same = data.config.distill.same_visual_tokens
    maker = PairRowMaker(student.chat, student.visual_tokens, known, frames, same)
    maker.check_tokenizer(manifest.details["tokenizer_fingerprint"])
    return Lesson(maker.rows(read_pairs(pairs)), samples, known if known < student.head_VD.shape[0] else None)


def _live_settings(config: RunConfig, stage: StageConfig) -> SignalSettings:
    """What the stage's own teacher says: of pictures as its terms ask, of positions as many tokens as it wants."""
    settings, chosen = signal_settings(config), {"head": stage.live_head, "tail_samples": stage.live_tail_samples}
    label = settings.label.model_copy(update={name: value for name, value in chosen.items() if value is not None})
    return replace(settings, label=label, visual=visual_ask([stage]))


def stage_artifact(data: StageData, student: StudentRun, stage: StageConfig, before: Artifact | None) -> Artifact:
    """The stage's artefact: its fingerprint covers the stage, what it starts from and what it reads."""
    config = data.config
    settings: dict[str, Any] = {
        "stage": stage,
        "seed": config.seed,
        "precompute_features": config.distill.precompute_features,
        "same_visual_tokens": config.distill.same_visual_tokens,
    }
    inputs = {"samples": data.samples_artifact[1].fingerprint}
    if stage.terms.of_teacher:
        inputs["signals"] = data.signals_artifact[1].fingerprint
    if stage.rows == "pairs" and before is not None:
        inputs["pairs"] = pairs_artifact(config, student, before).fingerprint
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


def _jobs(data: StageData, stages: Mapping[str, OpenStage]) -> list[StageJob]:
    """The stages, by place, as workers see them; their drafts are begun.

    A stage may start from the model that another one of them will leave. What its rows and features depend on, picture
    settings, tokenizer and tower, is the same in the directory that this one starts from.
    """
    for opened in stages.values():
        opened.artifact.begin()
    directories: dict[str, Path] = {}
    jobs: list[StageJob] = []
    for place, (student, stage, artifact, before) in stages.items():
        start = before.storage.child(layout.MODEL) if before is not None else _first_start(data, student, artifact)
        known = directories.get(before.storage.uri) if before is not None else None
        directory = directories[place] = known or start.fetch()
        if stage.terms.visual:
            data.check_tower(directory)
        rows, samples, vocabulary = _lesson(data, student, stage, VisionLanguageModel.load(directory), before)
        rows = chosen_rows(rows, stage, data.config.seed)
        has_features = samples.uri == data.samples_artifact[0].uri
        job = stage_job(data.config, stage, artifact, rows, start, samples, directory, vocabulary, has_features)
        jobs.append(replace(job, teaching=_teaching(data, stage)))
    return jobs


def _teaching(data: StageData, stage: StageConfig) -> Teaching:
    """Where the stage's workers find the teacher's side, beyond what their rows hold."""
    if not stage.terms.of_teacher:
        return Teaching()
    if stage.teacher == "live":
        settings = _live_settings(data.config, stage)
        source = teacher_source(data.config, data.run).asked_about(settings.visual)
        return Teaching(teacher=LiveTeacher(source, identify(source), settings))
    if not stage.terms.visual:
        return Teaching()
    data.check_visual(stage)
    return Teaching(store=data.signals_artifact[0].uri)


def _new_student(config: RunConfig, student: StudentRun) -> StudentConfig:
    """What a student that begins anew is made from."""
    if student.text_intermediate is None:
        return config.student
    architecture = config.student.architecture.model_copy(update={"text_intermediate": student.text_intermediate})
    return config.student.model_copy(update={"architecture": architecture})


def _first_start(data: StageData, run: StudentRun, first: Artifact) -> Storage:
    """The dense student before its first stage, saved in the stage's draft."""
    student = first_student(_new_student(data.config, run), data.teacher_directory, data.config.seed)
    save_model(student, first.storage, START)
    return first.storage.child(START)


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
