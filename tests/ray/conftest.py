"""The cluster that the tests of this folder share."""

from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray._private import worker


@pytest.fixture(scope="session")
def ray_cluster(s3_server: str) -> Iterator[None]:
    """A local Ray cluster of four logical CPUs in this process, shut down after the last test.

    The S3 server comes first: its workers get the environment of that moment, which leads to the server.
    """
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="warning")
    processes = _processes_of_ray()
    try:
        yield
    finally:
        ray.shutdown()
        for process in processes:
            process.wait(timeout=60)


def _processes_of_ray() -> list[Any]:
    """What `ray.init` has started: it ends them without waiting, and Python warns of a process that it still sees."""
    assert worker._global_node is not None
    return [info.process for group in worker._global_node.all_processes.values() for info in group]
