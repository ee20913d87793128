"""Labelling: every sample of the student's set goes through the teacher once, on Ray Data, and becomes a signal.

The pass over the samples, which may be killed anywhere, is `row_job`; here is what a row is, and the manifest, which
comes last, after every input row is accounted for. What a teacher computes is in `sparsight.teacher`. Run as
`python -m pipelines.label --config FILE`.
"""

import math
import sys
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from actors.teacher_worker import TeacherWorker
from pipelines.command import run_command
from pipelines.row_job import Pass, RowJob, run_job
from pipelines.row_sink import RowKind, RowStore, Tally
from sparsight import layout
from sparsight.artifacts import Artifact, RunDirectory
from sparsight.config import HuggingFaceTeacherConfig, RunConfig
from sparsight.data.samples import sample_files
from sparsight.data.signals import encode_signals, quarantine_rows, signal_rows
from sparsight.data.visual_signals import SUFFIX, encode_visual, visual_bytes, visual_rows
from sparsight.errors import DataError
from sparsight.model.tower_fingerprint import tower_fingerprint
from sparsight.observe import say
from sparsight.records import SIGNALS_VERSION
from sparsight.storage import Storage
from sparsight.teacher.load import TeacherSource, identify, text_sizes
from sparsight.teacher.protocol import SignalSettings, TeacherIdentity

KIND = "signals"
EXAMPLE_TOKENS = 197
"""Of a picture, where only the model could tell: those of a SigLIP tower at 384 pixels, pooled, and a newline."""


def _tokens(table: pa.Table) -> Tally:
    lengths = table["answer_lengths"].combine_chunks().flatten().to_numpy()
    return {"response_tokens": int(lengths.sum())}


def _visual_tokens(table: pa.Table) -> Tally:
    return {"visual_tokens": int(table["visual_tokens"].to_numpy().sum())}


SIGNALS = RowKind("part-", signal_rows, encode_signals, ("answer_lengths",), _tokens)
VISUAL = RowKind(
    "visual-", visual_rows, encode_visual, ("visual_tokens",), _visual_tokens, suffix=SUFFIX, half_of=SIGNALS.prefix
)
REFUSED = RowKind("quarantine-", quarantine_rows)


def label(config: RunConfig) -> None:
    """Write the run's signals artefact; a finished one is left alone, a begun one continued.

    Raises `ArtifactError` where samples or teacher are not there, or the rows do not add up; `DataError` where two
    samples share an id; `SparsightError` where the cluster lacks what the workers ask for.
    """
    run = RunDirectory(config.run_dir)
    samples, samples_manifest = run.finished(layout.STUDENT_SAMPLES, "samples")
    settings = signal_settings(config)
    source = teacher_source(config, run).asked_about(settings.visual)
    identity = identify(source)
    details = {"tower_fingerprint": tower_fingerprint(source.directory())} if any(settings.visual) else {}
    inputs = {"samples": samples_manifest.fingerprint, "teacher": identity.fingerprint}
    artifact = run.artifact(layout.SIGNALS, KIND, SIGNALS_VERSION, settings.content, inputs)
    if artifact.finished:
        say("label: nothing to do, the signals are there")
        return
    artifact.begin()
    kinds = [VISUAL, SIGNALS, REFUSED] if any(settings.visual) else [SIGNALS, REFUSED]
    store = RowStore(artifact.storage, kinds, "label")
    store.find()
    wanted = _wanted(samples)
    job = RowJob(
        name="label",
        samples=samples,
        worker=TeacherWorker,
        settings={
            "source": source,
            "identity": identity,
            "settings": settings,
            "threads": config.resources.threads_per_worker,
            "gpu": config.resources.label_gpus > 0,
        },
        batch_rows=config.label.batch_samples,
        rows_per_file=config.label.rows_per_file,
    )
    done = run_job(job, config.resources, store, wanted)
    _finish(artifact, store, wanted, identity, settings, done, details)


