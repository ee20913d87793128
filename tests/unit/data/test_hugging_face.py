"""The Hugging Face importer: saved datasets and Parquet files, in the forms that public datasets come in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsight.config import DataConfig, HuggingFaceSource
from sparsight.data.hugging_face import read_hugging_face
from sparsight.errors import DataError
from sparsight.records import Quarantined, Sample, Turn


def read(path: Path, **settings: Any) -> tuple[list[Sample], list[Quarantined]]:
    source = HuggingFaceSource(kind="hugging_face", path=str(path), **settings)
    total, items = read_hugging_face(source, DataConfig(sources=[source], turns_per_sample=2))
    rows = list(items)
    assert len(rows) >= total
    good = [row for row in rows if isinstance(row, Sample)]
    return good, [row for row in rows if isinstance(row, Quarantined)]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


def saved(columns: dict[str, list[Any]], path: Path, image_feature: bool = True) -> datasets.Dataset:
    dataset = datasets.Dataset.from_dict(columns)
    if image_feature:
        dataset = dataset.cast_column("image", datasets.Image())
    dataset.save_to_disk(str(path))
    return dataset


def test_a_saved_dataset_with_an_image_feature(tmp_path: Path, picture_bytes: Callable[..., bytes]) -> None:
    pictures = [picture_bytes(colour) for colour in ("red", "blue", "green")]
    columns = {
        "image": [{"bytes": data, "path": None} for data in pictures],
        "question": ["what?", "which?", "who?"],
        "answer": ["a", "b", "c"],
        "other": [1, 2, 3],
    }
    saved(columns, tmp_path / "set")
    good, bad = read(tmp_path / "set")
    assert bad == []
    assert [sample.id for sample in good] == [f"hugging_face/set/{row}" for row in range(3)]
    assert [sample.frames for sample in good] == [(data,) for data in pictures]
    assert [sample.turns for sample in good] == [
        (Turn("what?", "a"),),
        (Turn("which?", "b"),),
        (Turn("who?", "c"),),
    ]


def test_a_saved_selection_keeps_to_its_rows(tmp_path: Path, picture_bytes: Callable[..., bytes]) -> None:
    """A shuffled or filtered dataset is stored as rows and a choice among them."""
    columns = {
        "image": [picture_bytes(colour) for colour in ("red", "blue", "green")],
        "question": ["0?", "1?", "2?"],
        "answer": ["a", "b", "c"],
    }
    datasets.Dataset.from_dict(columns).select([2, 0]).save_to_disk(str(tmp_path / "set"))
    assert [sample.turns[0].question for sample in read(tmp_path / "set")[0]] == ["2?", "0?"]


def test_a_saved_dictionary_of_splits(tmp_path: Path, picture_bytes: Callable[..., bytes]) -> None:
    one = datasets.Dataset.from_dict({"image": [picture_bytes()], "question": ["train?"], "answer": ["a"]})
    two = datasets.Dataset.from_dict({"image": [picture_bytes()], "question": ["test?"], "answer": ["a"]})
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk(str(tmp_path / "set"))
    good, _ = read(tmp_path / "set", split="test")
    assert [(sample.id, sample.turns[0].question) for sample in good] == [("hugging_face/set/test/0", "test?")]
    with pytest.raises(DataError, match=r"has the splits \['test', 'train'\]"):
        read(tmp_path / "set")


def test_parquet_files_with_other_columns(tmp_path: Path, picture_bytes: Callable[..., bytes]) -> None:
    for part in range(2):
        columns = {
            "picture": [{"bytes": picture_bytes(), "path": "x.png"}],
            "q": [[f"{part}?", "second?", "third?"]],
            "a": [["x", "y", "z"]],
        }
        pq.write_table(pa.table(columns), tmp_path / f"train-{part:05d}-of-00002.parquet")
    pq.write_table(pa.table(columns), tmp_path / "test-00000-of-00001.parquet")
    names = {"picture_column": "picture", "question_column": "q", "answer_column": "a"}
    good, bad = read(tmp_path, split="train", **names)
    assert bad == []
    stem = f"hugging_face/{tmp_path.stem}/train"
    assert [sample.id for sample in good] == [f"{stem}/0/0", f"{stem}/0/1", f"{stem}/1/0", f"{stem}/1/1"]
    assert [turn.question for sample in good[2:] for turn in sample.turns] == ["1?", "second?", "third?"]
    assert len(read(tmp_path / "test-00000-of-00001.parquet", **names)[0]) == 2
    with pytest.raises(DataError, match="no Parquet files of split 'validation'"):
        read(tmp_path, split="validation", **names)


def test_a_conversation_column(tmp_path: Path, picture_bytes: Callable[..., bytes]) -> None:
    conversation = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "this"}]
    pq.write_table(pa.table({"image": [[picture_bytes()]], "talk": [conversation]}), tmp_path / "x.parquet")
    good, _ = read(tmp_path / "x.parquet", conversation_column="talk")
    assert good[0].turns == (Turn("what?", "this"),)


def test_unusable_rows_are_quarantined(tmp_path: Path, picture_bytes: Callable[..., bytes]) -> None:
    fine = {"bytes": picture_bytes(), "path": None}
    rows = [
        (fine, "what?", "this", None),
        ({"bytes": picture_bytes()[:50], "path": None}, "what?", "this", "broken or cut short"),
        ({"bytes": None, "path": "/etc/passwd"}, "what?", "this", "only a picture's path"),
        (None, "<image> what?", "this", "the row holds no picture"),
        (fine, None, "this", "no text"),
        (fine, "what?", " ", "answer 0 is empty"),
        (fine, "what?", "that", None),
    ]
    table = pa.table(
        {
            "image": pa.array([row[0] for row in rows], pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "question": [row[1] for row in rows],
            "answer": [row[2] for row in rows],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    good, bad = read(tmp_path / "x.parquet")
    assert [sample.id for sample in good] == ["hugging_face/x/0", "hugging_face/x/6"]
    assert [row.id for row in bad] == [f"hugging_face/x/{index}" for index in range(1, 6)]
    for row, (_, _, _, reason) in zip(bad, rows[1:6], strict=True):
        assert str(reason) in row.reason


@pytest.mark.parametrize(
    "cells",
    [
        pa.array([None, None], pa.binary()),
        pa.array([None, {"bytes": None, "path": None}], pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        pa.array([[], [None]], pa.list_(pa.binary())),
    ],
)
def test_a_row_without_a_picture_is_text_alone(tmp_path: Path, cells: pa.Array) -> None:
    pq.write_table(pa.table({"image": cells, "question": ["0?", "1?"], "answer": ["a", "b"]}), tmp_path / "x.parquet")
    good, bad = read(tmp_path / "x.parquet")
    assert bad == []
    assert [(sample.frames, sample.frame_times_s, sample.turns[0].question) for sample in good] == [
        ((), (), "0?"),
        ((), (), "1?"),
    ]


def test_a_picture_that_is_no_bytes_is_quarantined(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a.png"], "question": ["what?"], "answer": ["a"]}), tmp_path / "x.parquet")
    good, (bad,) = read(tmp_path / "x.parquet")
    assert good == []
    assert "is a str, not bytes" in bad.reason


def test_unequal_lists_and_several_pictures_are_quarantined(
    tmp_path: Path, picture_bytes: Callable[..., bytes]
) -> None:
    table = pa.table(
        {
            "image": [[picture_bytes()], [picture_bytes()] * 2],
            "question": [["a?", "b?"], ["a?"]],
            "answer": [["a"], ["a"]],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    good, bad = read(tmp_path / "x.parquet")
    assert good == []
    assert "2 questions and 1 answers" in bad[0].reason
    assert "2 pictures, one is the most" in bad[1].reason


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset at '.*absent'"):
        read(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no Parquet files"):
        read(tmp_path)
    pq.write_table(pa.table({"image": [b""], "text": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"no column \['question', 'answer'\], only \['image', 'text'\]"):
        read(tmp_path)
    (tmp_path / "y.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(DataError, match=r"y\.parquet' is not a readable Parquet file"):
        read(tmp_path)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        read(tmp_path / "saved")
