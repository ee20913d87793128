"""One teacher in one process: built once, then called by Ray Data with tables of samples.

A shell: everything that labels is in `sparsight.teacher`. Made by `pipelines.label` as the class of an actor pool.
"""

import pyarrow as pa
import torch

from sparsight.data.signals import labelled_table
from sparsight.records import Sample
from sparsight.teacher.load import TeacherSource, load_teacher
from sparsight.teacher.protocol import SignalSettings, TeacherIdentity


class TeacherWorker:
    """Samples in (SAMPLE_SCHEMA), signals and quarantined rows out (LABELLED_SCHEMA)."""

    def __init__(
        self, source: TeacherSource, identity: TeacherIdentity, settings: SignalSettings, threads: int, gpu: bool
    ) -> None:
        torch.set_num_threads(threads)
        self._teacher = load_teacher(source, identity, settings, "cuda" if gpu else "cpu")

    def __call__(self, rows: pa.Table) -> pa.Table:
        return labelled_table(self._teacher.label([Sample.from_row(row) for row in rows.to_pylist()]))
