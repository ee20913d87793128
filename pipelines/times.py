"""Wall time of each stage, kept in `times.json` of the run directory: the report shows it.

A stage that was skipped keeps the time of the call that made its artefacts; one that was continued after a kill has
the time of the last call.
"""

import json
import time
from collections.abc import Generator
from contextlib import contextmanager

from sparsight.artifacts import MANIFEST, digest
from sparsight.storage import Storage

FILE = "times.json"


@contextmanager
def timed(storage: Storage, stage: str, folders: tuple[str, ...]) -> Generator[None]:
    """Time a stage that writes artefacts under some folders of a run; unchanged artefacts, unchanged time."""
    before, start_s = _state(storage, folders), time.monotonic()
    yield
    after = _state(storage, folders)
    if after != before:
        times = read_times(storage) | {stage: round(time.monotonic() - start_s, 1)}
        storage.write_bytes(FILE, json.dumps(times, indent=2).encode())


def read_times(storage: Storage) -> dict[str, float]:
    """Seconds by stage, in the order in which the stages first ran."""
    return json.loads(storage.read_bytes(FILE)) if storage.exists(FILE) else {}


def _state(storage: Storage, folders: tuple[str, ...]) -> str:
    keys = [key for folder in folders for key in storage.keys(folder) if key.endswith(MANIFEST)]
    return digest([storage.read_bytes(key).decode() for key in keys])