def teacher_source(config: RunConfig, run: RunDirectory) -> TeacherSource:
    """The run's own teacher, which must be finished, or the Hugging Face directory that the config names."""
    if isinstance(config.teacher, HuggingFaceTeacherConfig):
        return TeacherSource.hugging_face(config.teacher)
    storage, _ = run.finished(layout.TEACHER, "model")
    return TeacherSource("tiny", storage.child(layout.MODEL).uri)


def signal_settings(config: RunConfig) -> SignalSettings:
    limits = (config.data.max_picture_bytes, config.data.max_picture_pixels)
    return SignalSettings(config.label, config.seed, *limits, config.visual_ask)


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
    store: RowStore,
    wanted: dict[str, bool],
    identity: TeacherIdentity,
    settings: SignalSettings,
    done: Pass,
    visual_details: Mapping[str, str],
) -> None:
    """Check that every row is accounted for, then write the manifest."""
    store.drop_strays()
    asked = [row for row, asks in wanted.items() if asks]
    store.check(asked)
    tokens = store.tally(SIGNALS)["response_tokens"]
    counts = {
        "input": len(wanted),
        "labelled": store.rows(SIGNALS),
        "quarantined": store.rows(REFUSED),
        "skipped": len(wanted) - len(asked),
        "response_tokens": tokens,
    }
    store.gather_quarantine(REFUSED)
    figures = {
        "signal_bytes_per_token": store.size_bytes(SIGNALS) / max(1, tokens),
        "rows_per_s": done.rows_per_s,
    }
    if VISUAL in store.kinds:
        counts["visual_tokens"] = store.tally(VISUAL)["visual_tokens"]
        figures["visual_bytes_per_sample"] = store.size_bytes(VISUAL) / max(1, store.rows(VISUAL))
    details = {
        "teacher_fingerprint": identity.model,
        "prompt_fingerprint": identity.prompt,
        "tokenizer_fingerprint": identity.tokenizer,
        "vocabulary": identity.vocabulary,
        "head": settings.label.head,
        "tail_samples": settings.label.tail_samples,
        "visual": [name for name, wanted in settings.visual._asdict().items() if wanted],
        **visual_details,
    }
    artifact.commit(counts, figures, details)
    say(
        f"label: {counts['labelled']} labelled, {counts['quarantined']} quarantined, {counts['skipped']} skipped; "
        f"{figures['signal_bytes_per_token']:.1f} bytes a token, {figures['rows_per_s']:.1f} rows/s"
    )
    if VISUAL in store.kinds:
        say(f"label: {figures['visual_bytes_per_sample']:,.0f} bytes a sample for what is said of its picture")


def _plan_lines(config: RunConfig) -> list[str]:
    workers = config.resources.label_workers
    lines = [
        f"label '{layout.STUDENT_SAMPLES}' with the {config.teacher.kind} teacher on {workers} workers "
        f"into '{layout.SIGNALS}'"
    ]
    settings = signal_settings(config)
    if any(settings.visual):
        asked = ", ".join(name for name, wanted in settings.visual._asdict().items() if wanted)
        lines.append(f"with the {asked} of pictures: {_expected_bytes(config, settings)}")
    return lines


def _expected_bytes(config: RunConfig, settings: SignalSettings) -> str:
    """What one picture's signals will take in the store, from sizes alone."""
    if isinstance(config.teacher, HuggingFaceTeacherConfig):
        source = TeacherSource.hugging_face(config.teacher).asked_about(settings.visual)
        (width, layers), tokens, assumed = text_sizes(source), EXAMPLE_TOKENS, ", if it takes that many tokens"
    else:
        sizes = config.teacher.architecture
        width, layers, assumed = sizes.text_width, sizes.text_layers, ""
        tokens = math.ceil(sizes.picture_pixels // sizes.patch_pixels / 2) ** 2 + 1
    size = visual_bytes(settings.visual, tokens, settings.kept, width, layers)
    return f"{size:,} bytes for a picture of {tokens} tokens{assumed}"


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("Label the student's samples with the teacher.", label, argv, _plan_lines)


if __name__ == "__main__":
    sys.exit(main())
