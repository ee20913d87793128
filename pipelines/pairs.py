"""Preference pairs: a student's and the teacher's answers to questions, judged, on Ray Data.

The pass over the questions, which may be killed anywhere, is `row_job`; here is which questions are asked, what a row
is, and the manifest, which comes last, after every question is accounted for. How a pair is made is in
`sparsight.teacher.pair_maker`. `pipelines.distill` makes a student's pairs when it reaches its stage over pairs; run
as `python -m pipelines.pairs --config FILE` to make those of all students that have come so far.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.pair_worker import PairWorker
from pipelines.command import run_command
from pipelines.import_pairs import held_out_pictures, import_pairs, imported_pairs, refused_pairs
from pipelines.label import teacher_source
from pipelines.row_job import Pass, RowJob, run_job
from pipelines.row_sink import RowKind, RowStore, Tally, encode_table
from sparsight import layout
from sparsight.artifacts import Artifact, Manifest, RunDirectory
from sparsight.config import RunConfig, StudentRun
from sparsight.data.pairs import DROP_REASONS, DROPPED_SCHEMA, dropped_rows, encode_pairs, pair_rows, refused_rows
from sparsight.data.prompts import iter_prompts, prompt_table
from sparsight.data.samples import sample_files
from sparsight.data.split import choose_pictures
from sparsight.errors import ConfigError
from sparsight.observe import say
from sparsight.records import PAIRS_VERSION, Quarantined
from sparsight.storage import Storage
from sparsight.teacher.load import TeacherSource, identify
from sparsight.teacher.pair_maker import PairSettings
from sparsight.teacher.pair_models import PairModels
from sparsight.teacher.protocol import TeacherIdentity, directory_digest

KIND = "pairs"
DROPPED_FILE = "dropped.parquet"


def _unrated(table: pa.Table) -> Tally:
    candidates = table["candidates"].combine_chunks().flatten()
    return {"unrated_candidates": int(np.isnan(candidates.field("score").to_numpy(zero_copy_only=False)).sum())}


def _reasons(table: pa.Table) -> Tally:
    reasons = table["reason"].to_pylist()
    counts = {f"dropped_{reason}": reasons.count(reason) for reason in DROP_REASONS}
    return {**counts, "unrated_candidates": sum(table["unrated"].to_pylist())}


PAIRS = RowKind("part-", pair_rows, encode_pairs, ("candidates",), _unrated)
DROPPED = RowKind("dropped-", dropped_rows, encode_table, ("reason", "unrated"), _reasons)
REFUSED = RowKind("quarantine-", refused_rows)


class ModelArtifact(Protocol):
    """The stage that the student has come to: where its model is, and by what it can be told from another."""

    @property
    def storage(self) -> Storage: ...

    @property
    def fingerprint(self) -> str: ...


def make_pairs(config: RunConfig, student: StudentRun, before: ModelArtifact) -> tuple[Storage, Manifest]:
    """Write the pairs that this student learns from after the stage `before`; finished ones are left alone, begun ones
    continued. Students that go on from one stage share its pairs.

    Raises `ArtifactError` where samples or teacher are not there, or the rows do not add up; `ConfigError` where there
    is nothing to ask; `DataError` where ready-made pairs cannot be read; `SparsightError` where the cluster lacks what
    the workers ask for.
    """
    run = RunDirectory(config.run_dir)
    if config.pairs.import_path is not None:
        import_pairs(run, Path(config.pairs.import_path), config.data)
    identity = identify(teacher_source(config, run))
    artifact = _artifact(config, run, before, identity)
    if artifact.finished is not None:
        say(f"pairs: those of {student.name} are there")
        return artifact.storage, artifact.finished
    samples, _ = run.finished(pictures_of_pairs(config) if _imports(config) else _asked_samples(config))
    wanted = _imported_rows(samples) if _imports(config) else _questions(config, run, samples)
    artifact.begin()
    store = RowStore(artifact.storage, [PAIRS, DROPPED, REFUSED], "pairs")
    store.find()
    resources = config.resources
    job = RowJob(
        name="pairs",
        samples=samples,
        worker=PairWorker,
        settings={
            "models": _models(config, run, before),
            "settings": pair_settings(config),
            "threads": resources.threads_per_worker,
            "gpu": resources.label_gpus > 0,
        },
        batch_rows=config.pairs.batch_prompts,
        rows_per_file=config.pairs.rows_per_file,
        split=None if _imports(config) else prompt_table,
    )
    done = run_job(job, resources, store, wanted)
    refused = refused_pairs(samples) if _imports(config) else []
    return artifact.storage, _finish(config, artifact, store, wanted, refused, identity, done)


def pairs_artifact(config: RunConfig, student: StudentRun, before: ModelArtifact) -> Artifact:
    """The artefact of a student's pairs, `pairs/<student>/<stage>` by the model that answers, made or not yet.

    Raises `ArtifactError` where samples or teacher are not there.
    """
    run = RunDirectory(config.run_dir)
    return _artifact(config, run, before, identify(teacher_source(config, run)))


def _artifact(config: RunConfig, run: RunDirectory, before: ModelArtifact, identity: TeacherIdentity) -> Artifact:
    inputs = {"teacher": identity.fingerprint}
    if config.pairs.import_path is not None:
        inputs["samples"] = imported_pairs(run, Path(config.pairs.import_path), config.data).fingerprint
        return run.artifact(layout.SCORED_IMPORT, KIND, PAIRS_VERSION, {}, inputs)
    inputs["samples"] = run.finished(_asked_samples(config), "samples")[1].fingerprint
    inputs["student"] = before.fingerprint
    if config.pairs.judge_path is not None:
        inputs["judge"] = directory_digest(Path(config.pairs.judge_path))
    content = pair_settings(config).content
    return run.artifact(layout.pairs_after(before.storage.uri), KIND, PAIRS_VERSION, content, inputs)


def pictures_of_pairs(config: RunConfig) -> str:
    """The artefact of samples that holds the pictures of all pairs."""
    if _imports(config):
        return layout.IMPORTED_PAIRS
    return layout.KEPT_SAMPLES if config.pairs.samples == "kept" else layout.STUDENT_SAMPLES


def pair_settings(config: RunConfig) -> PairSettings:
    return PairSettings(config.pairs, config.seed, config.data.max_picture_bytes, config.data.max_picture_pixels)


def _imports(config: RunConfig) -> bool:
    return config.pairs.import_path is not None


def _asked_samples(config: RunConfig) -> str:
    places = {"student": layout.STUDENT_SAMPLES, "teacher": layout.TEACHER_SAMPLES, "kept": layout.KEPT_SAMPLES}
    return places[config.pairs.samples]


def _models(config: RunConfig, run: RunDirectory, before: ModelArtifact) -> PairModels:
    teacher = teacher_source(config, run)
    if _imports(config):
        return PairModels(teacher)
    path = config.pairs.judge_path
    judge = None if path is None else TeacherSource("hugging_face", path, "auto")
    return PairModels(teacher, TeacherSource("tiny", before.storage.child(layout.MODEL).uri), judge)


def _questions(config: RunConfig, run: RunDirectory, samples: Storage) -> dict[str, bool]:
    """Every question's id, and whether it is asked: of a chosen picture, of a wanted type, with an answer if the judge
    needs one, and about no picture that a model is tested on."""
    pairs = config.pairs
    prompts = list(iter_prompts(samples))
    pictures = choose_pictures((prompt.content_hash for prompt in prompts), pairs.share, config.seed, "pairs")
    pictures -= held_out_pictures(run)
    types = frozenset(pairs.answer_types) or {prompt.answer_type for prompt in prompts}
    asked = {
        prompt.id: prompt.content_hash in pictures
        and prompt.answer_type in types
        and (prompt.answered or pairs.judge != "truth")
        for prompt in prompts
    }
    if not any(asked.values()):
        raise ConfigError(
            f"none of {len(asked)} questions in '{samples.uri}' can be asked for pairs: widen pairs.share and "
            "pairs.answer_types, or take another judge than 'truth' where no answers are given"
        )
    return asked


def _imported_rows(samples: Storage) -> dict[str, bool]:
    ids: Iterator[str] = (
        row
        for filesystem, path in map(samples.arrow, sample_files(samples))
        for row in pq.read_table(path, filesystem=filesystem, columns=["id"])["id"].to_pylist()
    )
    return dict.fromkeys(ids, True)


def _finish(
    config: RunConfig,
    artifact: Artifact,
    store: RowStore,
    wanted: dict[str, bool],
    refused: Sequence[Quarantined],
    identity: TeacherIdentity,
    done: Pass,
) -> Manifest:
    """Check that every question is accounted for, then write the manifest; `refused` never reached a worker."""
    store.drop_strays()
    asked = [row for row, asks in wanted.items() if asks]
    store.check(asked)
    dropped = store.tally(DROPPED)
    counts = {
        "input": len(wanted) + len(refused),
        "pairs": store.rows(PAIRS),
        "dropped": store.rows(DROPPED),
        **{f"dropped_{reason}": dropped[f"dropped_{reason}"] for reason in DROP_REASONS},
        "quarantined": store.rows(REFUSED) + len(refused),
        "skipped": len(wanted) - len(asked),
        "unrated_candidates": store.tally(PAIRS)["unrated_candidates"] + dropped["unrated_candidates"],
    }
    table = pa.Table.from_pylist(store.gather(DROPPED), schema=DROPPED_SCHEMA)
    artifact.storage.write_bytes(DROPPED_FILE, encode_table(table))
    store.gather_quarantine(REFUSED, refused)
    details = {
        "judge": "imported" if _imports(config) else config.pairs.judge,
        "samples": pictures_of_pairs(config),
        "teacher_fingerprint": identity.model,
        "prompt_fingerprint": identity.prompt,
        "tokenizer_fingerprint": identity.tokenizer,
        "vocabulary": identity.vocabulary,
    }
    say(
        f"pairs: {counts['pairs']} made, {counts['dropped']} dropped, {counts['quarantined']} quarantined, "
        f"{counts['skipped']} not asked; {done.rows_per_s:.1f} questions/s"
    )
    return artifact.commit(counts, {"rows_per_s": done.rows_per_s}, details)


@dataclass(frozen=True)
class FinishedStage:
    """A stage of a student that is there."""

    storage: Storage
    fingerprint: str


def pairs(config: RunConfig) -> None:
    """Make the pairs of every student with a stage over pairs. Raises `ArtifactError` where the stage before is not
    finished, and as `make_pairs`; `ConfigError` where no student has such a stage."""
    run = RunDirectory(config.run_dir)
    places = _places(config)
    if not places:
        raise ConfigError("no student has a stage with rows: pairs: give one such a stage, or the preset llava_mod")
    for student, before in places:
        storage, manifest = run.finished(before, "model")
        make_pairs(config, student, FinishedStage(storage, manifest.fingerprint))


def _places(config: RunConfig) -> list[tuple[StudentRun, str]]:
    """Every student with a stage over pairs, and the artefact of the stage before it."""
    found: list[tuple[StudentRun, str]] = []
    for student in config.distill.students:
        before = None if student.start is None else layout.student_stage(*student.start.split("/"))
        for stage in student.stages:
            if stage.rows == "pairs" and before is not None:
                found.append((student, before))
            before = layout.student_stage(student.name, stage.name)
    return found


def _plan_lines(config: RunConfig) -> list[str]:
    pairs = config.pairs
    how = f"import '{pairs.import_path}'" if _imports(config) else f"judge '{pairs.judge}' on {_asked_samples(config)}"
    return [f"pairs of {student.name} after '{before}': {how}" for student, before in _places(config)]


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("Make preference pairs for the students.", pairs, argv, _plan_lines)


if __name__ == "__main__":
    sys.exit(main())
