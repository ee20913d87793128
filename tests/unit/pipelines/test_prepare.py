"""Preparation: rows are accounted for, pictures stay on one side, and finished work is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.prepare import plan, prepare
from sparsight.artifacts import RunDirectory
from sparsight.config import RunConfig
from sparsight.data.objects import VOCABULARY, ObjectVocabulary
from sparsight.data.samples import read_samples
from sparsight.data.streams import QuestionedStream, iter_streams
from sparsight.errors import DataError
from sparsight.records import Sample
from tests.quarantine import read_quarantine

STAGE = {"name": "mimic", "terms": {"forward_kl": 1.0}, "steps": 10}
SCENES = {"kind": "scenes", "pictures": 60, "test_pictures": 20}


def config(run_dir: str, sources: list[dict[str, Any]], seed: int = 0, **data: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": run_dir,
            "seed": seed,
            "data": {"sources": sources, **data},
            "teacher": {"kind": "tiny", "stages": [STAGE]},
            "distill": {"students": [{"name": "sparse", "stages": [STAGE]}]},
        }
    )


def samples(run_dir: str, name: str) -> list[Sample]:
    storage, _ = RunDirectory(run_dir).finished(f"samples/{name}", "samples")
    return read_samples(storage)


def pictures(run_dir: str, name: str) -> set[str]:
    return {sample.content_hash for sample in samples(run_dir, name)}


def fingerprints(run_dir: str) -> dict[str, tuple[str, bytes]]:
    storage = RunDirectory(run_dir).storage
    names = sorted({key.split("/")[1] for key in storage.keys("samples")})
    return {
        name: (
            RunDirectory(run_dir).finished(f"samples/{name}")[1].fingerprint,
            storage.read_bytes(f"samples/{name}/part-00000.parquet"),
        )
        for name in names
    }


@pytest.fixture
def llava(tmp_path: Path, picture_bytes: Callable[..., bytes]) -> dict[str, Any]:
    """30 rows about 10 pictures, two of them unreadable: 24 good rows, 6 bad ones."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(10):
        data = picture_bytes(f"#{number:02d}0000")
        (folder / f"{number}.png").write_bytes(data if number > 1 else data[:50])
    talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a thing"}]
    records = [{"image": f"{number % 10}.png", "conversations": talk} for number in range(30)]
    (tmp_path / "rows.json").write_text(json.dumps(records))
    return {"kind": "llava", "path": str(tmp_path / "rows.json"), "pictures": str(folder)}


def test_every_row_is_accounted_for(tmp_path: Path, llava: dict[str, Any]) -> None:
    run = str(tmp_path / "run")
    prepare(config(run, [llava, SCENES], validation_fraction=0.1, ground_truth_fraction=0.25))
    for name in ("teacher", "student", "validation", "test_scenes", "test_pope"):
        storage, manifest = RunDirectory(run).finished(f"samples/{name}")
        counts, rows = manifest.counts, read_samples(storage)
        assert counts["input"] == counts["samples"] + counts["quarantined"]
        assert counts["samples"] == len(rows)
        assert counts["quarantined"] == len(read_quarantine(storage))
        assert counts["questions"] == sum(len(row.turns) for row in rows)
        assert counts["pictures"] == len(pictures(run, name))
    bad = read_quarantine(RunDirectory(run).storage.child("samples/teacher"))
    assert [row.id for row in bad] == [f"llava/rows/{index}" for index in (0, 1, 10, 11, 20, 21)]
    good = [row for name in ("teacher", "validation") for row in samples(run, name) if row.source == "llava"]
    assert len(good) + len(bad) == 30
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        "student",
        "teacher",
        "test_pope",
        "test_scenes",
        "validation",
    ]


