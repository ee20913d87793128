"""Imports LLaVA-form training data: a JSON list (or JSON lines) of records, and a folder of pictures.

A record is `{"id": …, "image": name, "conversations": [{"from": "human", "value": …}, {"from": "gpt", …}, …]}`.
One without an `image`, or with null, is text alone. Records that name or show a picture, but not exactly one readable
picture inside the folder, come out quarantined. Called by data preparation.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsight.config import DataConfig, LlavaSource
from sparsight.data.files import picture_path, read_json, read_json_lines, read_picture
from sparsight.data.samples import Rows
from sparsight.data.turns import check_unseen, pieces, read_conversation
from sparsight.errors import DataError
from sparsight.records import Quarantined, Sample
from sparsight.sources import row_prefix

SOURCE = "llava"


def read_llava(source: LlavaSource, data: DataConfig) -> Rows:
    """Samples `llava/<file>/<row>/<record id>`, long conversations cut in order (`…/0`, `…/1`).

    Raises `DataError` where the file is missing or no JSON list, or the picture folder is missing.
    """
    path = Path(source.path)
    records = read_json_lines(path) if path.suffix == ".jsonl" else read_json(path)
    if not isinstance(records, list):
        raise DataError(f"'{path}' must be a list of records, not a {type(records).__name__}")
    folder = Path(source.pictures)
    if not folder.is_dir():
        raise DataError(f"the picture folder '{folder}' of '{path}' is missing: correct the source's pictures")
    return Rows(len(records), _rows(records, source, folder, data))


def _rows(records: list[Any], source: LlavaSource, folder: Path, data: DataConfig) -> Iterator[Sample | Quarantined]:
    for index, record in enumerate(records):
        row = f"{row_prefix(source)}/{index}"
        if isinstance(record, Mapping) and isinstance(record.get("id"), str | int):
            row = f"{row}/{record['id']}"
        try:
            if not isinstance(record, Mapping):
                raise DataError(f"the record is a {type(record).__name__}, not a mapping")
            messages: Any = record.get("conversations")
            name: Any = record.get("image")
            whole = read_conversation(messages)
            parts = [whole] if name is None else pieces(whole, data.turns_per_sample)
            if name is None:
                check_unseen(messages)
            frames = () if name is None else (read_picture(_picture_path(name, folder), data),)
        except DataError as error:
            yield Quarantined(row, source.path, str(error))
            continue
        for part, turns in enumerate(parts):
            yield Sample(row if len(parts) == 1 else f"{row}/{part}", frames, turns, SOURCE, (0.0,) * len(frames))


def _picture_path(name: Any, folder: Path) -> Path:
    if not isinstance(name, str) or not name:
        raise DataError("the record's 'image' must be one file name")
    return picture_path(name, folder)
