"""Imports ready-made preference pairs in RLAIF-V's form: Parquet or JSON parts, one row a pair.

A row has `question`, `chosen`, `rejected`, `image` (bytes, a file name, or both as `{bytes, path}`) and perhaps
`origin_dataset`; in JSON, bytes are base64. A pair becomes a sample of two turns that ask the same, the better answer
first. Rows that cannot be used, or whose picture is one of an evaluation set, come out quarantined. Called by
`pipelines.pairs`; the answers are scored there.
"""

import base64
import binascii
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsight.config import DataConfig
from sparsight.data.files import picture_path, read_json, read_json_lines, read_picture
from sparsight.data.samples import Rows
from sparsight.data.turns import normalise
from sparsight.errors import DataError
from sparsight.media.images import decode
from sparsight.records import PICTURE_MARK, Quarantined, Sample, Turn, hash_frames

SOURCE = "rlaif_v"
NEEDED = ("question", "chosen", "rejected", "image")
ORIGIN = "origin_dataset"
ROWS_PER_BATCH = 64
KINDS = (".parquet", ".json", ".jsonl")


def read_rlaif_v(path: Path, data: DataConfig, held_out: Collection[str] = ()) -> Rows:
    """Samples `rlaif_v/<file>/<row>` of a file, or of all parts under a folder in order of their names.

    `held_out` are content hashes of pictures that no pair may show. Raises `DataError` where there is no part, or one
    cannot be read or lacks a column.
    """
    parts = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in KINDS)
    if not parts:
        raise DataError(f"there are no Parquet or JSON files at '{path}': correct pairs.import_path")
    folder = path.parent if path.is_file() else path
    total = sum(_length(part) for part in parts)
    return Rows(total, (row for part in parts for row in _read(part, folder, data, frozenset(held_out))))


def _length(part: Path) -> int:
    """How many rows a part holds; of JSON parts, which must be read for that, about how many."""
    if part.suffix != ".parquet":
        return max(1, part.stat().st_size // 1000)
    with _open(part) as opened:
        return opened.metadata.num_rows


def _open(part: Path) -> pq.ParquetFile:
    try:
        opened = pq.ParquetFile(part)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"'{part}' is not a readable Parquet file: {error}; replace the file") from error
    missing = [name for name in NEEDED if name not in opened.schema_arrow.names]
    if missing:
        found = opened.schema_arrow.names
        opened.close()
        raise DataError(f"'{part}' has no column {missing}, only {found}: pairs need {', '.join(NEEDED)}")
    return opened


def _read(part: Path, folder: Path, data: DataConfig, held_out: frozenset[str]) -> Iterator[Sample | Quarantined]:
    name = part.relative_to(folder).as_posix()
    for index, row in enumerate(_rows(part)):
        label = f"{SOURCE}/{name}/{index}"
        try:
            sample = _sample(label, row, part.parent, data)
            if hash_frames(sample.frames) in held_out:
                raise DataError("the picture is one of an evaluation set")
        except DataError as error:
            yield Quarantined(label, str(part), str(error))
            continue
        yield sample


def _rows(part: Path) -> Iterator[Any]:
    if part.suffix != ".parquet":
        rows = read_json_lines(part) if part.suffix == ".jsonl" else read_json(part)
        if not isinstance(rows, list):
            raise DataError(f"'{part}' must be a list of pairs, not a {type(rows).__name__}; replace the file")
        yield from rows
        return
    with _open(part) as opened:
        columns = [name for name in (*NEEDED, ORIGIN) if name in opened.schema_arrow.names]
        try:
            for batch in opened.iter_batches(batch_size=ROWS_PER_BATCH, columns=columns):
                yield from batch.to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"'{part}' is damaged: {error}; replace the file") from error


def _sample(label: str, row: Any, folder: Path, data: DataConfig) -> Sample:
    if not isinstance(row, Mapping):
        raise DataError(f"the row is a {type(row).__name__}, not a mapping")
    question = _text(row, "question").replace(PICTURE_MARK, "").strip()
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if not question:
        raise DataError("the question is empty")
    if normalise(chosen) == normalise(rejected):
        raise DataError("the chosen and the rejected answer are the same")
    picture = _picture(row.get("image"), folder, data)
    origin = row.get(ORIGIN)
    source = origin if isinstance(origin, str) and origin else SOURCE
    turns = (Turn(question, chosen), Turn(question, rejected))
    return Sample(label, (picture,), turns, source, independent=True)


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"the row has no {name}")
    return value.strip()


def _picture(value: Any, folder: Path, data: DataConfig) -> bytes:
    name = value.get("path") if isinstance(value, Mapping) else value
    content = value.get("bytes") if isinstance(value, Mapping) else None
    if isinstance(value, bytes):
        content = value
    if isinstance(content, str):
        try:
            content = base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"the picture's bytes are not base64: {error}") from error
    if isinstance(content, bytes) and content:
        decode(content, data.max_picture_bytes, data.max_picture_pixels)
        return content
    if not isinstance(name, str) or not name:
        raise DataError("the row has no picture: neither bytes nor a path")
    return read_picture(picture_path(name, folder), data)
