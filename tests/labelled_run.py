"""A run as preparation, teacher and labelling leave it, in a moment: random pictures, model and targets.

Shared by the tests of distillation, on a cluster and without one.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsight.artifacts import RunDirectory
from sparsight.config import RunConfig
from sparsight.data.samples import write_samples
from sparsight.data.signals import encode_signals, labelled_table, signal_rows
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import SAMPLES_VERSION, SIGNALS_VERSION, Sample, TeacherSignal, hash_response
from tests.parity.training_case import SMALL, WORDS, random_targets, samples

ROWS = 24
VOCABULARY = 300


def configuration(run_dir: str, *stages: Mapping[str, Any], **student: Any) -> RunConfig:
    """One student of these stages; `student` are fields of `StudentConfig`."""
    architecture = SMALL.model_dump()
    return RunConfig.model_validate(
        {
            "run_dir": run_dir,
            "data": {"sources": [{"kind": "scenes", "size_pixels": 32}]},
            "teacher": {"kind": "tiny", "architecture": architecture, "stages": [{**stages[0], "upcycle": None}]},
            "student": {"architecture": architecture, **student},
            "distill": {"students": [{"name": "student", "stages": list(stages)}]},
        }
    )


def write_inputs(run_dir: str) -> None:
    """Finished samples, teacher and signals."""
    teacher, rows = write_teacher(run_dir), write_student_samples(run_dir)
    artifact = RunDirectory(run_dir).artifact("signals", "signals", SIGNALS_VERSION, {})
    artifact.begin()
    signals = [signal_of(teacher, row, seed) for seed, row in enumerate(rows)]
    artifact.storage.write_bytes("part-0.parquet", encode_signals(signal_rows(labelled_table(signals))))
    fingerprint = teacher.chat.tokenizer_fingerprint
    artifact.commit(details={"tokenizer_fingerprint": fingerprint, "vocabulary": VOCABULARY, "tail_samples": 3})


def write_student_samples(run_dir: str) -> list[Sample]:
    rows = samples(ROWS)
    artifact = RunDirectory(run_dir).artifact("samples/student", "samples", SAMPLES_VERSION, {})
    artifact.begin()
    write_samples(artifact.storage, rows)
    artifact.commit()
    return rows


def write_teacher(run_dir: str) -> VisionLanguageModel:
    teacher = make_dense(SMALL, make_tokenizer([*WORDS, "what is in the image?"] * 20, VOCABULARY), seed=0)
    artifact = RunDirectory(run_dir).artifact("teacher", "model", 1, {})
    artifact.begin()
    with tempfile.TemporaryDirectory() as folder:
        teacher.save(folder)
        artifact.storage.publish(Path(folder), "model")
    artifact.commit()
    return teacher


def signal_of(teacher: VisionLanguageModel, sample: Sample, seed: int) -> TeacherSignal:
    encoded = teacher.chat.encode(sample.turns, teacher.visual_tokens())
    ids_n = encoded.response_ids_n
    return TeacherSignal(
        id=sample.id,
        content_hash=sample.content_hash,
        response_ids_n=ids_n,
        answer_lengths=tuple(end - start for start, end in encoded.answer_spans),
        answered_by_teacher=(False,) * len(sample.turns),
        label_logprobs_n=np.zeros(len(ids_n), np.float32),
        targets=random_targets(np.random.default_rng(seed), len(ids_n), VOCABULARY),
        visual_tokens=encoded.visual_tokens,
        response_hash=hash_response(ids_n),
    )
