"""A run is a directory; every stage writes one artefact in it, and a manifest last, by rename.

An artefact whose manifest carries the fingerprint that a stage is about to produce is finished: the stage is
skipped. Anything without a manifest is unfinished and is never read; a draft of the same fingerprint may be
continued. Used by every pipeline; knows nothing of what the data means.
"""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from sparsight.errors import ArtifactError
from sparsight.storage import Storage, open_storage

MANIFEST = "manifest.json"
DRAFT = "draft.json"


def digest(value: Any) -> str:
    """A short stable hash of plain data or pydantic models: equal content, equal digest, on any machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"cannot take the digest of a {type(value).__name__}")


@cache
def code_revision() -> str:
    """The commit of the checkout, with '+' where it has local changes; 'unknown' outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Manifest(BaseModel):
    """What an artefact is, from what it was made, and what is in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    schema_version: int
    fingerprint: str
    config_digest: str
    inputs: dict[str, str]
    code_revision: str
    counts: dict[str, int] = {}
    figures: dict[str, float] = {}
    details: dict[str, Any] = {}


class Artifact:
    """One directory of a run, in one of three states: absent, draft, finished."""

    def __init__(
        self, storage: Storage, kind: str, schema_version: int, config: Any, inputs: Mapping[str, str]
    ) -> None:
        self.storage = storage
        self.kind = kind
        self.schema_version = schema_version
        self.config_digest = digest(config)
        self.inputs = dict(inputs)
        self.code_revision = code_revision()  # of the process that asks for it: a worker may lack the checkout
        self.fingerprint = digest([kind, schema_version, self.config_digest, self.inputs])

    @property
    def finished(self) -> Manifest | None:
        """The manifest, if this very artefact (same kind, config and inputs) is complete."""
        if not self.storage.exists(MANIFEST):
            return None
        manifest = read_manifest(self.storage)
        return manifest if manifest.fingerprint == self.fingerprint else None

    def begin(self) -> bool:
        """Open the draft. True if a draft of the same fingerprint was there and may be continued; else it is empty."""
        if self.storage.exists(DRAFT):
            started = json.loads(self.storage.read_bytes(DRAFT))
            if started.get("fingerprint") == self.fingerprint and not self.storage.exists(MANIFEST):
                return True
        self.storage.delete(MANIFEST)
        self.storage.delete("")
        self.storage.write_bytes(DRAFT, json.dumps({"fingerprint": self.fingerprint}).encode())
        return False

    def commit(
        self,
        counts: Mapping[str, int] | None = None,
        figures: Mapping[str, float] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Write the manifest: from now on the artefact is finished."""
        manifest = Manifest(
            kind=self.kind,
            schema_version=self.schema_version,
            fingerprint=self.fingerprint,
            config_digest=self.config_digest,
            inputs=self.inputs,
            code_revision=self.code_revision,
            counts=dict(counts or {}),
            figures=dict(figures or {}),
            details=dict(details or {}),
        )
        self.storage.write_bytes(MANIFEST, manifest.model_dump_json(indent=2).encode())
        self.storage.delete(DRAFT)
        return manifest


def read_manifest(storage: Storage, kind: str | None = None) -> Manifest:
    """The manifest of a finished artefact. Raises `ArtifactError` if unfinished, damaged or of another kind."""
    if not storage.exists(MANIFEST):
        raise ArtifactError(f"'{storage.uri}' holds no finished artefact ({MANIFEST} is missing): run its stage first")
    try:
        manifest = Manifest.model_validate_json(storage.read_bytes(MANIFEST))
    except ValidationError as error:
        raise ArtifactError(f"'{storage.uri}/{MANIFEST}' is damaged: {error}; delete the folder and rerun") from error
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"'{storage.uri}' is a '{manifest.kind}' artefact, a '{kind}' one is needed here")
    return manifest


class RunDirectory:
    """The artefacts of one run under one URI."""

    def __init__(self, uri: str) -> None:
        self.storage = open_storage(uri)

    def artifact(
        self, name: str, kind: str, schema_version: int, config: Any, inputs: Mapping[str, str] | None = None
    ) -> Artifact:
        return Artifact(self.storage.child(name), kind, schema_version, config, inputs or {})

    def finished(self, name: str, kind: str | None = None) -> tuple[Storage, Manifest]:
        """A finished artefact's storage and manifest; raises `ArtifactError` where there is none."""
        storage = self.storage.child(name)
        return storage, read_manifest(storage, kind)
