"""Artefacts: absent, draft, finished; only what is finished is ever read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsight.artifacts import Artifact, RunDirectory, digest, read_manifest
from sparsight.config import ScenesSource
from sparsight.errors import ArtifactError


def artifact(uri: str, config: object = 1, version: int = 1, inputs: dict[str, str] | None = None) -> Artifact:
    return RunDirectory(uri).artifact("stage/one", "thing", version, config, inputs or {"before": "abc"})


def test_life_of_an_artefact(storage_uri: str) -> None:
    one = artifact(storage_uri)
    assert one.finished is None
    assert one.begin() is False
    one.storage.write_bytes("data", b"1")
    assert one.finished is None
    one.commit(counts={"rows": 3}, figures={"speed": 1.5}, details={"note": ["x"]})
    manifest = artifact(storage_uri).finished
    assert manifest is not None
    assert (manifest.kind, manifest.counts, manifest.figures) == ("thing", {"rows": 3}, {"speed": 1.5})
    assert manifest.inputs == {"before": "abc"}
    storage, found = RunDirectory(storage_uri).finished("stage/one", "thing")
    assert found == manifest
    assert storage.read_bytes("data") == b"1"
    assert set(storage.keys()) == {"data", "manifest.json"}


def test_unfinished_is_refused(storage_uri: str) -> None:
    one = artifact(storage_uri)
    with pytest.raises(ArtifactError, match="run its stage first"):
        read_manifest(one.storage)
    one.begin()
    one.storage.write_bytes("data", b"1")
    with pytest.raises(ArtifactError, match=r"manifest\.json is missing"):
        RunDirectory(storage_uri).finished("stage/one")


@pytest.mark.parametrize(
    "change", [{"config": 2}, {"version": 2}, {"inputs": {"before": "other"}}], ids=["config", "version", "inputs"]
)
def test_other_fingerprint_is_not_finished_and_starts_empty(storage_uri: str, change: dict[str, object]) -> None:
    one = artifact(storage_uri)
    one.begin()
    one.storage.write_bytes("data", b"1")
    one.commit()
    other = artifact(storage_uri, **change)  # type: ignore[arg-type]
    assert other.finished is None
    assert other.begin() is False
    assert list(other.storage.keys()) == ["draft.json"]
    assert artifact(storage_uri).finished is None


def test_only_a_draft_of_the_same_fingerprint_is_continued(storage_uri: str) -> None:
    artifact(storage_uri).begin()
    one = artifact(storage_uri)
    one.storage.write_bytes("part", b"1")
    assert one.begin() is True
    assert one.storage.read_bytes("part") == b"1"
    assert artifact(storage_uri, config=2).begin() is False
    assert not one.storage.exists("part")


def test_beginning_again_after_the_end_starts_empty(storage_uri: str) -> None:
    one = artifact(storage_uri)
    one.begin()
    one.storage.write_bytes("part", b"1")
    one.commit()
    assert one.begin() is False
    assert not one.storage.exists("part")
    assert one.finished is None


def test_neighbours_are_left_alone(storage_uri: str) -> None:
    run = RunDirectory(storage_uri)
    other = run.artifact("stage/one-more", "thing", 1, 1)
    other.begin()
    other.commit()
    artifact(storage_uri).begin()
    assert other.finished is not None


def test_damaged_manifest_and_wrong_kind_are_refused(tmp_path: Path) -> None:
    one = artifact(str(tmp_path))
    one.begin()
    one.commit()
    with pytest.raises(ArtifactError, match="is a 'thing' artefact, a 'samples' one is needed"):
        RunDirectory(str(tmp_path)).finished("stage/one", "samples")
    manifest = json.loads(one.storage.read_bytes("manifest.json"))
    one.storage.write_bytes("manifest.json", json.dumps({**manifest, "surprise": 1}).encode())
    with pytest.raises(ArtifactError, match="is damaged"):
        read_manifest(one.storage)
    one.storage.write_bytes("manifest.json", b"{")
    with pytest.raises(ArtifactError, match="is damaged"):
        assert one.finished


def test_digest_is_of_content_not_of_order() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest(ScenesSource(kind="scenes")) == digest(ScenesSource(kind="scenes", pictures=1000))
    assert digest({"x": ScenesSource(kind="scenes")}) != digest({"x": ScenesSource(kind="scenes", pictures=1)})
    with pytest.raises(TypeError, match="cannot take the digest of a object"):
        digest(object())


def test_two_kinds_of_storage_give_one_fingerprint(tmp_path: Path, new_bucket: Callable[[], str]) -> None:
    assert artifact(str(tmp_path)).fingerprint == artifact(f"s3://{new_bucket()}/run").fingerprint
