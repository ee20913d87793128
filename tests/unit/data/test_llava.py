"""The LLaVA importer: good rows come through, each kind of bad row is quarantined with a reason, none is replaced."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsight.config import DataConfig, LlavaSource
from sparsight.data.llava import read_llava
from sparsight.errors import DataError
from sparsight.records import Quarantined, Sample, Turn


def record(image: Any, turns: int = 1, **more: Any) -> dict[str, Any]:
    messages = []
    for index in range(turns):
        messages.append({"from": "human", "value": ("<image>\n" if index == 0 else "") + f"what {index}?"})
        messages.append({"from": "gpt", "value": f"this {index}"})
    return {"image": image, "conversations": messages, **more}


@pytest.fixture
def pictures(tmp_path: Path, picture_bytes: Callable[..., bytes]) -> Path:
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.png").write_bytes(picture_bytes("red"))
    (folder / "deep" / "b.jpg").write_bytes(picture_bytes("blue", kind="JPEG"))
    (folder / "broken.png").write_bytes(picture_bytes("red")[:50])
    (folder / "notes.txt").write_text("no picture")
    (folder / "large.png").write_bytes(picture_bytes("red", size=(200, 200)))
    (tmp_path / "secret.png").write_bytes(picture_bytes("green"))
    return folder


def read(pictures: Path, records: Any, name: str = "train.json") -> tuple[list[Sample], list[Quarantined]]:
    path = pictures.parent / name
    path.write_text(json.dumps(records) if not isinstance(records, str) else records)
    source = LlavaSource(kind="llava", path=str(path), pictures=str(pictures))
    data = DataConfig(sources=[source], turns_per_sample=3, max_picture_pixels=10_000, max_picture_bytes=100_000)
    rows = list(read_llava(source, data).items)
    good = [row for row in rows if isinstance(row, Sample)]
    return good, [row for row in rows if isinstance(row, Quarantined)]


def test_good_records_become_samples(pictures: Path) -> None:
    good, bad = read(
        pictures, [record("a.png", id="first"), record("deep/b.jpg", turns=2), record("a.png", id="first")]
    )
    assert bad == []
    assert [sample.id for sample in good] == ["llava/train/0/first", "llava/train/1", "llava/train/2/first"]
    assert good[1].turns == (Turn("what 0?", "this 0"), Turn("what 1?", "this 1"))
    assert good[1].frames == ((pictures / "deep" / "b.jpg").read_bytes(),)
    assert good[0].content_hash == good[2].content_hash != good[1].content_hash


def test_long_conversations_are_cut_in_order(pictures: Path) -> None:
    good, _ = read(pictures, [record("a.png", turns=7)])
    assert [sample.id for sample in good] == ["llava/train/0/0", "llava/train/0/1", "llava/train/0/2"]
    assert [turn.answer for sample in good for turn in sample.turns] == [f"this {index}" for index in range(7)]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("absent.png", "the picture file is missing"),
        ("deep", "the picture file is missing"),
        ("broken.png", "broken or cut short"),
        ("notes.txt", "not a readable PNG"),
        ("large.png", "200 x 200 = 40000 pixels"),
        ("../secret.png", "leads out of the picture folder"),
        ("deep/../../secret.png", "leads out of the picture folder"),
        ("..\\secret.png", "leads out of the picture folder"),
        ("/etc/passwd", "leads out of the picture folder"),
        ("C:\\secret.png", "leads out of the picture folder"),
        ("a\0.png", "cannot be read|missing"),
        (None, "shows an <image>, but the row holds no picture"),
        (7, "must be one file name"),
        (["a.png", "deep/b.jpg"], "must be one file name"),
        ("", "must be one file name"),
    ],
)
def test_unusable_pictures_are_quarantined(pictures: Path, image: Any, reason: str) -> None:
    good, bad = read(pictures, [record("a.png"), record(image, id=7), record("a.png")])
    assert [sample.id for sample in good] == ["llava/train/0", "llava/train/2"]
    assert [row.id for row in bad] == ["llava/train/1/7"]
    assert bad[0].source.endswith("train.json")
    with pytest.raises(DataError, match=reason):
        raise DataError(bad[0].reason)


def test_a_record_without_a_picture_is_text_alone(pictures: Path) -> None:
    talk = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "this"}]
    good, bad = read(
        pictures, [{"conversations": talk}, {"image": None, "conversations": talk * 4, "id": "x"}, record("a.png")]
    )
    assert bad == []
    assert [sample.id for sample in good] == [
        "llava/train/0",
        "llava/train/1/x",
        "llava/train/2",
    ]
    assert [(len(sample.frames), len(sample.frame_times_s)) for sample in good] == [(0, 0)] * 2 + [(1, 1)]
    assert good[0].turns == (Turn("what?", "this"),)


@pytest.mark.parametrize("row", ["words", 3, None, {"image": "a.png"}, {"image": "a.png", "conversations": [{}]}])
def test_records_of_another_form_are_quarantined(pictures: Path, row: Any) -> None:
    good, bad = read(pictures, [row, record("a.png")])
    assert (len(good), [entry.id for entry in bad]) == (1, ["llava/train/0"])


def test_a_picture_over_the_byte_limit_is_not_read(pictures: Path) -> None:
    with (pictures / "huge.png").open("wb") as file:
        file.truncate(10**12)  # sparse: a terabyte that nobody could read
    good, bad = read(pictures, [record("huge.png")])
    assert good == []
    assert "1000000000000 bytes, the limit is 100000" in bad[0].reason


def test_json_lines_are_read_too(pictures: Path) -> None:
    good, _ = read(pictures, json.dumps(record("a.png")) + "\n\n" + json.dumps(record("a.png")) + "\n", "x.jsonl")
    assert [sample.id for sample in good] == ["llava/x/0", "llava/x/1"]
    with pytest.raises(DataError, match=r"x\.jsonl' is not valid JSON: line 3, column 1:"):
        read(pictures, '{"a": 1}\n\nwords\n', "x.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n  {"id": 1,\n   "image" "a.png"}\n]', r"train\.json' is not valid JSON: line 3, column 12"),
        ("[{}", r"train\.json' is not valid JSON: line 1"),
        ("", r"train\.json' is not valid JSON: line 1"),
        ('{"id": 1}', r"train\.json' must be a list of records, not a dict"),
    ],
)
def test_wrong_json_is_named_by_file_and_line(pictures: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(pictures, text)


def test_missing_files_are_named(pictures: Path) -> None:
    data = DataConfig(sources=[{"kind": "scenes"}])  # type: ignore[list-item]
    absent = str(pictures / "absent.json")
    with pytest.raises(DataError, match=r"cannot read '.*absent\.json'"):
        read_llava(LlavaSource(kind="llava", path=absent, pictures=str(pictures)), data)
    (pictures.parent / "empty.json").write_text("[]")
    empty = str(pictures.parent / "empty.json")
    source = LlavaSource(kind="llava", path=empty, pictures=str(pictures / "nowhere"))
    with pytest.raises(DataError, match=r"picture folder '.*nowhere' of '.*empty\.json' is missing"):
        read_llava(source, data)
