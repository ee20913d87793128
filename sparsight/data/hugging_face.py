"""Imports Hugging Face datasets: folders written by `save_to_disk`, and Parquet files.

Rows are read as raw Arrow, so the pictures' bytes reach our own safe decoder and no other. A picture is bytes, an
`Image` feature, or a list of one of these; a row with null or an empty list is text alone. The text is a question and
an answer column (single texts or lists of equal length), or one column in LLaVA form. Called by data preparation.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsight.config import DataConfig, HuggingFaceSource
from sparsight.data.samples import Rows
from sparsight.data.turns import check_unseen, pieces, read_conversation
from sparsight.errors import DataError
from sparsight.media.images import decode
from sparsight.records import Quarantined, Sample
from sparsight.sources import row_prefix

SOURCE = "hugging_face"
ROWS_PER_BATCH = 64


def read_hugging_face(source: HuggingFaceSource, data: DataConfig) -> Rows:
    """Samples `hugging_face/<folder>/<split>/<row>`, long conversations cut in order (`…/0`, `…/1`).

    Raises `DataError` where there is no dataset, no such split, or a named column is missing.
    """
    path = Path(source.path)
    if not path.exists():
        raise DataError(f"there is no dataset at '{path}': correct the source's path")
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        total, names, tables = _open_saved(path, source.split)
    else:
        total, names, tables = _open_parquet(path, source.split)
    text = [source.question_column, source.answer_column]
    needed = [source.picture_column, *([source.conversation_column] if source.conversation_column else text)]
    missing = [name for name in needed if name not in names]
    if missing:
        raise DataError(f"'{path}' has no column {missing}, only {sorted(names)}: set the source's *_column keys")
    return Rows(total, _rows(source, tables, needed, data))


def _open_saved(path: Path, split: str | None) -> tuple[int, list[str], Iterable[pa.Table]]:
    import datasets  # heavy, and only this kind of source needs it

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"the dataset at '{path}' cannot be loaded: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(
                f"'{path}' has the splits {sorted(map(str, loaded))}: set the source's split to one of them"
            )
        loaded = loaded[split]
    tables = loaded.with_format("arrow").iter(batch_size=ROWS_PER_BATCH)
    return len(loaded), list(loaded.column_names), tables


def _open_parquet(path: Path, split: str | None) -> tuple[int, list[str], Iterable[pa.Table]]:
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if split is not None and path.is_dir():
        files = [file for file in files if file.name.startswith(f"{split}-") or file.parent.name == split]
    if not files:
        wanted = "Parquet files" if split is None else f"Parquet files of split '{split}' ({split}-*.parquet)"
        raise DataError(f"'{path}' is no saved dataset and holds no {wanted}: correct the source's path or split")
    total = 0
    names: list[str] = []
    for file in files:
        try:
            head = pq.ParquetFile(file)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"'{file}' is not a readable Parquet file: {error}") from error
        with head:
            total += head.metadata.num_rows
            columns = list(head.schema_arrow.names)
        if names and columns != names:
            raise DataError(f"'{file}' has the columns {columns}, the files before it {names}: use equal files")
        names = columns
    return total, names, _parquet_tables(files)


def _parquet_tables(files: Sequence[Path]) -> Iterator[pa.Table]:
    for file in files:
        with pq.ParquetFile(file) as opened:
            try:
                for batch in opened.iter_batches(batch_size=ROWS_PER_BATCH):
                    yield pa.Table.from_batches([batch])
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"'{file}' is damaged: {error}; replace the file") from error


def _rows(
    source: HuggingFaceSource, tables: Iterable[pa.Table], columns: list[str], data: DataConfig
) -> Iterator[Sample | Quarantined]:
    index = 0
    for table in tables:
        for row in table.select(columns).to_pylist():
            label = f"{row_prefix(source)}/{index}"
            index += 1
            try:
                messages = _messages(row, source)
                whole = read_conversation(messages)
                frames = _frames(row[source.picture_column])
                parts = pieces(whole, data.turns_per_sample) if frames else [whole]
                if not frames:
                    check_unseen(messages)
                for picture in frames:
                    decode(picture, data.max_picture_bytes, data.max_picture_pixels)
            except DataError as error:
                yield Quarantined(label, source.path, str(error))
                continue
            for part, turns in enumerate(parts):
                name = label if len(parts) == 1 else f"{label}/{part}"
                yield Sample(name, frames, turns, SOURCE, (0.0,) * len(frames))


def _frames(value: Any) -> tuple[bytes, ...]:
    """The row's picture, or none."""
    if isinstance(value, list):
        if len(value) > 1:
            raise DataError(f"the row shows {len(value)} pictures, one is the most")
        value = value[0] if value else None
    if isinstance(value, Mapping):
        if value.get("bytes") is None and value.get("path"):
            raise DataError("the row holds only a picture's path: save the dataset with its pictures inside")
        value = value.get("bytes")
    if value is None:
        return ()
    if not isinstance(value, bytes):
        raise DataError(f"the row's picture is a {type(value).__name__}, not bytes")
    return (value,)


def _messages(row: Mapping[str, Any], source: HuggingFaceSource) -> Any:
    """The row's conversation in LLaVA form, not checked yet."""
    if source.conversation_column is not None:
        return row[source.conversation_column]
    questions, answers = row[source.question_column], row[source.answer_column]
    if not isinstance(questions, list) or not isinstance(answers, list):
        questions, answers = [questions], [answers]
    if len(questions) != len(answers) or not questions:
        raise DataError(f"the row has {len(questions)} questions and {len(answers)} answers")
    messages: list[dict[str, Any]] = []
    for question, answer in zip(questions, answers, strict=True):
        messages += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return messages
