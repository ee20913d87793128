"""What every pipeline does with the cluster: connect, ask for what a stage needs before it waits for it, start a task.

The first two are done by `actors.runtime`, shared with serving. Nothing here knows what the resources are used for.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

import ray
from ray.data import DataContext

from actors import runtime
from sparsight.config import ResourcesConfig


def connect(resources: ResourcesConfig) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine; once connected, do nothing.

    Raises `SparsightError` if the named cluster cannot be reached.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default; without it, it warns
    runtime.connect(resources.num_cpus)
    _set_up_data()


def require(cpus: float, gpus: float = 0.0, timeout_s: float = 300.0, what: str = "this stage") -> None:
    """Wait until the cluster as a whole has so many CPUs and GPUs.

    Raises `SparsightError` naming what is missing after `timeout_s`.
    """
    runtime.require(cpus, gpus, timeout_s, what, "raise resources.num_cpus, or ask for less under `resources`")


def model_task(function: Callable[..., object], resources: ResourcesConfig) -> Any:
    """A Ray task with what one model's work takes."""
    return ray.remote(function).options(num_cpus=resources.threads_per_worker, num_gpus=resources.label_gpus)


def _set_up_data() -> None:
    """The pipelines show their own progress, Ray Data's bars and plans would drown it; and Parquet is read by tasks.

    The newer Parquet source starts 16 actors to read footers, whatever the machine: on two cores that takes longer
    than all that is read.
    """
    context = DataContext.get_current()
    context.use_datasource_v2 = False
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it would warn that its bars are off
