"""The tree under test, and small made-up trees that show that each rule can fail."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

Tree = Callable[[Mapping[str, str]], Path]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout that these tests are part of."""
    return Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Write `{relative path: content}` under a temporary folder and return the folder."""

    def write(files: Mapping[str, str]) -> Path:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path

    return write
