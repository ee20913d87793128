"""The same contract for a folder and for a bucket on a real S3 server; only failures differ in kind."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsight.errors import StorageError
from sparsight.storage import LocalStorage, S3Storage, open_storage


def test_bytes_come_back(storage_uri: str) -> None:
    storage = open_storage(storage_uri)
    storage.write_bytes("a/b.bin", b"\x00\xff" * 1000)
    storage.write_bytes("a/b.bin", b"second")
    assert storage.read_bytes("a/b.bin") == b"second"
    assert storage.child("a").read_bytes("b.bin") == b"second"


def test_a_range_is_what_the_object_has_there(storage_uri: str) -> None:
    storage = open_storage(storage_uri)
    storage.write_bytes("a/b.bin", bytes(range(100)))
    assert storage.read_range("a/b.bin", 0, 3) == b"\x00\x01\x02"
    assert storage.child("a").read_range("b.bin", 40, 20) == bytes(range(40, 60))
    assert storage.read_range("a/b.bin", 95, 20) == bytes(range(95, 100))
    assert storage.read_range("a/b.bin", 100, 1) == b""
    with pytest.raises(StorageError, match=r"cannot read .*nothing/here"):
        storage.read_range("nothing/here", 0, 1)


def test_missing_object_is_one_clear_error(storage_uri: str) -> None:
    storage = open_storage(storage_uri)
    with pytest.raises(StorageError, match=r"cannot read .*nothing/here"):
        storage.read_bytes("nothing/here")
    with pytest.raises(StorageError, match="does not exist"):
        storage.fetch("nothing")
    storage.delete("nothing")
    assert list(storage.keys("nothing")) == []


def test_keys_are_sorted_relative_and_bounded_by_folders(storage_uri: str) -> None:
    storage = open_storage(storage_uri)
    names = ["teacher-old/x", "teacher.txt", "teacher/b/c", "teacher/a", "z"]
    for name in names:
        storage.write_bytes(name, name.encode())
    assert list(storage.keys()) == sorted(names)
    assert list(storage.keys("teacher")) == ["teacher/a", "teacher/b/c"]
    assert list(storage.keys("z")) == ["z"]
    assert list(storage.child("teacher").keys()) == ["a", "b/c"]


def test_exists_sees_objects_and_folders_not_name_beginnings(storage_uri: str) -> None:
    storage = open_storage(storage_uri)
    for name in ("run-1/x", "run.txt", "run/data/x"):
        storage.write_bytes(name, b"")
    found = {
        name: storage.exists(name) for name in ("run", "run/data", "run/data/x", "run-1", "run.txt", "ru", "run/d")
    }
    assert [name for name, there in found.items() if there] == ["run", "run/data", "run/data/x", "run-1", "run.txt"]


def test_delete_takes_a_folder_or_an_object_and_no_neighbour(storage_uri: str) -> None:
    storage = open_storage(storage_uri)
    for name in ("run/a", "run/b/c", "run-1/x", "run.txt"):
        storage.write_bytes(name, b"1")
    storage.delete("run")
    assert list(storage.keys()) == ["run-1/x", "run.txt"]
    storage.delete("run.txt")
    storage.child("run-1").delete("")
    assert list(storage.keys()) == []


def test_publish_and_fetch_are_inverse(storage_uri: str, tmp_path: Path) -> None:
    source = tmp_path / "model"
    (source / "deep").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "deep" / "weights").write_bytes(b"w" * 5000)
    storage = open_storage(storage_uri)
    storage.publish(source, "out/model")
    folder = storage.fetch("out/model")
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {"config.json": b"{}", "deep/weights": b"w" * 5000}
    assert storage.fetch("out/model/config.json").read_text() == "{}"


def test_what_was_fetched_is_not_fetched_again_until_it_changes(new_bucket: Callable[[], str]) -> None:
    storage = open_storage(f"s3://{new_bucket()}/run")
    for name in ("model/config.json", "model/deep/weights", "other"):
        storage.write_bytes(name, b"1")
    folder, file = storage.fetch("model"), storage.fetch("model/config.json")
    (folder / "mark").touch()
    storage.write_bytes("other", b"2")
    assert (open_storage(storage.uri).fetch("model"), storage.fetch("model/config.json")) == (folder, file)
    assert (folder / "mark").exists()
    storage.write_bytes("model/config.json", b"2")
    changed = storage.fetch("model")
    assert sorted(path.name for path in changed.iterdir()) == ["config.json", "deep"]
    assert (changed / "config.json").read_bytes() == storage.fetch("model/config.json").read_bytes() == b"2"
    assert (folder / "config.json").read_bytes() == b"1"  # whoever still reads the old one is not disturbed


def test_copies_go_when_their_process_does(new_bucket: Callable[[], str]) -> None:
    storage = open_storage(f"s3://{new_bucket()}/run")
    storage.write_bytes("model/config.json", b"1")
    program = f"from sparsight.storage import open_storage; print(open_storage({storage.uri!r}).fetch('model'))"
    command = [sys.executable, "-c", f"{program}; raise SystemExit(3)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert not Path(done.stdout.strip()).parent.exists()


def test_folders_that_others_made_are_no_objects_and_can_be_deleted(storage_uri: str) -> None:
    storage = open_storage(storage_uri)
    filesystem, path = storage.arrow("run/checkpoints")
    filesystem.create_dir(f"{path}/one")
    storage.write_bytes("run/model", b"1")
    assert list(storage.keys("run")) == ["run/model"]
    storage.delete("run/checkpoints")
    assert not storage.exists("run/checkpoints")
    assert storage.exists("run/model")


def test_arrow_reads_what_was_written(storage_uri: str) -> None:
    storage = open_storage(storage_uri)
    storage.write_bytes("data/x.bin", b"payload")
    filesystem, path = storage.arrow("data/x.bin")
    with filesystem.open_input_stream(path) as stream:
        assert stream.read() == b"payload"


def test_storages_travel_between_processes(storage_uri: str) -> None:
    storage = open_storage(storage_uri)
    storage.write_bytes("x", b"1")  # an opened client must not stop it
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.uri == storage.uri
    assert copy.read_bytes("x") == b"1"


def test_uri_opens_the_same_place(storage_uri: str) -> None:
    open_storage(storage_uri).child("a").write_bytes("b", b"1")
    assert open_storage(open_storage(storage_uri).child("a").uri).read_bytes("b") == b"1"


def test_uris_are_recognised(tmp_path: Path) -> None:
    assert isinstance(open_storage(str(tmp_path)), LocalStorage)
    assert open_storage(f"file://{tmp_path}").uri == str(tmp_path)
    assert isinstance(open_storage("s3://bucket"), S3Storage)
    assert open_storage("s3://bucket/a/b/").uri == "s3://bucket/a/b"
    with pytest.raises(StorageError, match="names no bucket"):
        open_storage("s3:///prefix")
    with pytest.raises(StorageError, match="storage kind 'gs' is not known"):
        open_storage("gs://bucket/x")


def test_bucket_that_is_not_there_is_a_storage_error(s3_server: str, tmp_path: Path) -> None:
    storage = open_storage("s3://no-such-bucket/x")
    (tmp_path / "file").touch()
    for action in (
        lambda: storage.write_bytes("a", b""),
        lambda: storage.read_bytes("a"),
        lambda: storage.read_range("a", 0, 1),
        lambda: storage.exists("a"),
        lambda: list(storage.keys()),
        lambda: storage.delete("a"),
        lambda: storage.fetch("a"),
        lambda: storage.publish(tmp_path, "a"),
    ):
        with pytest.raises(StorageError, match=r"cannot .* 's3://no-such-bucket/x.*'.*; check the URI"):
            action()


def test_unwritable_place_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot write"):
        LocalStorage(tmp_path / "file").write_bytes("x", b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


WRITER = """
import sys
from pathlib import Path
from sparsight.storage import LocalStorage
storage = LocalStorage(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    for letter in (b"a", b"b"):
        storage.write_bytes("object", letter * 200_000)
"""


def test_a_reader_sees_whole_objects_and_a_killed_writer_leaves_no_other(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write_bytes("object", b"a" * 200_000)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    seen: set[bytes] = set()
    for _ in range(200):
        seen.add(storage.read_bytes("object"))
    writer.kill()
    writer.wait()
    writer.stdout.close()
    assert seen <= {b"a" * 200_000, b"b" * 200_000}
    assert storage.read_bytes("object") in (b"a" * 200_000, b"b" * 200_000)
    assert list(storage.keys()) == ["object"]


def test_many_keys_are_all_listed_and_deleted(new_bucket: Callable[[], str]) -> None:
    storage = open_storage(f"s3://{new_bucket()}")
    names = [f"k{number:04d}" for number in range(35)]  # the server gives 10 a page
    for name in names:
        storage.write_bytes(name, b"")
    assert list(storage.keys()) == names
    storage.delete("")
    assert list(storage.keys()) == []
