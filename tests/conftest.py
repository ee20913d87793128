"""What every test may use: a small Ray cluster for a module. Fixtures of one folder live in that folder's conftest."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster of four logical CPUs in this process, shut down after the module."""
    import ray  # most tests need no cluster and should not wait for this import

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
    from ray._private.worker import _global_node

    assert _global_node is not None
    return [info.process for group in _global_node.all_processes.values() for info in group]