def test_text_alone_is_dealt_out_one_by_one(tmp_path: Path, llava: dict[str, Any]) -> None:
    run = str(tmp_path / "run")
    records = json.loads(Path(llava["path"]).read_text())
    for number in range(12):
        talk = [{"from": "human", "value": f"what is {number}?"}, {"from": "gpt", "value": "a number"}]
        records.append({"conversations": talk})
    Path(llava["path"]).write_text(json.dumps(records))
    prepare(config(run, [{**llava, "test_fraction": 0.5}], validation_fraction=0.2, ground_truth_fraction=0.5))
    sets = {name: samples(run, name) for name in ("teacher", "student", "validation", "test_llava")}
    for name, rows in sets.items():
        counts = RunDirectory(run).finished(f"samples/{name}")[1].counts
        assert counts["pictures"] == len({row.content_hash for row in rows if row.frames})
    texts = {name: {row.id for row in rows if not row.frames} for name, rows in sets.items()}
    assert texts["teacher"] == texts["student"]
    assert all(texts.values())
    assert sum(len(texts[name]) for name in ("teacher", "validation", "test_llava")) == 12
    known = {row.has_ground_truth for row in sets["student"] if not row.frames}
    assert known == {True, False}


def test_pictures_stay_on_one_side(tmp_path: Path, llava: dict[str, Any]) -> None:
    run = str(tmp_path / "run")
    prepare(config(run, [{**llava, "test_fraction": 0.25}, SCENES], validation_fraction=0.1, ground_truth_fraction=0.2))
    sets = {name: pictures(run, name) for name in ("teacher", "validation", "test_llava", "test_scenes")}
    names = list(sets)
    assert all(not sets[a] & sets[b] for index, a in enumerate(names) for b in names[index + 1 :])
    assert len(sets["test_llava"]) == 2  # of 8 readable
    assert len(sets["validation"]) == round(0.1 * 66)
    assert len(sets["teacher"]) == 66 - len(sets["validation"])
    assert len(samples(run, "test_llava")) == 6  # all three rows of each


