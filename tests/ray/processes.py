"""Finding the processes that a test's own cluster started, so that one of them can be killed."""

import os
from pathlib import Path


def children_named(name: str, root: int | None = None) -> list[int]:
    """Ids of the processes below `root` (by default this one) whose command line starts with a name."""
    top = os.getpid() if root is None else root
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                commands[int(folder.name)] = (folder / "cmdline").read_text()
            except OSError:
                continue  # it ended meanwhile

    def below(process: int) -> bool:
        while process in parents and process != top:
            process = parents[process]
        return process == top

    return [process for process, command in commands.items() if command.startswith(name) and below(process)]


def alive(process: int) -> bool:
    """Whether a process still runs; one that ended and was not waited for does not."""
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
