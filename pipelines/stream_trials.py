"""Questions about long streams: every chosen model is asked by every method. Artefact `stream_evaluation`.

External retrieval first trains a head for each model, an artefact under `retrieval_heads`. Then a Ray task for each
model and stream, longest streams first, hands back its answers as rows. Called by
`pipelines.evaluate` where the configuration has `evaluate.streams`; the protocol is docs/protocol.md.
"""

import time
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import ray
import torch

from pipelines.models import ModelSource
from pipelines.prepare import LONG_STREAM_SETTINGS
from pipelines.runtime import connect, model_task, require
from pipelines.stream_exam import StreamExam
from sparsight import layout
from sparsight.artifacts import Artifact, RunDirectory, digest, read_manifest
from sparsight.config import RunConfig, StreamMethod, StreamsSource, StreamTrials
from sparsight.data.stream_questions import retrieval_clips
from sparsight.data.streams import QuestionedStream, iter_streams
from sparsight.evaluate.stream_scores import (
    StreamAnswerRow,
    from_parquet,
    metrics,
    most_frequent_answers,
    score_method,
    scores,
    table,
    to_parquet,
)
from sparsight.kv.head_training import train_head
from sparsight.kv.retrieval_head import HeadEmbedder, RetrievalHead
from sparsight.observe import progress_bar, say
from sparsight.storage import Storage

KIND, VERSION = "stream_evaluation", 1
HEAD_KIND, HEAD_VERSION = "retrieval_head", 1
"""Raised when the same clips and model would give another head, and with `HEAD_CLIPS`."""
HEAD_CLIPS = 800
"""Clips that a retrieval head learns from, at most; they are kept in memory."""
ANSWERS = "answers.parquet"
FIGURES = ("accuracy", "past", "now", "recall")


def ask_about_streams(config: RunConfig, trials: StreamTrials, models: Sequence[ModelSource]) -> None:
    """Write the artefact `stream_evaluation`; a finished one is left alone.

    Raises `ArtifactError` where the streams are not finished.
    """
    artifact = _artifact(config, trials, models)
    if artifact.finished is not None:
        say("streams: nothing to do, the answers are there")
        return
    start_s = time.monotonic()
    artifact.begin()
    connect(config.resources)
    resources = config.resources
    require(resources.threads_per_worker, resources.label_gpus, resources.start_timeout_s, "evaluation of streams")
    asked = _asked(trials, models)
    rows = _answers(config, trials, asked, _heads(config, trials, asked))
    found = scores(rows)
    artifact.storage.write_bytes(ANSWERS, to_parquet(rows))
    figures = {
        f"{model}_{method}_{name}": value
        for (model, method), score in found.items()
        for name, value in metrics(score).items()
        if name in FIGURES
    }
    artifact.commit({"answers": len(rows)}, figures | {"wall_s": time.monotonic() - start_s})
    say(f"answers about {'test' if config.evaluate.sets == 'tests' else 'validation'} streams\n{table(found)}")


def read_stream_metrics(config: RunConfig) -> dict[str, dict[str, float]]:
    """What the finished answers of a run come to, by `model/method` (`student/internal`), and `most_frequent`."""
    storage, _ = RunDirectory(config.run_dir).finished(_name(config), KIND)
    rows = from_parquet(storage.read_bytes(ANSWERS))
    found = {f"{model}/{method}": metrics(score) for (model, method), score in scores(rows).items()}
    return found | {"most_frequent": metrics(score_method(most_frequent_answers(rows)))}


def plan_stream_trials(config: RunConfig, trials: StreamTrials, models: Sequence[ModelSource]) -> list[str]:
    """One line: what would be done."""
    artifact = _artifact(config, trials, models)
    return [f"streams: {'finished, kept' if artifact.finished else 'to be written'} ({artifact.storage.uri})"]


def _name(config: RunConfig) -> str:
    return layout.asked(config.evaluate.sets, layout.STREAM_EVALUATION)


def _streams(config: RunConfig) -> Storage:
    name = layout.TEST_STREAMS if config.evaluate.sets == "tests" else layout.VALIDATION_STREAMS
    return RunDirectory(config.run_dir).finished(name, "streams")[0]


def _artifact(config: RunConfig, trials: StreamTrials, models: Sequence[ModelSource]) -> Artifact:
    inputs = {f"model_{model.name}": model.fingerprint for model in _asked(trials, models)}
    inputs["streams"] = read_manifest(_streams(config), "streams").fingerprint
    if any(method.kind == "external" for method in (*trials.methods, *trials.ablations)):
        inputs["heads"] = digest([HEAD_VERSION, _learned_from(config)])
    return RunDirectory(config.run_dir).artifact(_name(config), KIND, VERSION, trials, inputs)


