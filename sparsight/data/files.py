"""Reading files that others wrote: JSON with the line of a fault, checked pictures, and a digest of what is there.

Shared by the importers; what the content means is theirs.
"""

import hashlib
import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sparsight.config import DataConfig
from sparsight.errors import DataError, PictureError
from sparsight.media.images import decode


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises `DataError` with the line of the fault."""
    text = _read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _not_json(path, error.lineno, error) from error


def read_json_lines(path: Path) -> list[Any]:
    """The values of a file with one JSON value a line; empty lines are skipped. Raises `DataError` as `read_json`."""
    values: list[Any] = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise _not_json(path, number, error) from error
    return values


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror or error}; correct the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 text (byte {error.start}): convert the file") from error


def _not_json(path: Path, line: int, error: json.JSONDecodeError) -> DataError:
    return DataError(f"'{path}' is not valid JSON: line {line}, column {error.colno}: {error.msg}; mend the file")


def picture_path(name: str, folder: Path) -> Path:
    """Where a named picture is. Names in files are not trusted: one that leads out of the folder is a `DataError`."""
    path = PurePosixPath(name)
    if path.is_absolute() or PureWindowsPath(name).anchor or ".." in path.parts + PureWindowsPath(name).parts:
        raise DataError(f"the picture name {name!r} leads out of the picture folder")
    return folder / path


def read_picture(path: Path, data: DataConfig) -> bytes:
    """The bytes of a picture file that `images.decode` accepts. Raises `PictureError` with the reason for any other."""
    try:
        if not path.is_file():
            raise PictureError("the picture file is missing")
        if path.stat().st_size > data.max_picture_bytes:
            raise PictureError(f"the picture has {path.stat().st_size} bytes, the limit is {data.max_picture_bytes}")
        content = path.read_bytes()
    except PictureError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise PictureError(f"the picture cannot be read: {error}") from error
    decode(content, data.max_picture_bytes, data.max_picture_pixels)
    return content


def files_digest(*paths: Path) -> str:
    """A digest that changes when a file is added, removed or resized under a folder, or a file's content changes.

    Files named directly are read; those inside folders count by name and size only, so large folders stay cheap.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        try:
            if path.is_file():
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "blake2b").digest())
            else:
                for item in sorted(item for item in path.rglob("*") if item.is_file()):
                    digest.update(f"{item.relative_to(path).as_posix()}\n{item.stat().st_size}\n".encode())
        except OSError as error:
            raise DataError(f"cannot read '{path}': {error.strerror or error}; correct the path") from error
    return digest.hexdigest()
