"""Processes that a test started: finding them, killing them, and waiting for what they bring about."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value")

DEADLINE_S = 120.0
POLL_S = 0.02


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


def wait_until(condition: Callable[[], Value], what: str, working: Callable[[], object] = lambda: True) -> Value:
    """The condition's value as soon as it is true.

    Fails after `DEADLINE_S`, and at once when `working` says that what should bring it about has ended.
    """
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        going = working()  # asked first: what ends just after bringing it about has still done so
        value = condition()
        if value:
            return value
        assert going, f"ended before {what}"
        assert time.monotonic() < deadline_s, f"{what}: not within {DEADLINE_S:g} s"
        time.sleep(POLL_S)


def kill_driver(module: str, config: Path, condition: Callable[[], object], what: str) -> None:
    """Run a pipeline in a process of its own; kill it once the condition holds, then what its cluster leaves."""
    command = [sys.executable, "-m", module, "--config", str(config)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(condition, what, lambda: driver.poll() is None)
    family = children_named("", driver.pid)
    driver.kill()
    driver.wait()
    for process in family:
        with suppress(ProcessLookupError):  # the driver may have taken it along
            os.kill(process, signal.SIGKILL)
    wait_until(lambda: not any(map(alive, family)), "the killed driver's cluster ends")
