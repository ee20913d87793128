"""The wheel holds the library only, and every version of what it needs is written down exactly once."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

from setuptools import find_packages


def pins(root: Path) -> tuple[list[str], list[str]]:
    """The requirement lines of pyproject.toml (extras included) and of constraints.txt."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project.get("optional-dependencies", {}).values()]
    lines = [line.strip() for line in (root / "constraints.txt").read_text().splitlines()]
    return [item for group in groups for item in group], [line for line in lines if line and not line.startswith("#")]


def pin_problems(root: Path) -> list[str]:
    """Requirements without one exact public version, and packages that are pinned in two places."""
    direct, rest = pins(root)
    exact = re.compile(r"^[A-Za-z0-9._-]+(\[[a-z0-9,-]+\])?==[0-9][0-9a-z.]*$")
    problems = [f"'{line}' is not an exact public version" for line in [*direct, *rest] if not exact.match(line)]
    named = {re.split(r"[\[=]", line)[0].lower() for line in direct}
    again = [line for line in rest if re.split("=", line)[0].lower() in named]
    return [*problems, *(f"'{line}' is pinned in pyproject.toml already" for line in again)]


def packaged(root: Path) -> set[str]:
    """The top-level packages that setuptools puts into the wheel."""
    find = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    return {name.split(".")[0] for name in find_packages(str(root), include=find["include"])}


def unpackaged(root: Path) -> list[str]:
    """Folders of the library with code but without `__init__.py`: setuptools would leave them out of the wheel."""
    folders = {path.parent for path in (root / "sparsight").rglob("*.py")}
    return sorted(folder.relative_to(root).as_posix() for folder in folders if not (folder / "__init__.py").exists())


def test_versions_are_exact(repository: Path) -> None:
    assert pin_problems(repository) == []


def test_wheel_holds_the_library_only(repository: Path) -> None:
    assert packaged(repository) == {"sparsight"}
    assert unpackaged(repository) == []


def test_loose_versions_are_seen(tree: Callable[[dict[str, str]], Path]) -> None:
    project = '[project]\ndependencies = ["ray[data]==2.60.0", "numpy>=2"]\n'
    root = tree(
        {"pyproject.toml": project, "constraints.txt": "# rest\ntorch==2.13.0+cpu\nray==2.60.0\nattrs==26.1.0\n"}
    )
    assert [line.split("'")[1] for line in pin_problems(root)] == ["numpy>=2", "torch==2.13.0+cpu", "ray==2.60.0"]


def test_a_greedy_wheel_is_seen(tree: Callable[[dict[str, str]], Path]) -> None:
    project = '[tool.setuptools.packages.find]\ninclude = ["*"]\n'
    files = {"sparsight/__init__.py": "", "sparsight/kv/bank.py": "", "tests/__init__.py": ""}
    root = tree({"pyproject.toml": project, **files})
    assert packaged(root) == {"sparsight", "tests"}
    assert unpackaged(root) == ["sparsight/kv"]
