"""The one place where a process joins a Ray cluster, or starts one for itself, and asks whether it is large enough.

`RAY_ADDRESS` (set by `ray job submit`) names the cluster to join; without it a private one is started here and ends
with the process. Called by the entry points of `pipelines` and `serve_apps`, never by a library.
"""

import logging
import os
import time

import ray

from sparsight.errors import SparsightError

_POLL_S = 0.5


def connect(num_cpus: int | None = None) -> None:
    """Join the cluster in `RAY_ADDRESS`, or start one of `num_cpus` logical CPUs (the machine's, at least 4).

    A process that is already connected stays as it is. `num_cpus` is ignored on a cluster that exists.
    Raises `SparsightError` if no cluster answers at `RAY_ADDRESS`.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise SparsightError(
                f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): start it, or unset RAY_ADDRESS to run here"
            ) from error
        return
    cpus = num_cpus or max(4, os.cpu_count() or 1)
    ray.init(
        address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING
    )


def require(cpus: float, gpus: float, timeout_s: float, what: str, remedy: str) -> None:
    """Wait until the cluster as a whole has so many CPUs and GPUs, whether or not they are in use.

    Raises `SparsightError` naming what is missing after `timeout_s`: a cluster that grows gets that long, a fixed
    one that is too small would otherwise leave the caller waiting for ever. `what` is who asks, `remedy` what to set.
    """
    wanted = {"CPU": cpus, "GPU": gpus}
    deadline_s = time.monotonic() + timeout_s
    while True:
        offered = ray.cluster_resources()
        missing = {name: amount for name, amount in wanted.items() if offered.get(name, 0.0) < amount}
        if not missing:
            return
        left_s = deadline_s - time.monotonic()
        if left_s <= 0.0:
            lacks = " and ".join(
                f"{amount:g} {name} (the cluster has {offered.get(name, 0.0):g})" for name, amount in missing.items()
            )
            raise SparsightError(f"{what} needs {lacks}: add machines, {remedy}")
        time.sleep(min(_POLL_S, left_s))
