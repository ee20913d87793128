"""The one place where a process joins a Ray cluster, or starts one for itself.

`RAY_ADDRESS` (set by `ray job submit`) names the cluster to join; without it a private one is started here and ends
with the process. Called by the entry points of `pipelines` and `serve_apps`, never by a library.
"""

import os

import ray


def connect(num_cpus: int | None = None) -> None:
    """Join the cluster in `RAY_ADDRESS`, or start one of `num_cpus` logical CPUs (the machine's, at least 4).

    A process that is already connected stays as it is. `num_cpus` is ignored on a cluster that exists.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=True)
        return
    ray.init(address="local", num_cpus=num_cpus or max(4, os.cpu_count() or 1), include_dashboard=False)