def test_the_student_sees_answers_for_a_share_of_whole_pictures(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    prepare(config(run, [SCENES], ground_truth_fraction=0.3, turns_per_sample=3))
    teacher, student = samples(run, "teacher"), samples(run, "student")
    assert [sample.without_answers() for sample in teacher] == [sample.without_answers() for sample in student]
    assert all(sample.has_ground_truth for sample in teacher)
    answered = {sample.content_hash for sample in student if sample.has_ground_truth}
    assert len(answered) == round(0.3 * 60)
    for full, seen in zip(teacher, student, strict=True):
        assert seen == (full if full.content_hash in answered else full.without_answers())
    counts = RunDirectory(run).finished("samples/student")[1].counts
    assert counts["answered_questions"] == sum(len(sample.turns) for sample in student if sample.has_ground_truth)


def test_easy_vqa_keeps_its_official_split(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    prepare(config(run, [{"kind": "easy_vqa", "limit": 20}], turns_per_sample=4))
    assert {sample.id.split("/")[1] for sample in samples(run, "teacher")} == {"train"}
    assert {sample.id.split("/")[1] for sample in samples(run, "test_easy_vqa")} == {"test"}
    assert len(pictures(run, "test_easy_vqa")) == 20
    assert max(len(sample.turns) for sample in samples(run, "test_easy_vqa")) <= 4
    assert not pictures(run, "test_easy_vqa") & pictures(run, "teacher")


def test_same_settings_same_bytes_wherever_it_runs(storage_uri: str, tmp_path: Path) -> None:
    prepare(config(storage_uri, [SCENES], validation_fraction=0.1))
    prepare(config(str(tmp_path / "run"), [SCENES], validation_fraction=0.1))
    assert fingerprints(storage_uri) == fingerprints(str(tmp_path / "run"))


def test_another_seed_makes_other_samples(tmp_path: Path) -> None:
    for seed in (0, 1):
        prepare(config(str(tmp_path / str(seed)), [SCENES], seed=seed))
    one, other = fingerprints(str(tmp_path / "0")), fingerprints(str(tmp_path / "1"))
    assert all(one[name][0] != other[name][0] and one[name][1] != other[name][1] for name in one)


def test_finished_work_is_kept_and_settings_remake_what_depends_on_them(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    prepare(config(run, [SCENES]))
    marks = [tmp_path / "run" / "samples" / name / "mark" for name in ("teacher", "student", "test_scenes")]
    for mark in marks:
        mark.touch()
    prepare(config(run, [SCENES]))
    assert all(mark.exists() for mark in marks)
    prepare(config(run, [SCENES], ground_truth_fraction=0.5))
    assert [mark.exists() for mark in marks] == [True, False, True]
    prepare(config(run, [SCENES], ground_truth_fraction=0.5, turns_per_sample=4))
    assert [mark.exists() for mark in marks] == [False, False, False]


@pytest.fixture
def coco(tmp_path: Path, picture_bytes: Callable[..., bytes]) -> dict[str, Any]:
    """Four annotated pictures, one of them unreadable."""
    folder = tmp_path / "coco"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(picture_bytes(f"#0000{number:02d}") if number else b"no picture")
    content = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(4)],
        "annotations": [{"image_id": number, "category_id": number % 2} for number in range(4)],
        "categories": [{"id": 0, "name": "dog"}, {"id": 1, "name": "hot dog"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return {"kind": "coco", "annotations": str(tmp_path / "instances.json"), "pictures": str(folder)}


def test_questions_about_hallucination_bring_their_vocabulary(tmp_path: Path, coco: dict[str, Any]) -> None:
    run = str(tmp_path / "run")
    prepare(config(run, [SCENES, coco], hallucination={"questions": 1}))
    assert pictures(run, "test_pope") == pictures(run, "test_scenes")
    assert {sample.source for sample in samples(run, "test_coco")} == {"coco"}
    for name, objects, count in (("test_pope", 24, 20), ("test_coco", 2, 3)):
        storage, manifest = RunDirectory(run).finished(f"samples/{name}", "samples")
        vocabulary = ObjectVocabulary.from_json(storage.read_bytes(VOCABULARY))
        assert len(vocabulary.objects) == objects
        assert manifest.counts["pictures"] == count
        assert manifest.counts["questions"] == 5 * count
        for sample in samples(run, name):
            there = set(vocabulary.mentions(str(sample.turns[-1].answer)))
            for turn in sample.turns[:-1]:
                assert (vocabulary.mentions(turn.question)[0] in there) == (turn.answer == "yes")
    bad = read_quarantine(RunDirectory(run).storage.child("samples/test_coco"))
    assert [row.id for row in bad] == ["coco/0.png"]


def test_pictures_for_testing_alone_change_no_training(tmp_path: Path, coco: dict[str, Any]) -> None:
    plain, tested = str(tmp_path / "plain"), str(tmp_path / "tested")
    prepare(config(plain, [SCENES], hallucination={"pictures": 0}))
    prepare(config(tested, [coco, SCENES], hallucination={"questions": 1, "pictures": 3}))
    before, after = fingerprints(plain), fingerprints(tested)
    assert after.keys() - before.keys() == {"test_pope", "test_coco"}
    assert {name: after[name] for name in before} == before


def test_pictures_kept_for_pairs_are_no_others(tmp_path: Path) -> None:
    plain, kept = str(tmp_path / "plain"), str(tmp_path / "kept")
    prepare(config(plain, [SCENES], validation_fraction=0.1))
    prepare(config(kept, [{**SCENES, "pair_pictures": 15}], validation_fraction=0.1))
    before, after = fingerprints(plain), fingerprints(kept)
    assert after.keys() - before.keys() == {"kept"}
    assert {name: after[name] for name in before} == before
    assert len(pictures(kept, "kept")) == 15
    assert all(sample.has_ground_truth for sample in samples(kept, "kept"))
    for name in before:
        assert not pictures(kept, "kept") & pictures(kept, name)


STREAMED = {"kind": "streams", "clips": 12, "test_clips": 6, "streams": 2, "lengths_s": [30, 60], "questions": 9}


def streams(run_dir: str, name: str) -> list[QuestionedStream]:
    return list(iter_streams(RunDirectory(run_dir).finished(f"samples/{name}", "streams")[0]))


def test_clips_are_dealt_like_pictures_and_long_streams_lie_beside_them(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    prepare(config(run, [SCENES, STREAMED], validation_fraction=0.25, ground_truth_fraction=0.5))
    clips = {
        name: {row.content_hash: row for row in samples(run, name) if row.source == "streams"}
        for name in ("teacher", "student", "validation", "test_clips")
    }
    assert clips["teacher"].keys() == clips["student"].keys()
    sets = [set(clips[name]) for name in ("teacher", "validation", "test_clips")]
    assert sum(len(one) for one in sets) == len(set().union(*sets)) == 18
    assert len(clips["test_clips"]) == 6
    assert not all(row.has_ground_truth for row in clips["student"].values())
    assert {len(row.frames) for row in clips["teacher"].values()} <= set(range(1, 17))
    assert not any(turn.evidence for row in clips["student"].values() if not row.has_ground_truth for turn in row.turns)
    tests, validation = streams(run, "test_streams"), streams(run, "validation_streams")
    assert [stream.recipe.seconds for stream in tests] == [30, 30, 60, 60]
    assert not {stream.id for stream in tests} & {stream.id for stream in validation}
    counts = RunDirectory(run).finished("samples/test_streams")[1].counts
    questions = sum(len(stream.questions) for stream in tests)
    assert counts == {"streams": 4, "questions": questions, "frames": 90}


def test_other_long_streams_remake_no_training_samples(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    prepare(config(run, [STREAMED]))
    marks = [tmp_path / "run" / "samples" / name / "mark" for name in ("teacher", "test_clips", "test_streams")]
    for mark in marks:
        mark.touch()
    prepare(config(run, [STREAMED | {"lengths_s": [90]}]))
    assert [mark.exists() for mark in marks] == [True, True, False]
    prepare(config(run, [STREAMED | {"lengths_s": [90], "scene_s": [4, 8]}]))
    assert [mark.exists() for mark in marks] == [False, False, False]


def test_runs_without_long_streams_write_none(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    prepare(config(run, [STREAMED | {"streams": 0, "test_clips": 0}]))
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == ["student", "teacher"]


def test_sources_for_testing_alone_are_not_enough(coco: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="name a source to learn from"):
        config("run", [coco])
    with pytest.raises(ValidationError, match="more than one source of kind coco"):
        config("run", [SCENES, coco, coco])


def test_changed_files_are_imported_anew(tmp_path: Path, llava: dict[str, Any]) -> None:
    run = str(tmp_path / "run")
    prepare(config(run, [llava]))
    before = RunDirectory(run).finished("samples/teacher")[1]
    pictures_folder = Path(llava["pictures"])
    (pictures_folder / "0.png").write_bytes((pictures_folder / "5.png").read_bytes() + b" ")
    prepare(config(run, [llava]))
    after = RunDirectory(run).finished("samples/teacher")[1]
    assert (before.counts["quarantined"], after.counts["quarantined"]) == (6, 3)


def test_what_a_killed_run_left_is_not_mixed_in(tmp_path: Path) -> None:
    clean, killed = str(tmp_path / "clean"), str(tmp_path / "killed")
    prepare(config(clean, [SCENES]))
    prepare(config(killed, [SCENES]))
    storage = RunDirectory(killed).storage
    fingerprint = RunDirectory(killed).finished("samples/student")[1].fingerprint
    part = storage.read_bytes("samples/student/part-00000.parquet")
    storage.delete("samples/student/manifest.json")  # as if killed just before the end
    storage.write_bytes("samples/student/draft.json", json.dumps({"fingerprint": fingerprint}).encode())
    storage.write_bytes("samples/student/part-00007.parquet", part)
    storage.write_bytes("samples/imported/part-00003.parquet", part)
    prepare(config(killed, [SCENES]))
    assert fingerprints(killed) == fingerprints(clean)
    assert samples(killed, "student") == samples(clean, "student")


def test_two_sources_of_one_kind_keep_their_own_shares(
    tmp_path: Path, llava: dict[str, Any], picture_bytes: Callable[..., bytes]
) -> None:
    run = str(tmp_path / "run")
    records = json.loads(Path(llava["path"]).read_text())[:10]
    (tmp_path / "others").mkdir()
    for number in range(10):
        (tmp_path / "others" / f"{number}.png").write_bytes(picture_bytes(f"#0000{number:02d}"))
    (tmp_path / "more.json").write_text(json.dumps(records))
    other = {"kind": "llava", "path": str(tmp_path / "more.json"), "pictures": str(tmp_path / "others")}
    prepare(config(run, [{**llava, "test_fraction": 0.25}, {**other, "test_fraction": 0.4}, SCENES]))
    held_out = samples(run, "test_llava")
    for name, count in (("rows", 2), ("more", 4)):  # of 8 and of 10 readable pictures
        assert len({row.content_hash for row in held_out if row.id.split("/")[1] == name}) == count
    assert not pictures(run, "test_llava") & pictures(run, "teacher")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            [SCENES, SCENES],
            "sources 0 and 1 would both give rows named 'scenes/…': a run has one source of kind scenes",
        ),
        (
            [
                SCENES,
                {"kind": "llava", "path": "a/rows.json", "pictures": "a"},
                {"kind": "llava", "path": "b/rows.jsonl", "pictures": "b"},
            ],
            "sources 1 and 2 would both give rows named 'llava/rows/…': give one of the files another name",
        ),
        (
            [{"kind": "hugging_face", "path": "a/b", "split": "train"}, {"kind": "hugging_face", "path": "c/b"}],
            "sources 1 and 0 would both give rows named 'hugging_face/b/…'",
        ),
    ],
)
def test_sources_whose_rows_cannot_be_told_apart_are_refused(sources: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config("run", sources)


def test_splits_of_one_dataset_are_two_sources() -> None:
    folder = {"kind": "hugging_face", "path": "a/b"}
    assert len(config("run", [{**folder, "split": "train"}, {**folder, "split": "more"}]).data.sources) == 2


def test_a_source_without_a_usable_row_is_refused(tmp_path: Path, llava: dict[str, Any]) -> None:
    for path in Path(llava["pictures"]).iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(
        DataError, match=r"source 'llava' gave no usable row, 30 were quarantined; .*not a readable PNG"
    ):
        prepare(config(str(tmp_path / "run"), [SCENES, llava]))


def test_a_set_that_would_be_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'samples/validation' would be empty"):
        prepare(config(str(tmp_path / "run"), [SCENES], validation_fraction=0.001))


def test_missing_sources_are_named(tmp_path: Path, llava: dict[str, Any]) -> None:
    absent = str(tmp_path / "absent")
    for source in (
        {"kind": "easy_vqa", "path": absent},
        {**llava, "path": absent},
        {**llava, "pictures": absent},
        {"kind": "hugging_face", "path": absent},
        {"kind": "coco", "annotations": absent, "pictures": str(tmp_path)},
    ):
        with pytest.raises(DataError, match="absent"):
            prepare(config(str(tmp_path / "run"), [SCENES, source]))


def test_the_plan_names_what_is_left_to_do(tmp_path: Path) -> None:
    settings = config(str(tmp_path / "run"), [SCENES], validation_fraction=0.1)
    names = [f"samples/{name}" for name in ("teacher", "student", "validation", "test_scenes", "test_pope")]
    assert [line.split(":")[0] for line in plan(settings)] == names
    assert all("to be written" in line for line in plan(settings))
    assert not (tmp_path / "run").exists()
    prepare(settings)
    assert all("finished" in line for line in plan(settings))