def _learned_from(config: RunConfig) -> dict[str, Any]:
    """The settings that retrieval heads depend on."""
    source = _source(config).model_dump(mode="json", exclude=set(LONG_STREAM_SETTINGS))
    return {"source": source, "seed": config.seed}


def _source(config: RunConfig) -> StreamsSource:
    (source,) = [it for it in config.data.sources if isinstance(it, StreamsSource) and it.streams > 0]
    return source


def _asked(trials: StreamTrials, models: Sequence[ModelSource]) -> list[ModelSource]:
    """The models in the order of the configuration, but for a teacher that is of another architecture."""
    by_name = {model.name: model for model in models}
    return [by_name[name] for name in trials.models if name in by_name]


def _heads(config: RunConfig, trials: StreamTrials, models: Sequence[ModelSource]) -> dict[str, Storage]:
    """A finished retrieval head for each model that is asked by external retrieval."""
    source, threads = _source(config), config.resources.threads_per_worker
    heads: dict[str, Storage] = {}
    work: list[Any] = []
    for model in models:
        if all(method.kind != "external" for method in trials.methods_of(model.name)):
            continue
        artifact = RunDirectory(config.run_dir).artifact(
            f"{layout.RETRIEVAL_HEADS}/{model.name}",
            HEAD_KIND,
            HEAD_VERSION,
            _learned_from(config),
            {"model": model.fingerprint},
        )
        heads[model.name] = artifact.storage
        if artifact.finished is None:
            artifact.begin()
            work.append(model_task(_train_head, config.resources).remote(model, source, config.seed, artifact, threads))
    if work:
        say("streams: training the heads of external retrieval")
        ray.get(work)
    return heads


def _train_head(model: ModelSource, source: StreamsSource, seed: int, artifact: Artifact, threads: int) -> None:
    """Runs in a worker."""
    torch.set_num_threads(threads)
    clips = islice(retrieval_clips(source, seed), HEAD_CLIPS)
    train_head(model.load(), clips, seed).save(artifact.storage)
    artifact.commit()


def _answers(
    config: RunConfig, trials: StreamTrials, models: Sequence[ModelSource], heads: Mapping[str, Storage]
) -> list[StreamAnswerRow]:
    streams = sorted(iter_streams(_streams(config)), key=lambda stream: -stream.recipe.frames)
    sit, threads = model_task(_sit, config.resources), config.resources.threads_per_worker
    work: dict[Any, tuple[str, str]] = {}
    for stream in streams:
        for model in models:
            methods = trials.methods_of(model.name)
            work[sit.remote(model, stream, methods, trials, heads.get(model.name), threads)] = model.name, stream.id
    asked = sum(len(stream.questions) for stream in streams)
    bar = progress_bar(
        "asking about streams", total=asked * sum(len(trials.methods_of(it.name)) for it in models), unit="answer"
    )
    parts: dict[tuple[str, str], list[StreamAnswerRow]] = {}
    too_long: set[tuple[str, str, float]] = set()
    lengths = {stream.id: (len(stream.questions), stream.recipe.seconds) for stream in streams}
    while work:
        ready: Any = ray.wait(list(work), num_returns=1)[0][0]
        model_name, stream_id = key = work.pop(ready)
        parts[key], left_out = ray.get(ready)
        too_long |= {(model_name, method, lengths[stream_id][1]) for method in left_out}
        bar.update(len(parts[key]) + len(left_out) * lengths[stream_id][0])
    bar.close()
    for model_name, method, seconds in sorted(too_long):
        say(f"streams of {seconds:g} s are longer than {model_name}'s longest context: not asked by '{method}'")
    return [row for key in sorted(parts) for row in parts[key]]


def _sit(
    source: ModelSource,
    stream: QuestionedStream,
    methods: Sequence[StreamMethod],
    trials: StreamTrials,
    head: Storage | None,
    threads: int,
) -> tuple[list[StreamAnswerRow], list[str]]:
    """Runs in a worker: one model, one stream."""
    torch.set_num_threads(threads)
    model = source.load()
    embedder = None if head is None else HeadEmbedder(model, RetrievalHead.load(head))
    exam = StreamExam(model, trials.window_tokens, trials.max_answer_tokens, embedder)
    return exam.sit(source.name, stream, methods)
