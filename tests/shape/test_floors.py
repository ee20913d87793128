"""Imports go down only: the floors of the library, the rooms above it, and no rings anywhere.

Imports inside functions and under TYPE_CHECKING count like any other.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

ROOMS = ("sparsight", "actors", "pipelines", "serve_apps", "examples", "benchmarks")

FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "layout"}),
    frozenset({"settings", "presets"}),
    frozenset({"stages", "sources", "trials"}),
    frozenset({"config", "records"}),
    frozenset({"storage", "observe"}),
    frozenset({"artifacts", "media"}),
    frozenset({"data"}),
    frozenset({"model"}),
    frozenset({"evaluate", "teacher", "distill", "kv"}),
)
"""The parts of `sparsight`, lowest first; parts of one floor do not import each other."""

ALLOWED_ROOMS = {
    "sparsight": {"sparsight"},
    "actors": {"actors", "sparsight"},
    "pipelines": {"pipelines", "actors", "sparsight"},
    "serve_apps": {"serve_apps", "actors", "sparsight"},
    "examples": set(ROOMS) - {"benchmarks"},
    "benchmarks": set(ROOMS) - {"examples"},
}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root: Path) -> dict[str, Path]:
    """Every Python module of the rooms by dotted name."""
    found = [path for room in ROOMS for path in sorted((root / room).rglob("*.py"))]
    return {module_name(path, root): path for path in found}


def imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports; `from a import b` gives `a.b`."""
    package = module_name(path, root).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            for alias in node.names:
                yield node.lineno, ".".join([*base, *([node.module] if node.module else []), alias.name])


def floor_of(part: str) -> int | None:
    return next((index for index, floor in enumerate(FLOORS) if part in floor), None)


def floor_violations(root: Path) -> list[str]:
    """Imports inside `sparsight` that do not go down."""
    problems: list[str] = []
    for name, path in modules(root).items():
        if not name.startswith("sparsight."):
            continue
        part = name.split(".")[1]
        own = floor_of(part)
        if own is None:
            problems.append(f"{name}: '{part}' stands on no floor; give it one in FLOORS")
            continue
        for line, target in imports(path, root):
            if not target.startswith("sparsight.") or target.split(".")[1] == part:
                continue
            other = floor_of(target.split(".")[1])
            if other is not None and other >= own:
                problems.append(f"{name}:{line} imports {target}, which is not below it")
    return problems


def room_violations(root: Path) -> list[str]:
    """Imports between rooms that are not allowed, and ray inside the library."""
    problems: list[str] = []
    for name, path in modules(root).items():
        room = name.split(".")[0]
        for line, target in imports(path, root):
            other = target.split(".")[0]
            if other in ROOMS and other not in ALLOWED_ROOMS[room]:
                problems.append(f"{name}:{line} imports {target}, a room it may not know")
            if room == "sparsight" and other == "ray":
                problems.append(f"{name}:{line} imports ray")
    return problems


def rings(root: Path) -> list[str]:
    """Modules that import each other in a ring, one line a ring."""
    known = modules(root)
    edges: dict[str, set[str]] = {}
    for name, path in known.items():
        targets = {longest(target, known) for _, target in imports(path, root)} - {None, name}
        edges[name] = {target for target in targets if target is not None}
    found: list[str] = []
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append(" → ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for target in sorted(edges[name]):
                visit(target, [*trail, name])
            done.add(name)

    for name in sorted(edges):
        visit(name, [])
    return found


def longest(target: str, known: dict[str, Path]) -> str | None:
    """The module that an imported name comes from: `a.b.symbol` → `a.b`."""
    parts = target.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in known), None)


def test_library_imports_go_down(repository: Path) -> None:
    assert floor_violations(repository) == []


def test_rooms_know_only_what_is_below(repository: Path) -> None:
    assert room_violations(repository) == []


def test_no_rings(repository: Path) -> None:
    assert rings(repository) == []


def test_a_climbing_import_is_seen(tree: Callable[[dict[str, str]], Path]) -> None:
    root = tree(
        {
            "sparsight/model/tower.py": "def build():\n    from sparsight.distill import losses\n    return losses\n",
            "sparsight/kv/bank.py": "from ..teacher import topk\n",
            "sparsight/data/samples.py": "from sparsight import media\nfrom sparsight.errors import DataError\n",
            "sparsight/odd.py": "",
        }
    )
    found = floor_violations(root)
    assert [line.split(" ")[0] for line in found] == [
        "sparsight.kv.bank:1",
        "sparsight.model.tower:2",
        "sparsight.odd:",
    ]


def test_a_sideways_import_is_seen(tree: Callable[[dict[str, str]], Path]) -> None:
    root = tree(
        {
            "sparsight/kv/bank.py": "if False:\n    import ray.data\n",
            "actors/bank_actor.py": "from pipelines import runtime\n",
            "serve_apps/app.py": "import pipelines.runtime\nimport actors.bank_actor\n",
            "benchmarks/label.py": "from pipelines import label\n",
        }
    )
    assert sorted(line.split(" ")[0] for line in room_violations(root)) == [
        "actors.bank_actor:1",
        "serve_apps.app:1",
        "sparsight.kv.bank:2",
    ]


def test_a_ring_is_seen(tree: Callable[[dict[str, str]], Path]) -> None:
    root = tree(
        {
            "pipelines/one.py": "from pipelines.two import b\n",
            "pipelines/two.py": "from pipelines import three\n",
            "pipelines/three.py": "def f():\n    from . import one\n    return one\n",
        }
    )
    assert rings(root) == ["pipelines.one → pipelines.two → pipelines.three → pipelines.one"]
