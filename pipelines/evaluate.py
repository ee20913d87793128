"""Last stage: every model sits every test set, then the report is written. Artefacts `evaluation` and `report`.

A Ray task for each model and test set loads the model once and hands its answers back piece by piece; agreement and
speed follow when all have answered, speed alone on the machine. With `evaluate.sets: validation` models sit the
validation pictures in the same way, into artefacts of their own. The protocol is docs/protocol.md. Run as
`python -m pipelines.evaluate --config FILE`.
"""

import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from pipelines.command import run_command
from pipelines.models import ModelSource, evaluated_models
from pipelines.prepare import hallucination_sets, question_sets
from pipelines.report import plan_report, write_report
from pipelines.runtime import connect, model_task, require
from pipelines.stream_trials import ask_about_streams, plan_stream_trials
from sparsight import layout
from sparsight.artifacts import Artifact, RunDirectory, read_manifest
from sparsight.config import EvaluateConfig, RunConfig
from sparsight.data.objects import VOCABULARY, ObjectVocabulary
from sparsight.data.samples import iter_samples
from sparsight.errors import AlignmentError, ArtifactError, ConfigError
from sparsight.evaluate.agreement import Agreement, agreement
from sparsight.evaluate.answers import Answer, Examination, Examiner, by_pictures, join
from sparsight.evaluate.hallucination import hallucination
from sparsight.evaluate.results import (
    STUDENT,
    TEACHER,
    Evaluation,
    ModelResult,
    baseline_result,
    figures,
    paired,
    set_result,
    shares,
)
from sparsight.evaluate.scores import Baselines
from sparsight.evaluate.speed import decode_speeds
from sparsight.media.images import DecodeLimits
from sparsight.model.parameters import activated_parameters, total_parameters
from sparsight.observe import progress_bar, say
from sparsight.records import Sample, Turn
from sparsight.storage import Storage

KIND, VERSION = "evaluation", 1
RESULTS, PREDICTIONS = "evaluation.json", "predictions.parquet"
HEADLINE_SOURCE = "easy_vqa"
PICTURES_PER_PIECE = 256

Answered = dict[tuple[str, str], Examination]
"""By model and test set."""


def evaluate(config: RunConfig) -> None:
    """Write the artefacts `evaluation` and `report`; finished ones are left alone.

    Raises `ArtifactError` where the samples or a model are not finished, `AlignmentError` where a student cuts text
    into other tokens than the teacher.
    """
    models = evaluated_models(config)
    artifact = plan_evaluation(config, models)
    if artifact.finished is None:
        start_s = time.monotonic()
        artifact.begin()
        evaluation, answered = examine_all(config, models)
        artifact.storage.write_bytes(RESULTS, evaluation.model_dump_json(indent=2).encode())
        artifact.storage.write_bytes(PREDICTIONS, _predictions(answered))
        counts = {"questions": sum(len(part.answers) for part in answered.values()), "models": len(models)}
        artifact.commit(counts, figures(evaluation) | {"wall_s": time.monotonic() - start_s})
    else:
        say("evaluate: nothing to do, the evaluation is there")
    if config.evaluate.streams is not None:
        ask_about_streams(config, config.evaluate.streams, models)
    write_report(config)


def plan_evaluation(config: RunConfig, models: Sequence[ModelSource]) -> Artifact:
    """The artefact of this stage, fingerprinted by its settings, the models and the sets of questions."""
    run = RunDirectory(config.run_dir)
    inputs = {f"model_{model.name}": model.fingerprint for model in models}
    for name, asked in evaluation_sets(config).all.items():
        inputs[name] = read_manifest(asked.storage, "samples").fingerprint
    inputs["baselines"] = run.finished(layout.TEACHER_SAMPLES, "samples")[1].fingerprint
    name = layout.asked(config.evaluate.sets, layout.EVALUATION)
    return run.artifact(name, KIND, VERSION, config.evaluate, inputs)


class Asked(NamedTuple):
    """A set of questions: finished samples, or those of one source among them."""

    storage: Storage
    questions: int
    source: str | None = None

    def samples(self) -> Iterator[Sample]:
        samples = iter_samples(self.storage)
        return (sample for sample in samples if self.source is None or sample.source == self.source)


class EvaluationSets(NamedTuple):
    """The sets of an evaluation by name (`easy_vqa`, `scenes`, …)."""

    questions: dict[str, Asked]
    """Those whose answers are right or wrong, the headline set first."""
    hallucination: dict[str, Asked]
    """Those whose answers are read for objects, drawn scenes first; each holds the vocabulary to read them with."""

    @property
    def all(self) -> dict[str, Asked]:
        return self.questions | self.hallucination


