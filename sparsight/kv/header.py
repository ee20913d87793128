"""What a stream's folder, and its place in a store, say of the stream: `stream.json`.

It carries a checksum: sizes of pages are read from it, so one wrong digit would make all of a stream look damaged.
It knows no files but their names. Used by `segments` and `archive`.
"""

import json
from dataclasses import dataclass
from typing import Any, Self

import xxhash

from sparsight.errors import StreamError
from sparsight.kv.page import PageFormat

HEADER, SINK = "stream.json", "sink.safetensors"
VERSION = 2


@dataclass(frozen=True)
class Header:
    """`stream_id` is random and tells one stream from any other, `sink_digest` names the system prompt's block;
    `format` is None before the first block."""

    stream_id: str
    sink_digest: str
    segment_bytes: int
    format: PageFormat | None = None

    def to_bytes(self) -> bytes:
        fields = {
            "version": VERSION,
            "stream_id": self.stream_id,
            "sink_digest": self.sink_digest,
            "segment_bytes": self.segment_bytes,
            "format": None if self.format is None else self.format.to_json(),
        }
        return json.dumps({**fields, "check": _checksum(fields)}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote. Raises `StreamError` for anything else."""
        try:
            fields: dict[str, Any] = json.loads(data)
            if fields["version"] == VERSION and fields.pop("check") == _checksum(fields):
                page_format = None if fields["format"] is None else PageFormat.from_json(fields["format"])
                return cls(fields["stream_id"], fields["sink_digest"], fields["segment_bytes"], page_format)
            version = fields["version"]
        except (ValueError, KeyError, TypeError, AttributeError):
            version = VERSION
        if version != VERSION:
            raise StreamError(f"its {HEADER} was written by another version: {version}, not {VERSION}")
        raise StreamError(f"its {HEADER} is damaged")


def _checksum(fields: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True).encode())
