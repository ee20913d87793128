"""What a person sees of a run: a metrics file, TensorBoard, and progress bars.

`MetricsWriter` appends one JSON object a line and mirrors numbers to TensorBoard. `progress` shows rate and time
left on a terminal and prints nothing elsewhere. Used by pipelines and training loops; decides nothing.
"""

import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


class MetricsWriter:
    """Appends records to `metrics.jsonl` in a folder, and their numbers to TensorBoard beside it.

    A record holds `step` (int), `time_s` (seconds since the writer was opened) and any numbers. Records after
    `resume_step` that an earlier, killed writer left are dropped, so a resumed run has one line a step.
    """

    def __init__(self, folder: Path, resume_step: int = 0, tensorboard: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
        self._file = self.path.open("w")
        for row in kept:
            self._file.write(json.dumps(row) + "\n")
        self._start_s = time.monotonic() - (kept[-1]["time_s"] if kept else 0.0)
        self._board = _open_board(folder, resume_step) if tensorboard else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": step, "time_s": round(time.monotonic() - self._start_s, 3), **values}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_board(folder: Path, resume_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # heavy, and only needed where training is watched

    return SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)  # pyright: ignore


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete records of a metrics file; a line cut short by a kill is left out. No file, no records."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def progress(items: Iterable[Item], label: str, total: int | None = None, unit: str = "row") -> "tqdm[Item]":
    """Iterate with a bar that shows rate and time left; silent when standard error is not a terminal."""
    return tqdm(items, desc=label, total=total, unit=unit, file=sys.stderr, disable=None, dynamic_ncols=True)


def progress_bar(label: str, total: int, unit: str = "row", initial: int = 0) -> "tqdm[Any]":
    """A bar that the caller moves with `.update(n)`; silent when standard error is not a terminal."""
    return tqdm(desc=label, total=total, unit=unit, initial=initial, file=sys.stderr, disable=None, dynamic_ncols=True)


def say(message: str) -> None:
    """One line to a person on standard error, above any progress bar."""
    tqdm.write(message, file=sys.stderr)
