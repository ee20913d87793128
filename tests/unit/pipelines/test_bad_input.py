"""Bad input at the command line: status 2, one error that says what, where and what to do, and nothing finished.

No cluster here: every one of these is found before one is needed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipelines import distill, evaluate, export, label, prepare, teacher
from sparsight.artifacts import RunDirectory
from sparsight.config import dump
from sparsight.model.tiny import make_dense, make_tokenizer
from tests.labelled_run import configuration, write_inputs
from tests.parity.training_case import SMALL, WORDS

Program = Callable[[list[str]], int]
STAGE = {"name": "mimic", "terms": {"forward_kl": 1.0}, "steps": 10}


def refusal(program: Program, config: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one error that a refused command prints."""
    assert program(["--config", config]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    [error] = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert printed.err.splitlines()[-1] == error
    return error


@pytest.fixture
def llava(tmp_path: Path, picture_bytes: Callable[..., bytes]) -> Path:
    """A source of four rows about four pictures, its configuration beside it as `run.yaml`."""
    talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a thing"}]
    records = [{"image": f"{number}.png", "conversations": talk} for number in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(records))
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(picture_bytes(f"#{number:02d}0000"))
    source = {"kind": "llava", "path": str(tmp_path / "rows.json"), "pictures": str(tmp_path / "pictures")}
    values = {
        "run_dir": str(tmp_path / "run"),
        "data": {"sources": [source]},
        "teacher": {"kind": "tiny", "stages": [{**STAGE, "terms": {"cross_entropy": 1.0}}]},
        "distill": {"students": [{"name": "sparse", "stages": [STAGE]}]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def finished(folder: Path) -> set[str]:
    """The finished artefacts of a run."""
    run = folder / "run"
    return {path.parent.relative_to(run).as_posix() for path in run.rglob("manifest.json")}


def test_broken_pictures_are_counted_and_the_rest_is_used(llava: Path) -> None:
    for number in (1, 2):
        path = llava / "pictures" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:40])
    assert prepare.main(["--config", str(llava / "run.yaml")]) == 0
    counts = RunDirectory(str(llava / "run")).finished("samples/student")[1].counts
    assert (counts["input"], counts["samples"], counts["quarantined"]) == (4, 2, 2)
    assert finished(llava) == {"samples/student", "samples/teacher"}


def test_a_source_of_broken_pictures_only(llava: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (llava / "pictures").iterdir():
        path.write_bytes(b"no picture")
    error = refusal(prepare.main, str(llava / "run.yaml"), capsys)
    assert "source 'llava' gave no usable row, 4 were quarantined" in error
    assert "convert it" in error
    assert finished(llava) == set()


def test_wrong_json(llava: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = llava / "rows.json"
    rows.write_text(rows.read_text()[:-1])
    error = refusal(prepare.main, str(llava / "run.yaml"), capsys)
    assert error.startswith(f"error: '{rows}' is not valid JSON: line 1, column")
    assert error.endswith("mend the file")
    assert finished(llava) == set()


@pytest.mark.parametrize(("name", "part"), [("rows.json", "cannot read"), ("pictures", "the picture folder")])
def test_missing_files_of_a_source(llava: Path, capsys: pytest.CaptureFixture[str], name: str, part: str) -> None:
    (llava / name).rename(llava / "elsewhere")
    error = refusal(prepare.main, str(llava / "run.yaml"), capsys)
    assert part in error
    assert str(llava / name) in error
    assert "correct the" in error
    assert finished(llava) == set()


@pytest.mark.parametrize(
    ("program", "missing"),
    [
        (teacher.main, "samples/teacher"),
        (label.main, "samples/student"),
        (distill.main, "samples/student"),
        (export.main, "students/sparse/mimic"),
        (evaluate.main, "teacher"),
    ],
)
def test_a_stage_before_its_inputs(
    llava: Path, capsys: pytest.CaptureFixture[str], program: Program, missing: str
) -> None:
    error = refusal(program, str(llava / "run.yaml"), capsys)
    assert f"{llava / 'run' / missing}' holds no finished artefact" in error
    assert "run its stage first" in error
    assert not (llava / "run").exists()


def labelled(folder: Path, **student: Any) -> str:
    """A labelled run and its configuration file."""
    write_inputs(str(folder / "run"))
    (folder / "run.yaml").write_text(dump(configuration(str(folder / "run"), STAGE, **student)))
    return str(folder / "run.yaml")


def test_a_tokenizer_that_does_not_align(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dense(SMALL, make_tokenizer([*WORDS, "an image of what?"] * 20, 310), seed=0).save(tmp_path / "base")
    error = refusal(distill.main, labelled(tmp_path, base=str(tmp_path / "base")), capsys)
    assert "the signals were written with tokenizer" in error
    assert error.endswith("use a student with the teacher's tokenizer")
    assert finished(tmp_path) == {"samples/student", "teacher", "signals"}


def test_signals_that_do_not_align(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = labelled(tmp_path)
    part = tmp_path / "run/signals/part-0.parquet"
    table = pq.read_table(part)
    index = table.schema.get_field_index("visual_tokens")
    field = table.schema.field(index)
    pq.write_table(table.set_column(index, field, pa.array([99] * table.num_rows, field.type)), part)
    error = refusal(distill.main, config, capsys)
    assert error.startswith("error: row 'row/0' cannot be trained on: its picture takes 99 tokens for the teacher")
    assert "set distill.same_visual_tokens: false" in error
    assert finished(tmp_path) == {"samples/student", "teacher", "signals"}
    assert not (tmp_path / "run/students/student/mimic/model").exists()


def test_a_damaged_store_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = labelled(tmp_path)
    part = tmp_path / "run/signals/part-0.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    error = refusal(distill.main, config, capsys)
    assert f"'{part}' is damaged" in error
    assert "label again" in error
    assert finished(tmp_path) == {"samples/student", "teacher", "signals"}
