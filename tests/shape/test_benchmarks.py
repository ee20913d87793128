"""Every benchmark is a program of one form: `--json FILE` writes figures, the machine and the code's revision."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

WORDS = {"--json", "figures", "machine", "revision"}


def programs(root: Path) -> Iterator[Path]:
    for path in sorted((root / "benchmarks").glob("*.py")):
        if any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in parse(path).body):
            yield path


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def words(path: Path, root: Path) -> set[str]:
    """String constants and keyword names of a benchmark, and of the benchmark modules that it imports."""
    found: set[str] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                other = (root / Path(*name.split("."))).with_suffix(".py")
                if name.startswith("benchmarks.") and other.is_file() and other != path:
                    found |= words(other, root)
    return found


def malformed(root: Path) -> list[str]:
    """Benchmarks without a `main`, or that never speak of what their JSON has to hold."""
    problems: list[str] = []
    for path in programs(root):
        functions = {node.name for node in parse(path).body if isinstance(node, ast.FunctionDef)}
        missing = sorted(WORDS - words(path, root)) + sorted({"main"} - functions)
        if missing:
            problems.append(f"{path.name}: no {', '.join(missing)}")
    return problems


def test_benchmarks_have_one_form(repository: Path) -> None:
    assert malformed(repository) == []


def test_a_benchmark_of_another_form_is_seen(tree: Callable[[dict[str, str]], Path]) -> None:
    start = "\nif __name__ == '__main__':\n    main()\n"
    write = "def write(arguments):\n    return {'figures': {}, 'machine': '', 'revision': ''}, arguments['--json']\n"
    root = tree(
        {
            "benchmarks/figures.py": write,
            "benchmarks/right.py": "from benchmarks.figures import write\n\ndef main(): write({})\n" + start,
            "benchmarks/wrong.py": "def main(): print('--json', 'figures')\n" + start,
        }
    )
    assert malformed(root) == ["wrong.py: no machine, revision"]
