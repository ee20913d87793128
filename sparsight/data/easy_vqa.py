"""Imports the easy-VQA benchmark from the files of its package: one coloured shape a picture, 13 answers.

The official split into training and test pictures is kept. The package's code is not used. Called by data
preparation.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, Literal

from sparsight.config import DataConfig, EasyVqaSource
from sparsight.data.files import read_json, read_picture
from sparsight.data.samples import Rows
from sparsight.data.turns import pieces
from sparsight.errors import DataError, PictureError
from sparsight.records import Quarantined, Sample, Turn

SOURCE = "easy_vqa"
SHAPE_ANSWERS = ("circle", "rectangle", "triangle")


def find_folder(source: EasyVqaSource) -> Path:
    """The folder that holds `train/` and `test/`. Raises `DataError` where there is none."""
    if source.path is not None:
        folder = Path(source.path)
    else:
        spec = importlib.util.find_spec("easy_vqa")
        if spec is None or spec.origin is None:
            raise DataError(
                "the easy-vqa package is not installed: run 'pip install easy-vqa' or set the source's path"
            )
        folder = Path(spec.origin).parent / "data"
    if not (folder / "train" / "questions.json").is_file():
        raise DataError(f"'{folder}' holds no easy-VQA data (train/questions.json is missing): correct the path")
    return folder


def read_easy_vqa(source: EasyVqaSource, split: Literal["train", "test"], data: DataConfig, seed: int) -> Rows:
    """All questions of a picture become turns, cut into samples of at most `data.turns_per_sample`.

    Training turns are shuffled by `seed`; test turns keep the file's order, so the test set is the same for every
    seed. Raises `DataError` where the questions cannot be read; unreadable pictures and rows come out quarantined.
    """
    folder = find_folder(source) / split
    questions = folder / "questions.json"
    turns, bad = _read_questions(questions, split)
    pictures = sorted(turns)[: source.limit]
    samples: list[tuple[int, list[tuple[Turn, ...]]]] = []
    for picture in pictures:
        if split == "train":
            Random(f"{SOURCE}/{seed}/{picture}").shuffle(turns[picture])
        samples.append((picture, pieces(turns[picture], data.turns_per_sample)))
    total = len(bad) + sum(len(parts) for _, parts in samples)
    return Rows(total, _rows(folder / "images", split, samples, bad, data))


def _rows(
    images: Path,
    split: str,
    samples: list[tuple[int, list[tuple[Turn, ...]]]],
    bad: list[Quarantined],
    data: DataConfig,
) -> Iterator[Sample | Quarantined]:
    yield from bad
    for picture, parts in samples:
        path = images / f"{picture}.png"
        fault, content = None, b""
        try:
            content = read_picture(path, data)
        except PictureError as error:
            fault = str(error)
        for part, turns in enumerate(parts):
            row = f"{SOURCE}/{split}/{picture}/{part}"
            yield (
                Quarantined(row, str(path), fault)
                if fault
                else Sample(row, (content,), turns, SOURCE, independent=True)
            )


def _read_questions(path: Path, split: str) -> tuple[dict[int, list[Turn]], list[Quarantined]]:
    rows = read_json(path)
    if not isinstance(rows, list):
        raise DataError(f"'{path}' must be a list of [question, answer, picture] rows, not a {type(rows).__name__}")
    turns: dict[int, list[Turn]] = {}
    bad: list[Quarantined] = []
    for index, row in enumerate(rows):
        if _is_row(row):
            question, answer, picture = row
            turns.setdefault(picture, []).append(Turn(question, answer, _answer_type(answer)))
        else:
            bad.append(
                Quarantined(f"{SOURCE}/{split}/row {index}", str(path), "the row is not [question, answer, picture]")
            )
    return turns, bad


def _is_row(row: Any) -> bool:
    return isinstance(row, list) and [type(value) for value in row] == [str, str, int] and bool(row[0] and row[1])


def _answer_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes_no"
    return "shape" if answer in SHAPE_ANSWERS else "colour"
