"""Documents that name things of the tree name what is there: README's tree, the tours, the configuration page."""

import ast
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

ROOMS = ("sparsight", "actors", "pipelines", "serve_apps")
UNLISTED = ("runs", "build", "dist", "__pycache__")


def drawn_tree(readme: str) -> set[str]:
    """The paths of the README's annotated tree: one entry a line, children of a folder two spaces further in."""
    found = re.search(r"<!-- tree -->\s*```\w*\n(.*?)```", readme, re.DOTALL)
    assert found, "README.md has no code block after <!-- tree -->"
    paths: set[str] = set()
    folder = ""
    for line in found.group(1).splitlines():
        if not line.strip():
            continue
        name = line.split()[0].rstrip("/")
        if not line.startswith(" "):
            folder = name
            paths.add(name)
        else:
            paths.add(f"{folder}/{name}")
    return paths


def real_tree(root: Path) -> set[str]:
    """Top-level entries, and what lies directly in the rooms; hidden and generated things left out."""
    tops = [path for path in root.iterdir() if shown(path)]
    inner = [path for room in ROOMS if (root / room).is_dir() for path in (root / room).iterdir() if shown(path)]
    return {path.relative_to(root).as_posix() for path in [*tops, *inner] if path.name != "__init__.py"}


def shown(path: Path) -> bool:
    if path.name.startswith(".") or path.name in UNLISTED or path.suffix == ".egg-info":
        return False
    inside = path.rglob("[!.]*")
    return path.is_file() or any(inner.is_file() and "__pycache__" not in inner.parts for inner in inside)


def tree_differences(root: Path) -> list[str]:
    drawn, real = drawn_tree((root / "README.md").read_text()), real_tree(root)
    missing = [f"{path} is not in README's tree" for path in sorted(real - drawn)]
    return missing + [f"README's tree shows {path}, which is not there" for path in sorted(drawn - real)]


def symbols(path: Path) -> Iterator[str]:
    """Functions, classes, constants, and methods as `Class.method`."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.ClassDef):
            yield node.name
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{node.name}.{inner.name}"
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def dead_references(root: Path) -> list[str]:
    """`file: symbol` references in docs/*.md to files or symbols that do not exist."""
    problems: list[str] = []
    known: dict[Path, set[str]] = {}
    for page in sorted((root / "docs").rglob("*.md")):
        for file, symbol in re.findall(r"`([\w/.]+\.py): ([\w.]+)`", page.read_text()):
            path = root / file
            if not path.is_file():
                problems.append(f"{page.name}: {file} does not exist")
                continue
            if path not in known:
                known[path] = set(symbols(path))
            if symbol not in known[path]:
                problems.append(f"{page.name}: {file} has no {symbol}")
    return problems


def dead_links(root: Path) -> list[str]:
    """Relative links in Markdown pages to files that do not exist."""
    problems: list[str] = []
    for page in [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                problems.append(f"{page.relative_to(root).as_posix()}: {target}")
    return problems


def test_readme_draws_the_tree_that_is_there(repository: Path) -> None:
    assert tree_differences(repository) == []


def test_tours_name_real_symbols(repository: Path) -> None:
    assert dead_references(repository) == []


def test_links_lead_somewhere(repository: Path) -> None:
    assert dead_links(repository) == []


def test_configuration_page_is_current(repository: Path) -> None:
    page = runpy.run_path(str(repository / "docs" / "write_configuration.py"))["render"]()
    assert (repository / "docs" / "configuration.md").read_text() == page, "run: make docs"


def test_a_wrong_tree_is_seen(tree: Callable[[dict[str, str]], Path]) -> None:
    readme = "<!-- tree -->\n```\nsparsight/     what\n  bank.py      blocks\n  gone.py      was here\n```\n"
    root = tree({"README.md": readme, "sparsight/bank.py": "", "sparsight/new.py": "", ".venv/x": ""})
    assert tree_differences(root) == [
        "README.md is not in README's tree",
        "sparsight/new.py is not in README's tree",
        "README's tree shows sparsight/gone.py, which is not there",
    ]


def test_dead_references_are_seen(tree: Callable[[dict[str, str]], Path]) -> None:
    page = "`a.py: f` `a.py: A.g` `a.py: LIMIT` `a.py: A.h` `b.py: f` [x](a.py) [y](c.md#part)"
    code = "LIMIT: int = 1\n\ndef f(): ...\n\nclass A:\n    def g(self): ...\n"
    root = tree({"docs/tour.md": page, "a.py": code, "docs/a.py": ""})
    assert dead_references(root) == ["tour.md: a.py has no A.h", "tour.md: b.py does not exist"]
    assert dead_links(root) == ["docs/tour.md: c.md"]
