"""What may be imported or called where: light contracts, one `ray.init`, `RunConfig` at the top, declared packages."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "ray")
CODE = ("sparsight", "actors", "pipelines", "serve_apps", "examples", "benchmarks")


def loaded_by(module: str, names: tuple[str, ...], root: Path) -> list[str]:
    """Which of these packages a fresh interpreter has loaded after importing a module."""
    program = f"import sys, {module}; print([name for name in {names!r} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    return list(ast.literal_eval(answer.stdout))


@pytest.mark.parametrize("module", ["config", "records", "errors"])
def test_contracts_are_light(module: str, repository: Path) -> None:
    assert loaded_by(f"sparsight.{module}", HEAVY, repository) == []


def test_a_heavy_import_is_seen(tree: Callable[[dict[str, str]], Path]) -> None:
    root = tree({"torch.py": "", "sparsight/config.py": "import torch\n"})
    assert loaded_by("sparsight.config", HEAVY, root) == ["torch"]


def code_files(root: Path) -> Iterator[Path]:
    for folder in CODE:
        yield from sorted((root / folder).rglob("*.py"))


def cluster_starts(root: Path) -> list[str]:
    """Files that call `ray.init`, one entry a call; tests may start clusters of their own."""
    calls = (
        (path, node)
        for path in code_files(root)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    )
    return [path.relative_to(root).as_posix() for path, node in calls if ast.unparse(node.func) == "ray.init"]


def test_ray_starts_in_one_place(repository: Path) -> None:
    assert set(cluster_starts(repository)) == {"actors/runtime.py"}


def test_a_second_start_is_seen(tree: Callable[[dict[str, str]], Path]) -> None:
    source = "import ray\n\ndef connect():\n    ray.init(num_cpus=1)\n"
    root = tree({"actors/runtime.py": source, "serve_apps/app.py": source})
    assert cluster_starts(root) == ["actors/runtime.py", "serve_apps/app.py"]


def names_run_config(path: Path) -> bool:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name) and node.id == "RunConfig":
            return True
        if isinstance(node, ast.Attribute) and node.attr == "RunConfig":
            return True
        if isinstance(node, ast.alias) and node.name == "RunConfig":
            return True
    return False


def whole_config_users(root: Path) -> list[str]:
    """Files below the entry points that name the whole configuration instead of their slice."""
    allowed = ("sparsight/config.py", "serve_apps/app.py")
    names = [path.relative_to(root).as_posix() for path in code_files(root) if names_run_config(path)]
    return [
        name
        for name in names
        if name not in allowed and not name.startswith(("pipelines/", "examples/", "benchmarks/"))
    ]


def test_only_entry_points_see_the_whole_config(repository: Path) -> None:
    assert whole_config_users(repository) == []


def test_a_component_with_the_whole_config_is_seen(tree: Callable[[dict[str, str]], Path]) -> None:
    source = "from sparsight.config import RunConfig\n"
    root = tree({"sparsight/kv/bank.py": source, "pipelines/run.py": source, "actors/worker.py": '"""RunConfig"""\n'})
    assert whole_config_users(root) == ["sparsight/kv/bank.py"]


def undeclared_packages(root: Path, declared: set[str]) -> list[str]:
    """Third-party packages that the code imports without pyproject.toml naming the distribution they come from."""
    owners = importlib.metadata.packages_distributions()
    local = {path.name for path in root.iterdir() if path.is_dir()}
    problems: set[str] = set()
    for path in code_files(root):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            else:
                continue
            for package in {name.split(".")[0] for name in names} - local - sys.stdlib_module_names:
                if not {normal(owner) for owner in owners.get(package, [package])} & declared:
                    problems.add(f"{path.relative_to(root).as_posix()} imports {package}")
    return sorted(problems)


def normal(requirement: str) -> str:
    """The distribution's name in a requirement, in the spelling that packaging compares by."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement)[0]).lower()


def test_imported_packages_are_declared(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    assert undeclared_packages(repository, {normal(item) for group in groups for item in group}) == []


def test_an_undeclared_package_is_seen(tree: Callable[[dict[str, str]], Path]) -> None:
    root = tree({"sparsight/tables.py": "import os\nimport pandas as pd\nimport numpy\nimport sparsight.errors\n"})
    assert undeclared_packages(root, {"numpy"}) == ["sparsight/tables.py imports pandas"]
