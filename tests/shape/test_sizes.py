"""One idea a file: sizes, opening docstrings and names that say something."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

CODE = ("sparsight", "actors", "pipelines", "serve_apps", "examples", "benchmarks", "tests", "docs")
FILE_LINES = 400
FUNCTION_LINES = 60
VAGUE_FILE = re.compile(r"^(utils?|common|base|core|misc|managers?|helpers?)$|(_utils?|_helpers?|_manager|_v\d+)$")
VAGUE_CLASS = re.compile(r"^(Base|Abstract)[A-Z]|(Manager|Helper|Utils?|V\d)$")


def python_files(root: Path) -> Iterator[tuple[str, Path]]:
    for folder in CODE:
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root).as_posix(), path


def long_pieces(root: Path) -> list[str]:
    """Files and functions (from `def` to the last line) over the limits."""
    problems: list[str] = []
    for name, path in python_files(root):
        source = path.read_text()
        lines = len(source.splitlines())
        if lines > FILE_LINES:
            problems.append(f"{name}: {lines} lines, at most {FILE_LINES}")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    problems.append(f"{name}: {node.name} has {length} lines, at most {FUNCTION_LINES}")
    return problems


def silent_files(root: Path) -> list[str]:
    """Modules that do not open with a docstring."""
    return [name for name, path in python_files(root) if not ast.get_docstring(ast.parse(path.read_text()))]


def vague_names(root: Path) -> list[str]:
    """Files, folders and classes whose names do not say what they are."""
    problems: set[str] = set()
    for name, path in python_files(root):
        stems = [*Path(name).parts[:-1], path.stem]
        problems.update(f"{name}: '{stem}'" for stem in stems if VAGUE_FILE.search(stem))
        classes = [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
        problems.update(f"{name}: class '{known}'" for known in classes if VAGUE_CLASS.search(known))
    return sorted(problems)


def test_files_and_functions_are_short(repository: Path) -> None:
    assert long_pieces(repository) == []


def test_every_file_opens_with_its_idea(repository: Path) -> None:
    assert silent_files(repository) == []


def test_names_say_something(repository: Path) -> None:
    assert vague_names(repository) == []


def test_long_pieces_are_seen(tree: Callable[[dict[str, str]], Path]) -> None:
    root = tree(
        {
            "sparsight/right.py": "def f():\n" + "    x = 1\n" * 59,
            "sparsight/wrong.py": "class A:\n    @staticmethod\n    async def g():\n" + "        x = 1\n" * 60,
            "actors/long.py": "x = 1\n" * 401,
        }
    )
    assert long_pieces(root) == [
        "sparsight/wrong.py: g has 61 lines, at most 60",
        "actors/long.py: 401 lines, at most 400",
    ]


def test_a_silent_file_is_seen(tree: Callable[[dict[str, str]], Path]) -> None:
    root = tree(
        {"sparsight/a.py": '"""Says."""\n', "sparsight/b.py": "# says nothing\nx = 1\n", "actors/__init__.py": ""}
    )
    assert silent_files(root) == ["sparsight/b.py", "actors/__init__.py"]


def test_vague_names_are_seen(tree: Callable[[dict[str, str]], Path]) -> None:
    root = tree(
        {
            "sparsight/utils/text.py": "",
            "sparsight/loader_v2.py": "",
            "sparsight/bank.py": "class BankManager: ...\n\nclass BaseBank: ...\n\nclass Based: ...\n",
        }
    )
    assert vague_names(root) == [
        "sparsight/bank.py: class 'BankManager'",
        "sparsight/bank.py: class 'BaseBank'",
        "sparsight/loader_v2.py: 'loader_v2'",
        "sparsight/utils/text.py: 'utils'",
    ]
