"""One pass of an actor pool over samples, on Ray Data, that may be killed anywhere and goes on where it was.

Samples are read from Parquet, rows that an earlier attempt finished are dropped, a pool of workers takes the rest,
tasks write part files. Labelling and pair making say what the worker is and which rows are wanted; both then check the
sum and write the manifest. Nothing here knows what the rows mean.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy, Dataset

from pipelines import runtime
from pipelines.row_sink import RowStore, write_rows
from sparsight.config import ResourcesConfig
from sparsight.data.samples import sample_files
from sparsight.observe import progress_bar
from sparsight.storage import Storage

BATCHES_PER_CALL = 4
"""A worker gets this many batches at a time, so that it can forward rows of similar length together."""
_TASK_CPUS = 0.5
"""Of a reading or writing task: they mostly wait."""


@dataclass(frozen=True)
class RowJob:
    """What is done to which rows. The worker is a class that is built with `settings` and called with tables.

    `split` turns a table of samples into the rows to work on, where these are not the samples themselves.
    """

    name: str
    samples: Storage
    worker: Any
    settings: Mapping[str, Any]
    batch_rows: int
    rows_per_file: int
    split: Callable[[pa.Table], pa.Table] | None = None

    @property
    def call_rows(self) -> int:
        return self.batch_rows * BATCHES_PER_CALL


class Pass(NamedTuple):
    """What a run of a job came to: rows that were not there before, and the time they took."""

    rows: int
    elapsed_s: float

    @property
    def rows_per_s(self) -> float:
        return self.rows / max(self.elapsed_s, 1e-9)


def run_job(job: RowJob, resources: ResourcesConfig, store: RowStore, wanted: Mapping[str, bool]) -> Pass:
    """Make all rows that are not in the store yet. `wanted` says of every row's id whether it is to be worked on.

    Raises `SparsightError` where the cluster lacks what the workers ask for.
    """
    done = set(store.ids)
    started_s = time.monotonic()
    todo = sum(asks and row not in done for row, asks in wanted.items())
    if todo:
        runtime.connect(resources)
        cpus = resources.label_workers * resources.threads_per_worker + 2 * _TASK_CPUS
        gpus = resources.label_workers * resources.label_gpus
        runtime.require(cpus, gpus, resources.start_timeout_s, job.name)
        with progress_bar(job.name, total=len(done) + todo, initial=len(done)) as bar:
            for written in plan(job, resources, store, wanted, done).iter_rows():
                store.add(written["files"])  # every file that is reported counts from then on
                bar.update(int(written["rows"]))
    return Pass(todo, time.monotonic() - started_s)


def plan(
    job: RowJob, resources: ResourcesConfig, store: RowStore, wanted: Mapping[str, bool], done: set[str]
) -> Dataset:
    """The Ray Data pipeline: read, drop what is done or not wanted, work, write. Its rows are `write_rows`'."""
    filesystem, _ = job.samples.arrow()
    files = [job.samples.arrow(key)[1] for key in sample_files(job.samples)]
    rows = ray.data.read_parquet(files, filesystem=filesystem, num_cpus=_TASK_CPUS)
    if job.split is not None:
        rows = rows.map_batches(job.split, batch_size=job.batch_rows, batch_format="pyarrow", num_cpus=_TASK_CPUS)
    dropped = sorted(row for row, asks in wanted.items() if not asks or row in done)
    calls = -(-(len(wanted) - len(dropped)) // job.call_rows)
    if dropped:
        rows = rows.map_batches(
            _without,  # pyright: ignore[reportArgumentType]  # the stub does not know of fn_kwargs
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={"dropped": ray.put(pa.array(dropped, pa.string()))},
            num_cpus=_TASK_CPUS,
        )
    results = rows.repartition(target_num_rows_per_block=job.call_rows).map_batches(
        job.worker,
        batch_size=job.call_rows,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=min(resources.label_workers, calls)),
        fn_constructor_kwargs=dict(job.settings),
        num_cpus=resources.threads_per_worker,
        num_gpus=resources.label_gpus or None,
    )
    return results.map_batches(
        write_rows,  # pyright: ignore[reportArgumentType]  # the stub does not know of fn_kwargs
        batch_size=job.rows_per_file,
        batch_format="pyarrow",
        fn_kwargs={"uri": store.storage.uri, "kinds": store.kinds},
        num_cpus=_TASK_CPUS,
    )


def _without(rows: pa.Table, dropped: Any) -> pa.Table:
    values = ray.get(dropped) if isinstance(dropped, ray.ObjectRef) else dropped
    return rows.filter(~pc.field("id").isin(values))
