"""The models of pair making in one process: built once, then called by Ray Data with tables of questions.

A shell: everything that draws, judges and scores is in `sparsight.teacher`. Made by `pipelines.pairs` as the class of
an actor pool.
"""

import pyarrow as pa
import torch

from sparsight.data.pairs import judged_table
from sparsight.records import Sample
from sparsight.teacher.pair_maker import PairSettings
from sparsight.teacher.pair_models import PairModels, load_pair_maker


class PairWorker:
    """Samples in (SAMPLE_SCHEMA, one question each, or two answers to one), pairs and rows without one out
    (JUDGED_SCHEMA)."""

    def __init__(self, models: PairModels, settings: PairSettings, threads: int, gpu: bool) -> None:
        torch.set_num_threads(threads)
        self._maker = load_pair_maker(models, settings, "cuda" if gpu else "cpu")
        self._ready_made = models.student is None

    def __call__(self, rows: pa.Table) -> pa.Table:
        samples = [Sample.from_row(row) for row in rows.to_pylist()]
        work = self._maker.score_given if self._ready_made else self._maker.make
        return judged_table(work(samples))
