"""RLAIF-V's form: Parquet and JSON parts, pictures inside and beside them, and rows that cannot be used."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsight.config import DataConfig, ScenesSource
from sparsight.data.rlaif_v import read_rlaif_v
from sparsight.errors import DataError
from sparsight.records import Quarantined, Sample, Turn, hash_frames

DATA = DataConfig(sources=[ScenesSource(kind="scenes")], max_picture_pixels=10_000)
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_part(path: Path, rows: list[dict[str, Any]]) -> None:
    names = ("ds_name", "question", "chosen", "rejected", "origin_dataset")
    columns = {name: pa.array([row.get(name) for row in rows], pa.string()) for name in names}
    pictures = pa.array([row.get("image") for row in rows], IMAGE)
    pq.write_table(pa.table({**columns, "image": pictures}), path)


def row_of(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "ds_name": "RLAIF-V",
        "question": f"What is in picture {number}?",
        "chosen": f"A shape, number {number}.",
        "rejected": f"Two dogs, number {number}.",
        "origin_dataset": "LCS-558K",
        "image": None,
    }
    return {**row, **changes}


def test_parts_are_read_in_order(tmp_path: Path, picture_bytes: Callable[..., bytes]) -> None:
    red, blue = picture_bytes("red"), picture_bytes("blue")
    write_part(tmp_path / "part_001.parquet", [row_of(2, image={"bytes": blue, "path": None}, origin_dataset=None)])
    write_part(tmp_path / "part_000.parquet", [row_of(n, image={"bytes": red, "path": "x.png"}) for n in range(2)])
    rows = read_rlaif_v(tmp_path, DATA)
    samples = list(rows.items)
    assert rows.total == 3
    assert samples == [
        Sample(
            f"rlaif_v/part_00{number // 2}.parquet/{number % 2}",
            (blue if number == 2 else red,),
            (
                Turn(f"What is in picture {number}?", f"A shape, number {number}."),
                Turn(f"What is in picture {number}?", f"Two dogs, number {number}."),
            ),
            "rlaif_v" if number == 2 else "LCS-558K",
            independent=True,
        )
        for number in range(3)
    ]


@pytest.mark.parametrize("lines", [False, True])
def test_json_parts_hold_names_or_base64(tmp_path: Path, picture_bytes: Callable[..., bytes], lines: bool) -> None:
    red, blue = picture_bytes("red"), picture_bytes("blue")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "blue.png").write_bytes(blue)
    rows = [
        row_of(0, image={"bytes": base64.b64encode(red).decode(), "path": "red.png"}),
        row_of(1, image="pictures/blue.png"),
        row_of(2, image={"bytes": None, "path": "pictures/blue.png"}, question="<image>\nWhat?"),
    ]
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    path = tmp_path / ("pairs.jsonl" if lines else "pairs.json")
    path.write_text(text)
    samples = [row for row in read_rlaif_v(path, DATA).items if isinstance(row, Sample)]
    assert [sample.frames[0] for sample in samples] == [red, blue, blue]
    assert samples[2].turns[0].question == "What?"


def test_unusable_rows_say_why(tmp_path: Path, picture_bytes: Callable[..., bytes]) -> None:
    good = {"bytes": picture_bytes("red"), "path": None}
    rows = [
        row_of(0, image=good, question=" "),
        row_of(1, image=good, chosen=None),
        row_of(2, image=good, rejected="a SHAPE,  number 2."),
        row_of(3),
        row_of(4, image={"bytes": b"no picture", "path": None}),
        row_of(5, image={"bytes": None, "path": "../secret.png"}),
        row_of(6, image={"bytes": None, "path": "missing.png"}),
        row_of(7, image={"bytes": picture_bytes("red", (200, 200)), "path": None}),
        row_of(8, image=good),
    ]
    write_part(tmp_path / "part.parquet", rows)
    *refused, used = read_rlaif_v(tmp_path, DATA).items
    assert isinstance(used, Sample)
    words = ["no question", "no chosen", "the same", "no picture", "not a readable", "leads out", "missing", "pixels"]
    for row, word in zip(refused, words, strict=True):
        assert isinstance(row, Quarantined)
        assert word in row.reason
        assert row.source == str(tmp_path / "part.parquet")


def test_json_rows_of_any_type_are_refused(tmp_path: Path) -> None:
    odd = [None, 3, "text", [], {"question": 4}, row_of(0, image={"bytes": "!!", "path": None}), row_of(1, image=[1])]
    (tmp_path / "pairs.json").write_text(json.dumps(odd))
    assert all(isinstance(row, Quarantined) for row in read_rlaif_v(tmp_path / "pairs.json", DATA).items)


def test_pictures_of_evaluation_sets_are_refused(tmp_path: Path, picture_bytes: Callable[..., bytes]) -> None:
    red, blue = picture_bytes("red"), picture_bytes("blue")
    rows = [row_of(number, image={"bytes": picture, "path": None}) for number, picture in enumerate((red, blue))]
    write_part(tmp_path / "part.parquet", rows)
    first, second = read_rlaif_v(tmp_path, DATA, held_out={hash_frames([red])}).items
    assert isinstance(first, Quarantined)
    assert "evaluation set" in first.reason
    assert isinstance(second, Sample)


def test_what_is_no_store_of_pairs_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no Parquet or JSON"):
        read_rlaif_v(tmp_path, DATA)
    pq.write_table(pa.table({"question": ["?"]}), tmp_path / "part.parquet")
    with pytest.raises(DataError, match=r"no column .'chosen', 'rejected', 'image'"):
        read_rlaif_v(tmp_path, DATA)
    (tmp_path / "part.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match="not a readable Parquet"):
        read_rlaif_v(tmp_path, DATA)
    (tmp_path / "part.parquet").unlink()
    (tmp_path / "pairs.json").write_text("{}")
    with pytest.raises(DataError, match="list of pairs"):
        list(read_rlaif_v(tmp_path, DATA).items)
