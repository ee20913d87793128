"""Reads COCO-style annotation files: which objects each picture shows, and what the objects are called.

`instances_*.json` names the categories in each picture; with `captions_*.json`, objects that people's captions
mention are there too, as CHAIR counts them. Boxes and outlines are not read, pictures are not opened. Called by data
preparation; what is asked about the pictures is `pope`'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsight.config import CocoSource
from sparsight.data.files import read_json
from sparsight.data.objects import ObjectVocabulary
from sparsight.errors import DataError


@dataclass(frozen=True)
class AnnotatedPictures:
    """Objects by picture, sorted by name, and the vocabulary that their names are from."""

    objects_of: Mapping[str, tuple[str, ...]]
    """By the picture's file name; pictures without any object are here, too."""
    vocabulary: ObjectVocabulary


def read_coco(source: CocoSource) -> AnnotatedPictures:
    """The objects of every picture of the annotation file.

    Raises `DataError` with file, list and row where a file is missing, no JSON, or not of COCO's form, where rows
    contradict each other, and where the picture folder is missing.
    """
    path = Path(source.annotations)
    content = read_json(path)
    categories = _by_id(content, "categories", "name", path)
    files = _by_id(content, "images", "file_name", path)
    shown: dict[int, set[str]] = {picture: set() for picture in files}
    for index, row in enumerate(_rows(content, "annotations", path)):
        picture, category = _number(row, "image_id"), _number(row, "category_id")
        if picture not in files or category not in categories:
            raise _wrong(path, "annotations", index, "has no image_id or category_id that the file lists")
        shown[picture].add(categories[category])
    vocabulary = ObjectVocabulary.coco(categories.values())
    if source.captions is not None:
        _add_captions(shown, Path(source.captions), vocabulary)
    if not Path(source.pictures).is_dir():
        raise DataError(f"the picture folder '{source.pictures}' of '{path}' is missing: correct the source's pictures")
    return AnnotatedPictures({files[picture]: tuple(sorted(names)) for picture, names in shown.items()}, vocabulary)


def _add_captions(shown: Mapping[int, set[str]], path: Path, vocabulary: ObjectVocabulary) -> None:
    """Adds what captions mention; captions of pictures that are not in `shown` are passed over."""
    used = 0
    for index, row in enumerate(_rows(read_json(path), "annotations", path)):
        picture, caption = _number(row, "image_id"), row.get("caption")
        if picture is None or not isinstance(caption, str):
            raise _wrong(path, "annotations", index, "has no image_id or no caption")
        if picture in shown:
            used += 1
            shown[picture].update(vocabulary.mentions(caption))
    if used == 0:
        raise DataError(f"'{path}' has no caption of any picture of the source: give the captions of the same pictures")


def _by_id(content: Any, table: str, name: str, path: Path) -> dict[int, str]:
    """The rows' names by their ids; both must be there and tell rows apart."""
    found: dict[int, str] = {}
    for index, row in enumerate(_rows(content, table, path)):
        key, value = _number(row, "id"), row.get(name)
        if key is None or not isinstance(value, str) or not value.strip():
            raise _wrong(path, table, index, f"has no id or no {name}")
        if key in found:
            raise _wrong(path, table, index, f"has the id {key} of another row")
        found[key] = value
    if not found:
        raise DataError(f"'{path}' lists no {table}: give an annotation file with some")
    if len(set(found.values())) < len(found):
        raise DataError(f"'{path}' gives one {name} to two rows of '{table}': make them different")
    return found


def _rows(content: Any, table: str, path: Path) -> list[Mapping[str, Any]]:
    rows = content.get(table) if isinstance(content, Mapping) else None
    if not isinstance(rows, list):
        raise DataError(f"'{path}' has no list '{table}': give an annotation file of COCO's form")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise _wrong(path, table, index, f"is a {type(row).__name__}, not a mapping")
    return rows


def _number(row: Mapping[str, Any], key: str) -> int | None:
    value = row.get(key)
    return value if type(value) is int else None


def _wrong(path: Path, table: str, index: int, fault: str) -> DataError:
    return DataError(f"'{path}': row {index} of '{table}' {fault}; mend the file")
