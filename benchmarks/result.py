"""The one form of a benchmark's result: `{"figures": …, "machine": …, "revision": …}` in a JSON file."""

import json
from collections.abc import Mapping
from pathlib import Path

from sparsight.artifacts import code_revision
from sparsight.evaluate.machine import describe_machine


def write_result(path: Path, figures: Mapping[str, float]) -> None:
    """Write a benchmark's figures with the machine and the code that they were measured on, and print them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"figures": dict(figures), "machine": describe_machine(), "revision": code_revision()}
    text = json.dumps(result, indent=2)
    path.write_text(text + "\n")
    print(text)
