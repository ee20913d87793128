"""What every test may use: a small Ray cluster for a module. Fixtures of one folder live in that folder's conftest."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster of four logical CPUs in this process, shut down after the module."""
    import ray  # most tests need no cluster and should not wait for this import

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="warning")
    try:
        yield
    finally:
        ray.shutdown()