def evaluation_sets(config: RunConfig) -> EvaluationSets:
    """The sets that the configuration has; what else lies in the folder is not asked.

    Raises `ArtifactError` where one is not finished, `ConfigError` where none has questions that a model answers
    rightly or wrongly.
    """
    run = RunDirectory(config.run_dir)
    if config.evaluate.sets == "validation":
        return EvaluationSets(_validation_sets(config, run), {})
    questions = _test_sets(run, sorted(question_sets(config.data), key=_headline_first))
    if not questions:
        raise ConfigError("there is no test set to evaluate on: give data a source with test pictures, and prepare")
    return EvaluationSets(questions, _test_sets(run, hallucination_sets(config.data)))


def _headline_first(name: str) -> tuple[bool, str]:
    return not name.endswith(HEADLINE_SOURCE), name


def _test_sets(run: RunDirectory, artifacts: Sequence[str]) -> dict[str, Asked]:
    sets: dict[str, Asked] = {}
    for artifact in artifacts:
        storage, manifest = run.finished(artifact, "samples")
        sets[artifact.removeprefix(layout.held_out_samples(""))] = Asked(storage, manifest.counts["questions"])
    return sets


def _validation_sets(config: RunConfig, run: RunDirectory) -> dict[str, Asked]:
    """The validation samples by source, as `validation_easy_vqa`, …"""
    if config.data.validation_fraction == 0.0:
        raise ConfigError("evaluate.sets: validation needs a data.validation_fraction above 0: set it, and prepare")
    storage, _ = run.finished(layout.VALIDATION_SAMPLES, "samples")
    counts: Counter[str] = Counter()
    for sample in iter_samples(storage):
        counts[sample.source] += len(sample.turns)
    return {f"validation_{name}": Asked(storage, counts[name], name) for name in sorted(counts, key=_headline_first)}


def examine_all(config: RunConfig, models: Sequence[ModelSource]) -> tuple[Evaluation, Answered]:
    """Let all models sit all test sets, then compare and time them."""
    run = RunDirectory(config.run_dir)
    connect(config.resources)
    resources = config.resources
    require(resources.threads_per_worker, resources.label_gpus, resources.start_timeout_s, "evaluation")
    found = evaluation_sets(config)
    sets = found.questions
    answered = _answers(config, models, found)
    vocabularies = {name: _vocabulary(asked.storage) for name, asked in found.hallucination.items()}
    kinds = _agreements(config, models, {key: part for key, part in answered.items() if key[1] in sets})
    say("evaluate: measuring the speed of decoding")
    sizes: dict[str, _Size] = ray.get(
        model_task(_measure, config.resources).remote(list(models), config.resources.threads_per_worker)
    )
    results = {
        model.name: ModelResult(
            name=model.label,
            directory=model.uri,
            activated_parameters=sizes[model.name].activated,
            total_parameters=sizes[model.name].total,
            sets={name: set_result(answered[model.name, name].answers, kinds.get((model.name, name))) for name in sets},
            tokens_per_s=sizes[model.name].tokens_per_s,
            expert_load={name: shares(answered[model.name, name].expert_counts) for name in sets},
            hallucination={
                name: hallucination(answered[model.name, name].answers, vocabulary)
                for name, vocabulary in vocabularies.items()
            },
        )
        for model in models
    }
    headline = next(iter(sets))
    evaluation = Evaluation(
        headline_set=headline,
        models=results,
        baselines={
            name: baseline_result(
                Baselines(_training_turns(run, asked.source or name)), answered[models[0].name, name].answers
            )
            for name, asked in sets.items()
        },
        differences={
            f"{STUDENT} - {other.name}": paired(
                answered[STUDENT, headline].answers, answered[other.name, headline].answers
            )
            for other in models
            if other.name != STUDENT
        },
    )
    return evaluation, answered


def _vocabulary(storage: Storage) -> ObjectVocabulary:
    return ObjectVocabulary.from_json(storage.read_bytes(VOCABULARY))


def _training_turns(run: RunDirectory, source: str) -> list[Turn]:
    """The answered training turns of a source."""
    storage, _ = run.finished(layout.TEACHER_SAMPLES, "samples")
    samples = list(iter_samples(storage))
    own = [sample for sample in samples if sample.source == source]
    return [turn for sample in own or samples for turn in sample.turns]


