"""Labelling: every sample of the student's set goes through the teacher once, on Ray Data, and becomes a signal.

Samples are read from Parquet, rows that an earlier attempt finished are dropped, an actor pool of `TeacherWorker`s
labels the rest, tasks write part files. The manifest comes last, after every input row is accounted for. What a
teacher computes is in `sparsight.teacher`. Run as `python -m pipelines.label --config FILE`.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy, Dataset

from actors.teacher_worker import TeacherWorker
from pipelines import runtime
from pipelines.command import run_command
from pipelines.signal_sink import SignalStore, write_rows
from sparsight import layout
from sparsight.artifacts import Artifact, RunDirectory
from sparsight.config import HuggingFaceTeacherConfig, RunConfig
from sparsight.data.samples import sample_files
from sparsight.errors import DataError
from sparsight.observe import progress_bar, say
from sparsight.records import SIGNALS_VERSION
from sparsight.storage import Storage
from sparsight.teacher.load import TeacherSource, identify
from sparsight.teacher.protocol import SignalSettings, TeacherIdentity

KIND = "signals"

BATCHES_PER_CALL = 4
"""A worker gets this many batches at a time, so that it can forward rows of similar length together."""
_TASK_CPUS = 0.5
"""Of a reading or writing task: they mostly wait."""


def label(config: RunConfig) -> None:
    """Write the run's signals artefact; a finished one is left alone, a begun one continued.

    Raises `ArtifactError` where samples or teacher are not there, or the rows do not add up; `DataError` where two
    samples share an id; `SparsightError` where the cluster lacks what the workers ask for.
    """
    run = RunDirectory(config.run_dir)
    samples, samples_manifest = run.finished(layout.STUDENT_SAMPLES, "samples")
    source = teacher_source(config, run)
    identity = identify(source)
    settings = signal_settings(config)
    inputs = {"samples": samples_manifest.fingerprint, "teacher": identity.fingerprint}
    artifact = run.artifact(layout.SIGNALS, KIND, SIGNALS_VERSION, settings.content, inputs)
    if artifact.finished:
        say("label: nothing to do, the signals are there")
        return
    artifact.begin()
    store = SignalStore(artifact.storage)
    store.find()
    wanted = _wanted(samples)
    done = set(store.ids)
    started_s = time.monotonic()
    todo = sum(asks and row not in done for row, asks in wanted.items())
    if todo:
        runtime.connect(config.resources)
        workers = config.resources.label_workers
        cpus = workers * config.resources.threads_per_worker + 2 * _TASK_CPUS
        gpus = workers * config.resources.label_gpus
        runtime.require(cpus, gpus, config.resources.start_timeout_s, "labelling")
        _run(config, plan(config, samples, wanted, done, source, identity, artifact.storage), store, todo, len(done))
    _finish(artifact, store, wanted, identity, settings, todo, time.monotonic() - started_s)


def teacher_source(config: RunConfig, run: RunDirectory) -> TeacherSource:
    """The run's own teacher, which must be finished, or the Hugging Face directory that the config names."""
    if isinstance(config.teacher, HuggingFaceTeacherConfig):
        return TeacherSource.hugging_face(config.teacher)
    storage, _ = run.finished(layout.TEACHER, "model")
    return TeacherSource("tiny", storage.child(layout.MODEL).uri)


def signal_settings(config: RunConfig) -> SignalSettings:
    return SignalSettings(config.label, config.seed, config.data.max_picture_bytes, config.data.max_picture_pixels)


