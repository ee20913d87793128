"""Gathers what a run's artefacts say into the artefact `report`: report.md, report.json and plots.

Called by `pipelines.evaluate` when the evaluation is there; measures nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.stream_trials import FIGURES, read_stream_metrics
from pipelines.times import read_times
from sparsight import layout
from sparsight.artifacts import MANIFEST, Artifact, Manifest, RunDirectory, code_revision, digest, read_manifest
from sparsight.config import RunConfig, StudentRun, TinyTeacherConfig
from sparsight.distill.telemetry import LayerHistory, read_history
from sparsight.errors import ArtifactError
from sparsight.evaluate.machine import describe_machine
from sparsight.evaluate.page import render
from sparsight.evaluate.plots import (
    Curve,
    LoadCurves,
    accuracy_bars,
    co_activation,
    expert_load,
    load_history,
    training_curves,
)
from sparsight.evaluate.report import SFT_STUDENT, ArtifactRow, Report, Training
from sparsight.evaluate.results import Evaluation
from sparsight.observe import read_metrics, say
from sparsight.storage import Storage

KIND, VERSION = "report", 2
EVALUATION_KIND = "evaluation"
"""The kind of artefact that a report is about."""
METRICS = "metrics.jsonl"
CURVES = ("cross_entropy", "forward_kl", "visual_kl", "relation", "attention", "retrieval")
"""Terms that are drawn; a stage without them shows its `loss`."""


def write_report(config: RunConfig) -> None:
    """Write the artefact `report`; a finished one is left alone.

    Raises `ArtifactError` without an evaluation, or without the answers about streams where the configuration asks.
    """
    run = RunDirectory(config.run_dir)
    evaluated, manifest = run.finished(_evaluation(config), EVALUATION_KIND)
    artifact = _artifact(config, manifest)
    if artifact.finished is not None:
        return
    artifact.begin()
    evaluation = Evaluation.model_validate_json(evaluated.read_bytes("evaluation.json"))
    pictures = _draw(config, run, evaluation)
    for name, (_, data) in pictures.items():
        artifact.storage.write_bytes(name, data)
    captions = [(name, caption) for name, (caption, _) in pictures.items()]
    report = gather(config, evaluation, manifest, captions)
    artifact.storage.write_bytes("report.json", report.to_json())
    artifact.storage.write_bytes("report.md", render(report).encode())
    artifact.commit(figures=report.figures)
    say(f"report: {artifact.storage.uri}/report.md")


def read_evaluation(config: RunConfig) -> Evaluation:
    """The finished evaluation of a run."""
    storage, _ = RunDirectory(config.run_dir).finished(_evaluation(config), EVALUATION_KIND)
    return Evaluation.model_validate_json(storage.read_bytes("evaluation.json"))


def plan_report(config: RunConfig) -> list[str]:
    """One line: what would be done."""
    try:
        _, manifest = RunDirectory(config.run_dir).finished(_evaluation(config), EVALUATION_KIND)
    except ArtifactError:
        return ["report: waits for the evaluation"]
    artifact = _artifact(config, manifest)
    return [f"report: {'finished, kept' if artifact.finished else 'to be written'} ({artifact.storage.uri})"]


def _evaluation(config: RunConfig) -> str:
    return layout.asked(config.evaluate.sets, layout.EVALUATION)


def _artifact(config: RunConfig, evaluation: Manifest) -> Artifact:
    run = RunDirectory(config.run_dir)
    inputs = {name: digest(manifest) for name, manifest in _manifests(config, run.storage).items()}
    inputs["times"] = digest(_times(run.storage, evaluation))
    return run.artifact(layout.asked(config.evaluate.sets, layout.REPORT), KIND, VERSION, training_of(config), inputs)


def _times(storage: Storage, evaluation: Manifest) -> dict[str, float]:
    """Seconds by stage; those of the evaluation, which is still being timed, are its manifest's."""
    return read_times(storage) | {"evaluate": round(evaluation.figures.get("wall_s", 0.0), 1)}


def _manifests(config: RunConfig, storage: Storage) -> dict[str, Manifest]:
    """Every finished artefact of a run by name, but reports and the evaluation on other sets of questions."""
    keys = [key for key in storage.keys("") if key.endswith(f"/{MANIFEST}")]
    names = [key.removesuffix(f"/{MANIFEST}") for key in keys]
    found = {name: read_manifest(storage.child(name)) for name in names}
    own = _evaluation(config)
    return {name: it for name, it in found.items() if name == own or it.kind not in (KIND, EVALUATION_KIND)}


def gather(config: RunConfig, evaluation: Evaluation, manifest: Manifest, pictures: list[tuple[str, str]]) -> Report:
    """The report object of a run, from its manifests."""
    storage = RunDirectory(config.run_dir).storage
    manifests = _manifests(config, storage)
    rows = [
        ArtifactRow(
            name=name,
            kind=found.kind,
            counts=found.counts,
            fingerprint=found.fingerprint,
            code_revision=found.code_revision,
        )
        for name, found in manifests.items()
    ]
    return Report(
        evaluation=evaluation,
        artifacts=rows,
        stage_seconds=_times(storage, manifest),
        store_figures=_store_figures(manifests),
        streams=_streams(config),
        export=_verdicts(manifests[layout.EXPORT].details) if layout.EXPORT in manifests else {},
        machine=describe_machine(),
        revision=code_revision(),
        pictures=pictures,
        training=training_of(config),
    )


