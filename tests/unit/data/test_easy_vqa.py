"""The easy-VQA importer against the package's own files, and against damaged copies."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from sparsight.config import DataConfig, EasyVqaSource
from sparsight.data.easy_vqa import find_folder, read_easy_vqa
from sparsight.errors import DataError
from sparsight.media.images import encode_png
from sparsight.records import Quarantined, Sample

SOURCE = EasyVqaSource(kind="easy_vqa", limit=60)
DATA = DataConfig(sources=[SOURCE], turns_per_sample=4)


def read(source: EasyVqaSource = SOURCE, split: str = "train", seed: int = 0) -> tuple[list[Sample], list[Quarantined]]:
    total, items = read_easy_vqa(source, split, DATA, seed)  # type: ignore[arg-type]
    rows = list(items)
    assert len(rows) == total
    good = [row for row in rows if isinstance(row, Sample)]
    return good, [row for row in rows if isinstance(row, Quarantined)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_question_of_the_files_is_there_once(split: str) -> None:
    folder = find_folder(SOURCE) / split
    expected: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for question, answer, picture in json.loads((folder / "questions.json").read_text()):
        if picture < 60:
            expected[str(picture)][question, answer] += 1
    samples, bad = read(split=split)
    found: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for sample in samples:
        kind, found_split, picture, part = sample.id.split("/")
        assert (kind, found_split) == ("easy_vqa", split)
        assert part.isdigit()
        assert sample.frames == ((folder / "images" / f"{picture}.png").read_bytes(),)
        assert 1 <= len(sample.turns) <= 4
        found[picture].update((turn.question, str(turn.answer)) for turn in sample.turns)
    assert found == expected
    assert bad == []
    assert len({sample.id for sample in samples}) == len(samples)


def test_answer_types_follow_the_answers() -> None:
    for sample in read()[0]:
        for turn in sample.turns:
            if turn.answer_type == "yes_no":
                assert turn.answer in ("yes", "no")
            elif turn.answer_type == "shape":
                assert turn.answer in ("circle", "rectangle", "triangle")
            else:
                assert turn.answer_type == "colour"
                assert turn.answer in ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def test_the_seed_orders_training_turns_only() -> None:
    assert read(seed=1) == read(seed=1)
    assert read(seed=1) != read(seed=2)
    assert read(split="test", seed=1) == read(split="test", seed=2)


@pytest.fixture
def copy(tmp_path: Path) -> EasyVqaSource:
    """A small folder of the same form: 3 pictures with 2 questions each in both splits."""
    from PIL import Image

    for split in ("train", "test"):
        (tmp_path / split / "images").mkdir(parents=True)
        for picture in range(3):
            data = encode_png(Image.new("RGB", (64, 64), (picture, 0, 0)))
            (tmp_path / split / "images" / f"{picture}.png").write_bytes(data)
        rows = [[text, "yes", picture] for picture in range(3) for text in ("is it?", "is it not?")]
        (tmp_path / split / "questions.json").write_text(json.dumps(rows))
    return EasyVqaSource(kind="easy_vqa", path=str(tmp_path))


def test_bad_pictures_are_quarantined_with_their_file(copy: EasyVqaSource) -> None:
    images = Path(str(copy.path)) / "train" / "images"
    (images / "0.png").unlink()
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:60])
    good, bad = read(copy)
    assert [sample.id for sample in good] == ["easy_vqa/train/1/0"]
    assert [(row.id, row.source) for row in bad] == [
        ("easy_vqa/train/0/0", str(images / "0.png")),
        ("easy_vqa/train/2/0", str(images / "2.png")),
    ]
    assert "missing" in bad[0].reason
    assert "broken or cut short" in bad[1].reason


def test_bad_rows_are_quarantined_with_their_number(copy: EasyVqaSource) -> None:
    path = Path(str(copy.path)) / "train" / "questions.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([["no picture", "yes"], *rows, ["what?", 3, 1], "words", ["what?", "", 1]]))
    good, bad = read(copy)
    assert len(good) == 3
    assert [row.id for row in bad] == [f"easy_vqa/train/row {index}" for index in (0, 7, 8, 9)]


def test_broken_json_is_named_by_file_and_line(copy: EasyVqaSource) -> None:
    path = Path(str(copy.path)) / "train" / "questions.json"
    path.write_text('[\n["a", "yes", 0],\n["b", "yes" 1]\n]')
    with pytest.raises(DataError, match=r"questions\.json' is not valid JSON: line 3, column 13"):
        read(copy)
    path.write_text('{"a": 1}')
    with pytest.raises(DataError, match="must be a list of"):
        read(copy)
    path.write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match="not UTF-8"):
        read(copy)


def test_a_folder_without_the_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no easy-VQA data"):
        find_folder(EasyVqaSource(kind="easy_vqa", path=str(tmp_path)))
