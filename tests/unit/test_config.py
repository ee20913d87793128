"""Configuration: what is wrong is named by file and key; what is right survives a round trip."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sparsight.config import EasyVqaSource, RunConfig, ScenesSource, dump, load
from sparsight.errors import ConfigError

STAGE = {"name": "mimic", "terms": {"forward_kl": 1.0}, "steps": 10}
VALUES = {
    "run_dir": "out/run",
    "data": {"sources": [{"kind": "easy_vqa"}, {"kind": "scenes", "pictures": 7}]},
    "teacher": {"kind": "tiny", "stages": [STAGE]},
    "distill": {"students": [{"name": "sparse", "stages": [STAGE]}]},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    return file


def test_a_small_file_is_filled_with_defaults(path: Path) -> None:
    config = load(path)
    assert isinstance(config.data.sources[0], EasyVqaSource)
    assert isinstance(config.data.sources[1], ScenesSource)
    assert config.data.sources[1].pictures == 7
    assert config.data.ground_truth_fraction == 1.0


def test_the_dump_loads_to_the_same_config(path: Path, tmp_path: Path) -> None:
    config = load(path, ["seed=3", "label.head=5"])
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load(again) == config


def test_overrides_reach_groups_and_lists(path: Path) -> None:
    config = load(
        path,
        [
            "data.sources.1.pictures=9",
            "resources.train_workers=1",
            "distill.students.0.stages.0.learning_rate=0.5",
            "serve.allowed_picture_hosts=[a.org, b.org]",
            "run_dir=s3://bucket/x=y",
        ],
    )
    assert isinstance(config.data.sources[1], ScenesSource)
    assert config.data.sources[1].pictures == 9
    assert config.resources.train_workers == 1
    assert config.distill.students[0].stages[0].learning_rate == 0.5
    assert config.serve.allowed_picture_hosts == ["a.org", "b.org"]
    assert config.run_dir == "s3://bucket/x=y"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("label.heads=5", r"label\.heads: Extra inputs"),
        ("surprise=1", "surprise: Extra inputs"),
        ("data.sources.1.colour=1", r"data\.sources\.1\.scenes\.colour: Extra inputs"),
        ("label.head=many", r"label\.head: Input should be a valid integer"),
        ("label.head=0", r"label\.head: .*greater than or equal to 1"),
        ("evaluate.limit=0", r"evaluate\.limit: .*greater than or equal to 1"),
        ("data.sources.0.limit=-1", r"data\.sources\.0\.easy_vqa\.limit: .*greater than or equal to 1"),
        ("distill.students.0.stages.0.trainable=[]", r"stages\.0\.trainable: List should have at least 1 item"),
        ("data.ground_truth_fraction=0", "ground_truth_fraction: .*greater than 0"),
        ("data.sources=[]", r"data\.sources: List should have at least 1"),
        ("data.sources.0.kind=video", r"data\.sources\.0: .*'video'"),
        ("data.sources.4.kind=scenes", "'4' is not an index into a list of 2"),
        ("run_dir.x=1", "'run_dir' is not a group of settings"),
        ("just words", "must look like a.b=value"),
        ("=1", "must look like a.b=value"),
        ("label.head=[1", "the value is not valid YAML"),
        ("distill.students.0.stages.0.epochs=1", "give exactly one of epochs and steps"),
        ("distill.students.0.stages.0.terms={balance: 1.0}", "needs a term to learn from"),
        ("pairs={student_candidates: 1, teacher_candidates: 0}", "pairs: .*a pair needs two candidates"),
        ("pairs={judge_path: somewhere}", "pairs: .*judge_path is for the judge 'model', not for 'truth'"),
        ("pairs.samples=kept", "no source keeps pictures for pairs: set its pair_pictures"),
        ("data.sources.1={kind: streams, scene_s: [5, 2]}", r"scene_s \[5\.0, 2\.0\]: give the shortest time"),
        ("data.sources.1={kind: streams, lengths_s: [0.5]}", r"lengths_s \[0\.5\]: a stream of 0\.5 frames a second"),
        ("evaluate.streams={methods: [{name: a}]}", "the long streams of one source, and 0 draw some"),
        ("evaluate.streams={methods: [{name: a}, {name: a}]}", r"names of methods are not unique: \['a', 'a'\]"),
        ("evaluate.streams={methods: [{name: a, frames: 2}]}", "method 'a': recent 4 is more than frames 2"),
        (
            "evaluate.streams={methods: [{name: a, kind: uniform, mass: 0.5}]}",
            "method 'a': mass would change nothing for 'uniform'",
        ),
        ("data.sources.1.hidden=1.5", r"scenes\.hidden: .*less than or equal to 1"),
        ("pairs.temperature=0", r"pairs\.temperature: .*greater than 0"),
        ("distill.students.0.stages.0.upcycle={experts: 2, active_experts: 3}", "active_experts 3 is more than"),
    ],
)
def test_faulty_settings_are_named(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(path, [override])


def test_a_student_may_begin_where_one_before_it_ended(path: Path) -> None:
    students = "distill.students=[{name: sparse, stages: [%s]}, {name: wide, start: sparse/mimic, stages: [%s]}]"
    stage = yaml.safe_dump(STAGE, default_flow_style=True).strip()
    first, second = load(path, [students % (stage, stage)]).distill.students
    assert (first.start, second.start) == (None, "sparse/mimic")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("start: wide/mimic", "'wide' starts at 'wide/mimic': no student before it has that"),
        ("start: sparse/later", "'wide' starts at 'sparse/later': no student before it has that"),
        ("start: sparse", "start: String should match pattern"),
        (
            "start: sparse/mimic, text_intermediate: 64",
            "'wide' starts at 'sparse/mimic': its text_intermediate is that",
        ),
        ("text_intermediate: 0", "text_intermediate: Input should be greater than or equal to 1"),
    ],
)
def test_a_student_that_cannot_begin_there_is_refused(path: Path, settings: str, message: str) -> None:
    stage = yaml.safe_dump(STAGE, default_flow_style=True).strip()
    students = f"[{{name: sparse, stages: [{stage}]}}, {{name: wide, {settings}, stages: [{stage}]}}]"
    with pytest.raises(ConfigError, match=message):
        load(path, [f"distill.students={students}"])


def test_two_students_of_one_name_are_refused(path: Path) -> None:
    student = yaml.safe_dump(VALUES["distill"]["students"][0], default_flow_style=True).strip()  # type: ignore[index]
    with pytest.raises(ConfigError, match="student names are not unique"):
        load(path, [f"distill.students=[{student}, {student}]"])


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "not valid YAML"), ("- a\n- b", "must be a mapping"), ("", "must be a mapping"), ("{}", "run_dir: ")],
)
def test_faulty_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load(file)
    assert "broken.yaml" in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read config '.*absent\.yaml'"):
        load(tmp_path / "absent.yaml")


def test_configs_are_frozen(path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(path).seed = 1  # type: ignore[misc]


def test_every_setting_says_yes_to_its_own_default() -> None:
    assert RunConfig.model_validate(RunConfig.model_validate(VALUES).model_dump()) == RunConfig.model_validate(VALUES)


def test_config_and_records_load_nothing_heavy() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'datasets', 'boto3'}"
    code = (
        f"import sys, sparsight.config, sparsight.records, sparsight.errors; print(sorted({heavy} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