def training_of(config: RunConfig) -> Training:
    """How the configuration makes its models, as far as a report speaks of it."""
    teacher, (first, *others) = config.teacher, config.distill.students
    tiny = isinstance(teacher, TinyTeacherConfig)
    stages = [*(teacher.stages if tiny else ()), *(stage for it in config.distill.students for stage in it.stages)]
    whole = [stage for stage in first.stages if stage.share == 1.0 and stage.most_tokens is None]
    sft = next((student for student in others if student.name == SFT_STUDENT), None)
    return Training(
        shared_tower=tiny
        and config.student.tower_from_teacher
        and not any("tower" in stage.trainable for stage in stages),
        student_sees_signals=any(stage.rows == "all" and stage.terms.of_teacher for stage in whole),
        student_sees_answers=any(stage.rows != "pairs" and stage.terms.cross_entropy > 0.0 for stage in whole),
        sft_is_twin=sft is not None and _architecture(sft) == _architecture(first) and _from_answers_alone(sft),
        sft_takes_as_many_steps=sft is not None and _steps(sft) == _steps(first) is not None,
    )


def _architecture(student: StudentRun) -> tuple[Any, ...]:
    return student.text_intermediate, [stage.upcycle for stage in student.stages if stage.upcycle is not None]


def _from_answers_alone(student: StudentRun) -> bool:
    learns = [stage.rows == "pairs" or stage.terms.of_teacher for stage in student.stages]
    return student.start is None and not any(learns)


def _steps(student: StudentRun) -> int | None:
    """Of all stages together, where the configuration says so."""
    steps = [stage.steps for stage in student.stages if stage.steps is not None]
    return sum(steps) if len(steps) == len(student.stages) else None


def _streams(config: RunConfig) -> dict[str, dict[str, float]]:
    """The headline figures of every model and method that were asked about long streams."""
    if config.evaluate.streams is None:
        return {}
    found = read_stream_metrics(config)
    return {asked: {name: scores[name] for name in FIGURES if name in scores} for asked, scores in found.items()}


def _store_figures(manifests: Mapping[str, Manifest]) -> dict[str, float]:
    found: dict[str, float] = {}
    if layout.SIGNALS in manifests:
        figures = manifests[layout.SIGNALS].figures
        kept = ("signal_bytes_per_token", "visual_bytes_per_sample")
        found |= {name: figures[name] for name in kept if name in figures}
    if layout.STUDENT_SAMPLES in manifests:
        counts = manifests[layout.STUDENT_SAMPLES].counts
        found["training_questions"] = counts["questions"]
        found["ground_truth_questions"] = counts["answered_questions"]
    return found


def _verdicts(details: Mapping[str, Any]) -> dict[str, str]:
    return {str(reader): str(verdict) for reader, verdict in details.get("verified", {}).items()}


def _draw(config: RunConfig, run: RunDirectory, evaluation: Evaluation) -> dict[str, tuple[str, bytes]]:
    """Caption and PNG of every plot, by file name."""
    pictures: dict[str, tuple[str, bytes]] = {}
    for test_set in evaluation.baselines:
        caption = f"Accuracy on {test_set}"
        pictures[f"accuracy_{test_set}.png"] = (caption, accuracy_bars(evaluation, test_set))
    curves = _curves(config, run)
    if curves:
        pictures["training.png"] = ("Training curves", training_curves(curves))
    for name, model in evaluation.models.items():
        load = model.expert_load.get(evaluation.headline_set, {})
        if load:
            title = f"Expert load of {name} on {evaluation.headline_set}"
            pictures[f"experts_{name}.png"] = (title, expert_load(load, title))
    for student in config.distill.students:
        pictures |= _draw_routing(run, student.name, [stage.name for stage in student.stages])
    return pictures


def _draw_routing(run: RunDirectory, student: str, stages: Sequence[str]) -> dict[str, tuple[str, bytes]]:
    """How a student's experts came to share the work over its sparse stages; nothing for a dense student."""
    joined: dict[int, LayerHistory] = {}
    starts: dict[str, float] = {}
    steps = 0
    for stage in stages:
        rows = _metrics(run, layout.student_stage(student, stage))
        found = read_history(rows)
        for layer, history in found.items():
            joined.setdefault(layer, LayerHistory()).extend(history, steps)
        if found:
            starts[stage] = steps
            steps += rows[-1]["step"]
    if not joined:
        return {}
    curves = {layer: LoadCurves(it.steps, it.load_nE, it.entropy_n) for layer, it in joined.items()}
    title = f"Experts of {student} over training"
    pictures = {f"routing_{student}.png": (title, load_history(curves, starts, title))}
    tables = {layer: it.last_together() for layer, it in joined.items() if it.together_mEE}
    if tables:
        caption = f"Tokens that two experts of {student} share, at the end of training"
        pictures[f"together_{student}.png"] = (caption, co_activation(tables, f"Pairs of experts of {student}"))
    return pictures


def _curves(config: RunConfig, run: RunDirectory) -> dict[str, dict[str, Curve]]:
    """What each stage minimised, by stage: the teacher's first, then the students', in the order of the config."""
    folders = [("teacher: tower", "teacher/tower")]
    if isinstance(config.teacher, TinyTeacherConfig):
        folders += [(f"teacher: {stage.name}", f"teacher/{stage.name}") for stage in config.teacher.stages]
    for student in config.distill.students:
        folders += [
            (f"{student.name}: {it.name}", layout.student_stage(student.name, it.name)) for it in student.stages
        ]
    found: dict[str, dict[str, Curve]] = {}
    for title, folder in folders:
        rows = _metrics(run, folder)
        terms = [name for name in CURVES if any(name in row for row in rows)] or ["loss"]
        curves: dict[str, Curve] = {name: [(row["step"], row[name]) for row in rows if name in row] for name in terms}
        if any(curves.values()):
            found[title] = curves
    return found


def _metrics(run: RunDirectory, folder: str) -> list[dict[str, Any]]:
    key = f"{folder}/{METRICS}"
    return read_metrics(run.storage.fetch(key)) if run.storage.exists(key) else []