def plan(
    config: RunConfig,
    samples: Storage,
    wanted: dict[str, bool],
    done: set[str],
    source: TeacherSource,
    identity: TeacherIdentity,
    target: Storage,
) -> Dataset:
    """The Ray Data pipeline: read, drop what is done or asks nothing, label, write. Its rows are `write_rows`'."""
    resources = config.resources
    filesystem, _ = samples.arrow()
    files = [samples.arrow(key)[1] for key in sample_files(samples)]
    call_rows = config.label.batch_samples * BATCHES_PER_CALL
    rows = ray.data.read_parquet(files, filesystem=filesystem, num_cpus=_TASK_CPUS)
    dropped = sorted(done.union(row for row, asks in wanted.items() if not asks))
    calls = -(-(len(wanted) - len(dropped)) // call_rows)
    if dropped:
        rows = rows.map_batches(
            _without,  # pyright: ignore[reportArgumentType]  # the stub does not know of fn_kwargs
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={"dropped": ray.put(pa.array(dropped, pa.string()))},
            num_cpus=_TASK_CPUS,
        )
    labelled = rows.repartition(target_num_rows_per_block=call_rows).map_batches(
        TeacherWorker,
        batch_size=call_rows,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=min(resources.label_workers, calls)),
        fn_constructor_kwargs={
            "source": source,
            "identity": identity,
            "settings": signal_settings(config),
            "threads": resources.threads_per_worker,
            "gpu": resources.label_gpus > 0,
        },
        num_cpus=resources.threads_per_worker,
        num_gpus=resources.label_gpus or None,
    )
    return labelled.map_batches(
        write_rows,  # pyright: ignore[reportArgumentType]  # the stub does not know of fn_kwargs
        batch_size=config.label.rows_per_file,
        batch_format="pyarrow",
        fn_kwargs={"uri": target.uri},
        num_cpus=_TASK_CPUS,
    )


def _run(config: RunConfig, rows: Dataset, store: SignalStore, todo: int, done: int) -> None:
    """Pull the pipeline; every file that is reported counts from then on."""
    with progress_bar("label", total=done + todo, initial=done) as bar:
        for written in rows.iter_rows():
            store.add(written["files"])
            bar.update(int(written["rows"]))


def _without(rows: pa.Table, dropped: Any) -> pa.Table:
    values = ray.get(dropped) if isinstance(dropped, ray.ObjectRef) else dropped
    return rows.filter(~pc.field("id").isin(values))


def _wanted(samples: Storage) -> dict[str, bool]:
    """Every sample's id, and whether it asks anything. Raises `DataError` where an id comes twice."""
    wanted: dict[str, bool] = {}
    for key in sample_files(samples):
        filesystem, path = samples.arrow(key)
        table = pq.read_table(path, filesystem=filesystem, columns=["id", "answer_types"])
        turns = table["answer_types"].combine_chunks().value_lengths().to_pylist()
        for row, asked in zip(table["id"].to_pylist(), turns, strict=True):
            if row in wanted:
                raise DataError(f"'{samples.uri}/{key}': the id '{row}' comes twice: prepare the samples again")
            wanted[row] = bool(asked)
    return wanted


def _finish(
    artifact: Artifact,
    store: SignalStore,
    wanted: dict[str, bool],
    identity: TeacherIdentity,
    settings: SignalSettings,
    todo: int,
    elapsed_s: float,
) -> None:
    """Check that every row is accounted for, then write the manifest."""
    store.drop_strays()
    counts = store.counts(wanted)
    store.gather_quarantine()
    figures = {
        "signal_bytes_per_token": store.signal_bytes / max(1, counts["response_tokens"]),
        "rows_per_s": todo / max(elapsed_s, 1e-9),
    }
    details = {
        "teacher_fingerprint": identity.model,
        "prompt_fingerprint": identity.prompt,
        "tokenizer_fingerprint": identity.tokenizer,
        "vocabulary": identity.vocabulary,
        "head": settings.label.head,
        "tail_samples": settings.label.tail_samples,
    }
    artifact.commit(counts, figures, details)
    say(
        f"label: {counts['labelled']} labelled, {counts['quarantined']} quarantined, {counts['skipped']} skipped; "
        f"{figures['signal_bytes_per_token']:.1f} bytes a token, {figures['rows_per_s']:.1f} rows/s"
    )


def _plan_lines(config: RunConfig) -> list[str]:
    workers = config.resources.label_workers
    return [
        f"label '{layout.STUDENT_SAMPLES}' with the {config.teacher.kind} teacher on {workers} workers "
        f"into '{layout.SIGNALS}'"
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("Label the student's samples with the teacher.", label, argv, _plan_lines)


if __name__ == "__main__":
    sys.exit(main())
