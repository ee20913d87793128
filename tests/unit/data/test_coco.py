"""COCO-style annotation files: objects by hand from a small file of the real form, and one clear error for bad ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsight.config import CocoSource
from sparsight.data.coco import read_coco
from sparsight.errors import DataError


def box(picture: int, category: int, number: int) -> dict[str, Any]:
    """An annotation as COCO writes them; boxes and outlines are there, and not read."""
    return {
        "id": number,
        "image_id": picture,
        "category_id": category,
        "bbox": [1.5, 2.0, 30.25, 40.0],
        "segmentation": [[1.5, 2.0, 31.75, 2.0, 31.75, 42.0]],
        "area": 1210.0,
        "iscrowd": 0,
    }


def instances() -> dict[str, Any]:
    return {
        "info": {"year": 2014},
        "licenses": [],
        "images": [
            {"id": 9, "file_name": "val/b.jpg", "height": 48, "width": 64, "license": 3},
            {"id": 42, "file_name": "val/a.jpg", "height": 48, "width": 64, "license": 3},
            {"id": 7, "file_name": "val/c.jpg", "height": 48, "width": 64, "license": 3},
        ],
        "annotations": [box(42, 18, 1), box(42, 58, 2), box(9, 1, 3), box(9, 1, 4), box(9, 18, 5)],
        "categories": [
            {"id": 1, "name": "person", "supercategory": "person"},
            {"id": 18, "name": "dog", "supercategory": "animal"},
            {"id": 58, "name": "hot dog", "supercategory": "food"},
        ],
    }


Write = Callable[..., CocoSource]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(content: Any, captions: Any = None) -> CocoSource:
        (tmp_path / "instances.json").write_text(content if isinstance(content, str) else json.dumps(content))
        (tmp_path / "captions.json").write_text(json.dumps(captions))
        (tmp_path / "pictures").mkdir(exist_ok=True)
        return CocoSource(
            kind="coco",
            annotations=str(tmp_path / "instances.json"),
            pictures=str(tmp_path / "pictures"),
            captions=None if captions is None else str(tmp_path / "captions.json"),
        )

    return write


def test_objects_by_picture(write: Write) -> None:
    found = read_coco(write(instances()))
    assert found.objects_of == {"val/a.jpg": ("dog", "hot dog"), "val/b.jpg": ("dog", "person"), "val/c.jpg": ()}
    assert found.vocabulary.objects == ("person", "dog", "hot dog")
    assert found.vocabulary.mentions("two men eat hot dogs beside a puppy and a cat") == ["person", "hot dog", "dog"]


def test_what_captions_mention_is_there_too(write: Write) -> None:
    captions = {
        "annotations": [
            {"image_id": 7, "id": 1, "caption": "A woman sits alone."},
            {"image_id": 7, "id": 2, "caption": "No dog in sight."},
            {"image_id": 42, "id": 3, "caption": "A dog eats a hotdog."},
            {"image_id": 1000, "id": 4, "caption": "A person of another split."},
        ]
    }
    found = read_coco(write(instances(), captions))
    assert found.objects_of == {
        "val/a.jpg": ("dog", "hot dog"),
        "val/b.jpg": ("dog", "person"),
        "val/c.jpg": ("person",),
    }


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    content = instances()
    change(content)
    return content


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "not valid JSON: line 1"),
        ("[]", "has no list 'categories'"),
        (changed(lambda it: it.pop("images")), "has no list 'images'"),
        (changed(lambda it: it.update(annotations={})), "has no list 'annotations'"),
        (changed(lambda it: it.update(images=[])), "lists no images"),
        (changed(lambda it: it["images"].append("x")), "row 3 of 'images' is a str"),
        (changed(lambda it: it["images"][1].pop("file_name")), "row 1 of 'images' has no id or no file_name"),
        (changed(lambda it: it["images"][2].update(id="7")), "row 2 of 'images' has no id"),
        (changed(lambda it: it["images"][2].update(id=9)), "row 2 of 'images' has the id 9 of another row"),
        (changed(lambda it: it["images"][2].update(file_name="val/a.jpg")), "gives one file_name to two rows"),
        (changed(lambda it: it["categories"][2].update(name="dog")), "gives one name to two rows of 'categories'"),
        (changed(lambda it: it["categories"][0].update(name=" ")), "row 0 of 'categories' has no id or no name"),
        (changed(lambda it: it["annotations"][4].update(category_id=2)), "row 4 of 'annotations' has no image_id or"),
        (changed(lambda it: it["annotations"][0].pop("image_id")), "row 0 of 'annotations' has no image_id or"),
    ],
)
def test_a_bad_file_is_one_clear_error(write: Write, content: Any, fault: str) -> None:
    with pytest.raises(DataError) as caught:
        read_coco(write(content))
    assert fault in str(caught.value)
    assert "instances.json" in str(caught.value)


@pytest.mark.parametrize(
    ("captions", "fault"),
    [
        ({}, "has no list 'annotations'"),
        ({"annotations": [{"image_id": 7}]}, "row 0 of 'annotations' has no image_id or no caption"),
        ({"annotations": [{"image_id": 8, "caption": "a dog"}]}, "has no caption of any picture"),
    ],
)
def test_bad_captions_are_one_clear_error(write: Write, captions: Any, fault: str) -> None:
    with pytest.raises(DataError, match=r"captions\.json") as caught:
        read_coco(write(instances(), captions))
    assert fault in str(caught.value)


@pytest.mark.parametrize("field", ["annotations", "pictures", "captions"])
def test_missing_files_are_named(write: Write, field: str) -> None:
    source = write(instances()).model_copy(update={field: "/not/there"})
    with pytest.raises(DataError, match="/not/there"):
        read_coco(source)
