"""Stages that learn from pictures, on Ray: labelled into the store, trained from it and beside the live teacher."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.distill import distill
from pipelines.label import label
from pipelines.label import main as label_command
from sparsight.artifacts import RunDirectory
from sparsight.config import RunConfig, dump
from sparsight.data.signals import iter_signals
from sparsight.data.visual_signals import VisualStore
from sparsight.errors import AlignmentError
from sparsight.observe import read_metrics
from tests.labelled_run import ROWS, configuration, write_student_samples, write_teacher

pytestmark = pytest.mark.usefixtures("ray_cluster")

WHOLE_LOSS = {"cross_entropy": 1.0, "forward_kl": 1.0, "visual_kl": 1.0, "relation": 0.5}
LENGTH = {"steps": 4, "batch_samples": 8, "learning_rate": 1e-3, "checkpoint_every_steps": 4}
DPT = {"name": "dpt", "trainable": ["projector"], "terms": WHOLE_LOSS, **LENGTH}
DFT = {"name": "dft", "terms": {**WHOLE_LOSS, "attention": 0.5}, "relation_centred": True, **LENGTH}


def students(run_dir: Path, **settings: Any) -> RunConfig:
    """`student` learns from the store, `live` beside its teacher; both have a layer less than the teacher."""
    config = configuration(str(run_dir), DPT, DFT, **settings)
    architecture = config.student.architecture.model_copy(update={"text_layers": 1})
    config = config.model_copy(update={"student": config.student.model_copy(update={"architecture": architecture})})
    (stored,) = config.distill.students
    stages = [stage.model_copy(update={"teacher": "live"}) for stage in stored.stages]
    live = stored.model_copy(update={"name": "live", "stages": stages})
    return config.model_copy(update={"distill": config.distill.model_copy(update={"students": [stored, live]})})


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    folder = tmp_path_factory.mktemp("visual")
    write_teacher(str(folder))
    write_student_samples(str(folder))
    label(students(folder))
    return folder


def test_every_labelled_row_has_its_picture_beside_it(labelled: Path) -> None:
    storage, manifest = RunDirectory(str(labelled)).finished("signals", "signals")
    store = VisualStore(storage)
    signals = list(iter_signals(storage))
    assert manifest.counts["labelled"] == len(store) == len(signals) == ROWS
    assert manifest.details["visual"] == ["targets", "relation", "attention"]
    for signal in signals:
        visual = store.load(signal.id)
        assert visual.targets is not None
        assert visual.relation is not None
        assert visual.attention_LN is not None
        assert len(visual.targets) == len(visual.relation.to_matrix()) == visual.attention_LN.shape[1]
        assert len(visual.targets) == signal.visual_tokens


def test_a_dry_run_says_what_the_store_then_takes(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(dump(students(labelled)))
    assert label_command(["--config", str(tmp_path / "config.yaml"), "--dry-run"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "targets, relation, attention" in line)
    announced = int(line.rpartition(": ")[2].partition(" bytes")[0].replace(",", ""))
    _, manifest = RunDirectory(str(labelled)).finished("signals", "signals")
    measured = manifest.figures["visual_bytes_per_sample"]
    assert announced < measured < announced + 600  # a file's frame, shared by few rows here


def test_the_store_and_the_live_teacher_teach_the_same(labelled: Path) -> None:
    distill(students(labelled))
    for stage in ("dpt", "dft"):
        stored, live = (
            read_metrics(labelled / f"students/{name}/{stage}/metrics.jsonl") for name in ("student", "live")
        )
        assert len(stored) == len(live) == LENGTH["steps"]
        for step, (one, other) in enumerate(zip(stored, live, strict=True)):
            for term in ("cross_entropy", "forward_kl", "visual_kl", "relation"):
                assert one[term] == pytest.approx(other[term], rel=0.01 if step == 0 else 0.03)  # roundings add up
        assert ("attention" in stored[0]) == (stage == "dft")


def test_a_student_with_another_tower_is_refused_by_both_names(labelled: Path) -> None:
    config = students(labelled, tower_from_teacher=False)
    architecture = config.student.architecture.model_copy(update={"pixel_mean": 0.4})
    student = config.student.model_copy(update={"architecture": architecture})
    _, manifest = RunDirectory(str(labelled)).finished("signals", "signals")
    theirs = manifest.details["tower_fingerprint"]
    with pytest.raises(AlignmentError, match=rf"the teacher's is {theirs}, the student's [0-9a-f]{{32}}; use"):
        distill(config.model_copy(update={"student": student}))
