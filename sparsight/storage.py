"""Where artefacts live: a local folder or an s3:// prefix behind one small protocol.

Keys are relative, '/'-separated. `write_bytes` is atomic in both kinds: a reader sees the whole object or none.
It knows nothing of what is stored; `artifacts.py` gives the keys their meaning.
"""

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import pyarrow.fs as pafs

from sparsight.errors import StorageError


class Storage(Protocol):
    """A prefix under which bytes are kept."""

    @property
    def uri(self) -> str: ...

    def read_bytes(self, key: str) -> bytes:
        """The object's bytes. Raises `StorageError` if there is none."""
        ...

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """The object's bytes from `start` on, `length` of them or as many as it has. Raises `StorageError` if there is
        none."""
        ...

    def write_bytes(self, key: str, data: bytes) -> None:
        """Put the object in place at once; an existing one is replaced."""
        ...

    def exists(self, key: str) -> bool: ...

    def keys(self, prefix: str = "") -> Iterator[str]:
        """All keys under a folder-like prefix, sorted, relative to this storage."""
        ...

    def delete(self, prefix: str) -> None:
        """Remove one object or everything under a folder; nothing there is no error."""
        ...

    def child(self, key: str) -> "Storage": ...

    def arrow(self, key: str = "") -> tuple[pafs.FileSystem, str]:
        """The pyarrow filesystem and path of a key, for Parquet readers and Ray Data."""
        ...

    def fetch(self, key: str = "") -> Path:
        """A local folder or file with the content under a key: the thing itself, or a downloaded copy."""
        ...

    def publish(self, folder: Path, key: str) -> None:
        """Put every file of a local folder under a key."""
        ...


def open_storage(uri: str) -> Storage:
    """A `LocalStorage` for a path or file:// URI, an `S3Storage` for s3://bucket/prefix."""
    parsed = urlparse(uri)
    if parsed.scheme == "s3":
        if not parsed.netloc:
            raise StorageError(f"'{uri}' names no bucket: write s3://bucket/prefix")
        return S3Storage(parsed.netloc, parsed.path.strip("/"))
    if parsed.scheme in ("", "file"):
        return LocalStorage(Path(parsed.path if parsed.scheme else uri))
    raise StorageError(f"'{uri}': storage kind '{parsed.scheme}' is not known; use a local path or s3://bucket/prefix")


