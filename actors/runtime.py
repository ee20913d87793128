"""The one place where a process joins a Ray cluster, or starts one for itself.

`RAY_ADDRESS` (set by `ray job submit`) names the cluster to join; without it a private one is started here and ends
with the process. Called by the entry points of `pipelines` and `serve_apps`, never by a library.
"""

import logging
import os

import ray

from sparsight.errors import SparsightError


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