def _answers(config: RunConfig, models: Sequence[ModelSource], sets: EvaluationSets) -> Answered:
    settings, threads = config.evaluate, config.resources.threads_per_worker
    limits = DecodeLimits.of(config.data)
    counts = [min(asked.questions, settings.limit or asked.questions) for asked in sets.all.values()]
    examine = model_task(_examine, config.resources)
    work = {
        examine.remote(model, asked, settings, limits, threads, name in sets.questions): (model.name, name)
        for name, asked in sets.all.items()
        for model in models
    }
    parts: dict[tuple[str, str], list[Examination]] = {key: [] for key in work.values()}
    bar = progress_bar("evaluating", total=sum(counts) * len(models), unit="question")
    while work:
        ready: Any = ray.wait(list(work), num_returns=1)[0][0]
        try:
            part: Any = ray.get(next(ready))
        except StopIteration:
            del work[ready]
            continue
        parts[work[ready]].append(part)
        bar.update(len(part.answers))
    bar.close()
    return {key: join(pieces) for key, pieces in parts.items()}


def _examine(
    source: ModelSource, asked: Asked, settings: EvaluateConfig, limits: DecodeLimits, threads: int, read: bool
) -> Generator[Examination]:
    """Runs in a worker: one model on one test set, piece by piece; `read` also reads it with its answers."""
    torch.set_num_threads(threads)
    examiner = Examiner(source.load(), settings.batch_samples, settings.max_answer_tokens, limits)
    for piece in by_pictures(asked.samples(), PICTURES_PER_PIECE, settings.limit):
        yield examiner.examine(piece) if read else examiner.ask(piece)


def _agreements(
    config: RunConfig, models: Sequence[ModelSource], answered: Answered
) -> dict[tuple[str, str], Agreement | None]:
    teacher = next((model for model in models if model.name == TEACHER), None)
    if teacher is None:
        return {}
    compare = model_task(_compare, config.resources)
    work = {
        (model, name): compare.remote(teacher, source, answered[TEACHER, name], answered[model, name])
        for source in models
        for model, name in answered
        if model == source.name != TEACHER
    }
    return dict(zip(work, ray.get(list(work.values())), strict=True))


def _compare(teacher: ModelSource, student: ModelSource, taught: Examination, learned: Examination) -> Agreement | None:
    """Runs in a worker: the states of both models through their own heads."""
    if taught.response_ids_n.tolist() != learned.response_ids_n.tolist():
        raise AlignmentError(
            f"'{student.label}' cuts answers into other tokens than the teacher: their distributions cannot be compared"
        )
    teacher_head_VD, student_head_VD = teacher.load().head_VD, student.load().head_VD
    return agreement(
        torch.from_numpy(taught.states_nD).to(teacher_head_VD),
        teacher_head_VD,
        torch.from_numpy(learned.states_nD).to(student_head_VD),
        student_head_VD,
    )


class _Size(NamedTuple):
    activated: int
    total: int
    tokens_per_s: dict[int, float]


def _measure(sources: Sequence[ModelSource], threads: int) -> dict[str, _Size]:
    """Runs in a worker, alone: parameters and decoding speed of all models, in turns."""
    torch.set_num_threads(threads)
    models = {source.name: source.load() for source in sources}
    speeds = decode_speeds(models)
    return {
        name: _Size(activated_parameters(model), total_parameters(model), speeds[name])
        for name, model in models.items()
    }


def _predictions(answered: Answered) -> bytes:
    """Every answer of every model as one Parquet table."""

    def row(model: str, test_set: str, answer: Answer) -> dict[str, Any]:
        return {
            "model": model,
            "test_set": test_set,
            "id": answer.id,
            "picture": answer.picture,
            "question": answer.question,
            "reference": answer.reference,
            "answer": answer.answer,
            "answer_type": answer.answer_type,
            "correct": answer.correct,
        }

    rows = [row(model, name, answer) for (model, name), part in answered.items() for answer in part.answers]
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, compression="zstd")
    return buffer.getvalue()


def plan(config: RunConfig) -> list[str]:
    """One line an artefact: what would be done."""
    try:
        artifact = plan_evaluation(config, evaluated_models(config))
    except ArtifactError as error:
        return [f"evaluation: waits for earlier stages ({error})"]
    state = "finished, kept" if artifact.finished else "to be written"
    lines = [f"evaluation: {state} ({artifact.storage.uri})"]
    if config.evaluate.streams is not None:
        lines += plan_stream_trials(config, config.evaluate.streams, evaluated_models(config))
    return [*lines, *plan_report(config)]


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("Evaluate the teacher and the students of a run and write the report.", evaluate, argv, plan)


if __name__ == "__main__":
    sys.exit(main())
