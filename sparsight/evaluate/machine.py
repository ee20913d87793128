"""What machine a figure was measured on, in one line: a figure without it says little."""

import os
import platform
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch


def describe_machine() -> str:
    """Processor, cores, memory, GPU if any, and the versions that decide speed."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [
        _processor(),
        f"{len(os.sched_getaffinity(0))} logical CPUs",
        f"{torch.backends.cpu.get_cpu_capability()}",
        f"{memory_gib:.0f} GiB",
    ]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}")
    parts.append(f"Python {platform.python_version()}")
    # The library alone, without Ray, is a whole installation.
    parts += [f"{name} {version(name)}" for name in ("torch", "transformers", "ray") if find_spec(name)]
    return ", ".join(parts)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
