"""Making the tiny teacher: a tower that sees, then projector and text model, which is new or starts from real weights.

The stages run on the same engine as distillation, over `samples/teacher`; a teacher that is a Hugging Face directory
needs none of this. Run as `python -m pipelines.teacher --config FILE`.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.command import run_command
from pipelines.train_worker import StageJob, save_model
from pipelines.training import stage_job, train, waits_for
from sparsight import layout
from sparsight.artifacts import MANIFEST, Artifact, RunDirectory
from sparsight.config import RunConfig, StageConfig, TinyTeacherConfig
from sparsight.data.samples import iter_samples, read_samples
from sparsight.distill.rows import RowMaker, chosen_rows
from sparsight.errors import ConfigError
from sparsight.media.images import DecodeLimits
from sparsight.model.text_base import make_model, text_base_digest
from sparsight.model.tiny import make_tokenizer
from sparsight.model.tower import train_tower
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.observe import MetricsWriter, progress_bar, say
from sparsight.records import Sample
from sparsight.storage import Storage

KIND = "model"
VERSION = 1
TOWER = "tower"


def make_teacher(config: RunConfig) -> None:
    """Write the run's `teacher` artefact; nothing for a Hugging Face teacher, a finished one is left alone.

    A killed making continues: a finished tower or stage is kept, an unfinished stage starts at its last checkpoint.
    Raises `ArtifactError` where the samples are not there, `ConfigError` for a stage that needs a teacher itself.
    """
    settings = config.teacher
    if not isinstance(settings, TinyTeacherConfig):
        return
    _check(settings)
    run = RunDirectory(config.run_dir)
    samples, manifest = run.finished(layout.TEACHER_SAMPLES, "samples")
    shared = {"teacher": settings, "seed": config.seed, "precompute_features": config.distill.precompute_features}
    inputs = {"samples": manifest.fingerprint, **text_base_digest(settings.architecture)}
    artifact = run.artifact(layout.TEACHER, KIND, VERSION, shared, inputs)
    if artifact.finished:
        say("teacher: nothing to do, the teacher is there")
        return
    artifact.begin()
    tower = _tower(settings, config, samples, artifact.storage)
    before, figures = tower.storage, dict(_figures(tower))
    stages = [(stage, _stage_artifact(config, stage, artifact)) for stage in settings.stages]
    _train(config, stages, before, samples)
    for stage, finished in stages:
        figures |= {f"{stage.name}_{name}": value for name, value in _figures(finished).items()}
        before = finished.storage
    artifact.storage.delete(layout.MODEL)
    artifact.storage.publish(before.fetch(layout.MODEL), layout.MODEL)
    artifact.commit(figures=figures)
    for name in (TOWER, *(stage.name for stage in settings.stages)):  # the curves stay
        artifact.storage.delete(f"{name}/{MANIFEST}")
        artifact.storage.delete(f"{name}/{layout.MODEL}")


def _check(settings: TinyTeacherConfig) -> None:
    names = [stage.name for stage in settings.stages]
    if len({*names, TOWER, layout.MODEL}) != len(names) + 2:
        raise ConfigError(
            f"teacher.stages: the names {names} must differ, and '{TOWER}' and '{layout.MODEL}' are taken"
        )
    for stage in settings.stages:
        if stage.terms.of_teacher or stage.rows == "pairs" or stage.upcycle is not None:
            raise ConfigError(f"teacher stage '{stage.name}': a tiny teacher learns dense, from answers alone")


def _figures(artifact: Artifact) -> dict[str, float]:
    manifest = artifact.finished
    return manifest.figures if manifest is not None else {}


def _tower(settings: TinyTeacherConfig, config: RunConfig, samples: Storage, teacher: Storage) -> Artifact:
    """A model of the teacher's architecture with a trained tower."""
    seed, limits = config.seed, DecodeLimits.of(config.data)
    content = settings.model_dump(mode="json", include={"architecture", "vocabulary", "tower"})
    base = text_base_digest(settings.architecture)
    artifact = Artifact(teacher.child(TOWER), KIND, VERSION, {"seed": seed, **content}, base)
    if artifact.finished:
        return artifact
    artifact.begin()
    rows = read_samples(samples)
    model = make_model(settings.architecture, lambda: make_tokenizer(corpus(rows), settings.vocabulary), seed)
    with tempfile.TemporaryDirectory() as folder:
        with MetricsWriter(Path(folder)) as metrics, progress_bar("tower", settings.tower.steps, "step") as bar:

            def report(step: int, losses: dict[str, float]) -> None:
                metrics.write(step, losses)
                bar.set_postfix(loss=f"{losses['loss']:.3f}", refresh=False)
                bar.update(step - bar.n)

            figures = train_tower(model, settings.tower, rows, seed, report, limits)
        artifact.storage.publish(Path(folder), "")
    save_model(model, artifact.storage, layout.MODEL)
    artifact.commit(figures=figures)
    return artifact


def corpus(samples: Sequence[Sample]) -> Iterator[str]:
    """The text that the tokenizer is made from."""
    for sample in samples:
        for turn in sample.turns:
            yield turn.question
            if turn.answer is not None:
                yield turn.answer


def _stage_artifact(config: RunConfig, stage: StageConfig, teacher: Artifact) -> Artifact:
    """What one training stage leaves, in a folder of its own under the teacher's."""
    inputs = {"teacher": teacher.fingerprint}
    return Artifact(teacher.storage.child(stage.name), KIND, VERSION, {"stage": stage, "seed": config.seed}, inputs)


def _train(
    config: RunConfig, stages: Sequence[tuple[StageConfig, Artifact]], before: Storage, samples: Storage
) -> None:
    """Train the stages that are not finished; the first starts from the model that `before` holds."""
    directory = before.fetch(layout.MODEL)
    model = VisionLanguageModel.load(directory)
    maker = RowMaker(model.chat, model.visual_tokens, model.head_VD.shape[0])
    answered = maker.answered(iter_samples(samples))
    waiting: list[StageJob] = []
    for stage, artifact in stages:
        start = before.child(layout.MODEL)
        before = artifact.storage
        if artifact.finished:
            continue
        if waiting and waits_for(stage, waiting[-1].stage):
            train(waiting, config.resources)
            waiting = []
        if not waiting:
            directory = start.fetch()  # its tower is that of all that wait
        say(f"teacher: {stage.name}")
        artifact.begin()
        rows = chosen_rows(answered, stage, config.seed)
        waiting.append(stage_job(config, stage, artifact, rows, start, samples, directory))
    if waiting:
        train(waiting, config.resources)


def _plan_lines(config: RunConfig) -> list[str]:
    settings = config.teacher
    if not isinstance(settings, TinyTeacherConfig):
        return ["nothing to make: the teacher is a model directory"]
    lines = [f"train a tower: {settings.tower.steps} steps"]
    return lines + [f"train 'teacher/{stage.name}' on '{layout.TEACHER_SAMPLES}'" for stage in settings.stages]


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("Make the tiny teacher.", make_teacher, argv, _plan_lines)


if __name__ == "__main__":
    sys.exit(main())