class LocalStorage:
    """A folder. Objects appear by rename, so a killed writer leaves nothing that looks finished."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()

    @property
    def uri(self) -> str:
        return str(self.root)

    def read_bytes(self, key: str) -> bytes:
        try:
            return (self.root / key).read_bytes()
        except OSError as error:
            raise StorageError(f"cannot read '{self.root / key}': {error.strerror or error}") from error

    def read_range(self, key: str, start: int, length: int) -> bytes:
        try:
            with (self.root / key).open("rb") as file:
                file.seek(start)
                return file.read(length)
        except OSError as error:
            raise StorageError(f"cannot read '{self.root / key}': {error.strerror or error}") from error

    def write_bytes(self, key: str, data: bytes) -> None:
        path = self.root / key
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            if partial.is_file():
                partial.unlink()
            raise StorageError(f"cannot write '{path}': {error.strerror or error}") from error

    def exists(self, key: str) -> bool:
        return (self.root / key).exists()

    def keys(self, prefix: str = "") -> Iterator[str]:
        start = self.root / prefix
        if start.is_file():
            yield prefix
            return
        files = (path for path in start.rglob("*") if path.is_file() and not path.name.endswith(".partial"))
        yield from sorted(path.relative_to(self.root).as_posix() for path in files)

    def delete(self, prefix: str) -> None:
        path = self.root / prefix
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def child(self, key: str) -> "LocalStorage":
        return LocalStorage(self.root / key)

    def arrow(self, key: str = "") -> tuple[pafs.FileSystem, str]:
        return pafs.LocalFileSystem(), str(self.root / key)

    def fetch(self, key: str = "") -> Path:
        path = self.root / key
        if not path.exists():
            raise StorageError(f"'{path}' does not exist")
        return path

    def publish(self, folder: Path, key: str) -> None:
        target = self.root / key
        if folder.absolute() != target:
            shutil.copytree(folder, target, dirs_exist_ok=True)


class S3Storage:
    """A prefix in a bucket. Endpoint and credentials come from the usual AWS environment variables."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self._client: Any = None

    @property
    def client(self) -> Any:
        if self._client is None:
            import boto3  # only users of s3:// pay for it

            self._client = boto3.client("s3")
        return self._client

    def __getstate__(self) -> dict[str, Any]:
        return {"bucket": self.bucket, "prefix": self.prefix, "_client": None}

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}" if self.prefix else f"s3://{self.bucket}"

    def _key(self, key: str) -> str:
        return "/".join(part for part in (self.prefix, key.strip("/")) if part)

    @contextmanager
    def _reported(self, action: str, key: str) -> Generator[None]:
        """Whatever boto3 raises becomes a `StorageError`."""
        try:
            yield
        except Exception as error:
            raise StorageError(
                f"cannot {action} 's3://{self.bucket}/{self._key(key)}': {error}; check the URI, the AWS_* variables "
                "and the network"
            ) from error

    def read_bytes(self, key: str) -> bytes:
        with self._reported("read", key):
            return self.client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        wanted = f"bytes={start}-{start + length - 1}"
        with self._reported("read", key):
            try:
                found = self.client.get_object(Bucket=self.bucket, Key=self._key(key), Range=wanted)
            except self.client.exceptions.ClientError as error:
                if error.response["Error"]["Code"] != "InvalidRange":
                    raise
                return b""
            return found["Body"].read()

    def write_bytes(self, key: str, data: bytes) -> None:
        with self._reported("write", key):
            self.client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def exists(self, key: str) -> bool:
        name = self._key(key)
        # Two listings: among keys that begin with the name, "name.txt" and "name-1" come before "name/…".
        return self._first(key, name) == name or self._first(key, f"{name}/" if name else "") is not None

    def _first(self, key: str, prefix: str) -> str | None:
        with self._reported("look for", key):
            page = self.client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, MaxKeys=1)
        return next((item["Key"] for item in page.get("Contents", [])), None)

    def keys(self, prefix: str = "") -> Iterator[str]:
        return (key for key, _ in self._objects(prefix))

    def _objects(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Key and entity tag (it changes with the content) of all objects under a folder-like prefix, sorted."""
        skip = len(self.prefix) + 1 if self.prefix else 0
        for item in self._listed(prefix):
            if not item["Key"].endswith("/"):  # what pyarrow leaves where it was asked for a folder
                yield item["Key"][skip:], item["ETag"]

    def _listed(self, prefix: str) -> Iterator[dict[str, Any]]:
        folder = self._key(prefix)
        with self._reported("list", prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=folder)
            for page in pages:
                for item in page.get("Contents", []):
                    if not folder or item["Key"] == folder or item["Key"].startswith(folder + "/"):
                        yield item

    def delete(self, prefix: str) -> None:
        for item in list(self._listed(prefix)):
            with self._reported("delete", prefix):
                self.client.delete_object(Bucket=self.bucket, Key=item["Key"])

    def child(self, key: str) -> "S3Storage":
        return S3Storage(self.bucket, self._key(key))

    def arrow(self, key: str = "") -> tuple[pafs.FileSystem, str]:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        filesystem = pafs.S3FileSystem(
            endpoint_override=endpoint,
            allow_bucket_creation=False,
            region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        )
        return filesystem, f"{self.bucket}/{self._key(key)}"

    def fetch(self, key: str = "") -> Path:
        """A copy of one object or of a folder; downloaded once a process as long as it stays the same."""
        objects = list(self._objects(key))
        if not objects:
            raise StorageError(f"'s3://{self.bucket}/{self._key(key)}' does not exist")
        content = hashlib.blake2b(repr((self.uri, key, objects)).encode(), digest_size=16).hexdigest()
        target = Path(_downloads().name) / content
        alone = [name for name, _ in objects] == [key.strip("/")]
        if not target.exists():
            partial = target.with_name(f"{content}.{uuid.uuid4().hex}.partial")
            for name, _ in objects:
                path = partial / ("object" if alone else self._key(name)[len(self._key(key)) :].strip("/"))
                path.parent.mkdir(parents=True, exist_ok=True)
                with self._reported("download", name):
                    self.client.download_file(self.bucket, self._key(name), str(path))
            _put(partial, target)
        return target / "object" if alone else target

    def publish(self, folder: Path, key: str) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = f"{key}/{path.relative_to(folder).as_posix()}"
                with self._reported("upload", name):
                    self.client.upload_file(str(path), self.bucket, self._key(name))


@cache
def _downloads() -> "tempfile.TemporaryDirectory[str]":
    """Where this process keeps its copies of remote objects; removed when it exits."""
    return tempfile.TemporaryDirectory(prefix="sparsight-")


def _put(partial: Path, target: Path) -> None:
    """Let a complete folder appear under its name; where another thread was quicker, the folders are equal."""
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(partial)
