"""A run's report as one object: its figures, tables and verdicts; `page.py` only puts them into words.

`report.json` and `report.md` both come from it, so no number is in one and not in the other's source. Made by
`pipelines.report` from what the artefacts of a run say; measures nothing itself.
"""

import json
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from sparsight.evaluate.results import STUDENT, TEACHER, Evaluation, figures

SFT_STUDENT = "sft_student"
TEACHER_GOAL = 0.93
DISTANCE_GOAL = 0.03
SIGNAL_BYTES_GOAL = 120
GROUND_TRUTH_GOAL = 0.1


class Verdict(BaseModel):
    """One goal of a run, and whether the measured values meet it."""

    model_config = ConfigDict(frozen=True)

    goal: str
    met: bool
    measured: str


class ArtifactRow(BaseModel):
    """One finished artefact: what is in it, row by row accounted for."""

    model_config = ConfigDict(frozen=True)

    name: str
    kind: str
    counts: dict[str, int]
    fingerprint: str
    code_revision: str


class Training(BaseModel):
    """What the configuration says about how the models came to be. A report states nothing of it that is not true."""

    model_config = ConfigDict(frozen=True)

    shared_tower: bool = False
    """All models have the tower of a teacher made in the run, and no stage after its own training changed it."""
    student_sees_signals: bool = False
    """A stage of the first student learns from the teacher's signals on all training pictures."""
    student_sees_answers: bool = False
    """A stage of the first student learns from all ground-truth answers among its samples."""
    sft_is_twin: bool = False
    """`sft_student` has the first student's architecture and learns from ground-truth answers alone."""
    sft_takes_as_many_steps: bool = False


class Report(BaseModel):
    """Everything a report says."""

    model_config = ConfigDict(frozen=True)

    evaluation: Evaluation
    artifacts: list[ArtifactRow]
    stage_seconds: dict[str, float]
    """Wall time of the call that made each stage's artefacts."""
    store_figures: dict[str, float]
    """Figures of other artefacts that the report repeats: `signal_bytes_per_token`, and how many training questions
    there are and how many of them reach the students with their answers."""
    export: dict[str, str]
    """What the export's check said, by reader."""
    streams: dict[str, dict[str, float]] = {}
    """What answers about long streams came to (`accuracy`, `past`, `now`, `recall`), by `model/method`."""
    training: Training = Training()
    machine: str
    revision: str
    pictures: list[tuple[str, str]] = []
    """File name and caption of each plot, in order."""

    @property
    def figures(self) -> dict[str, float]:
        """Every number by a flat name; what `report.json` holds."""
        found = figures(self.evaluation) | self.store_figures
        for asked, scores in self.streams.items():
            found |= {f"streams_{asked.replace('/', '_')}_{name}": value for name, value in scores.items()}
        return found | {f"{stage}_wall_s": seconds for stage, seconds in self.stage_seconds.items()}

    @property
    def verdicts(self) -> list[Verdict]:
        return verdicts(self.figures, self.training)

    def to_json(self) -> bytes:
        """`figures`, `machine` and `revision`, and the verdicts and artefacts beside them."""
        values = {
            "figures": self.figures,
            "machine": self.machine,
            "revision": self.revision,
            "verdicts": [verdict.model_dump() for verdict in self.verdicts],
            "artifacts": [row.model_dump() for row in self.artifacts],
            "export": self.export,
        }
        return json.dumps(values, indent=2, allow_nan=False).encode() + b"\n"


def verdicts(values: Mapping[str, float], training: Training) -> list[Verdict]:
    """The goals that can be judged from the figures at hand; a goal whose models are missing is left out."""
    judged = [
        _teacher_verdict(values),
        _sft_verdict(values, training),
        _distance_verdict(values),
        _size_verdict(values),
        _signal_verdict(values),
        _ground_truth_verdict(values),
    ]
    return [verdict for verdict in judged if verdict is not None]


def _have(values: Mapping[str, float], names: Sequence[str]) -> bool:
    return all(name in values for name in names)


def _teacher_verdict(values: Mapping[str, float]) -> Verdict | None:
    name = f"{TEACHER}_accuracy"
    if not _have(values, [name]):
        return None
    value = values[name]
    return Verdict(goal=f"teacher accuracy at least {TEACHER_GOAL}", met=value >= TEACHER_GOAL, measured=f"{value:.4f}")


def _sft_verdict(values: Mapping[str, float], training: Training) -> Verdict | None:
    student, other, gap = f"{STUDENT}_accuracy", f"{SFT_STUDENT}_accuracy", f"{STUDENT}_minus_{SFT_STUDENT}"
    if not _have(values, [student, other, gap, f"{gap}_low"]):
        return None
    sure = "beyond chance" if values[f"{gap}_low"] > 0.0 else "not beyond chance"
    measured = f"{values[student]:.4f} against {values[other]:.4f}, difference {_gap(values, gap)}"
    tower = ", on the same frozen tower," if training.shared_tower else ""
    twin = f"the same student{tower} trained on the ground-truth answers alone"
    goal = f"student better than {twin if training.sft_is_twin else SFT_STUDENT}"
    return Verdict(goal=goal, met=values[student] > values[other], measured=f"{measured}, {sure}")


def _distance_verdict(values: Mapping[str, float]) -> Verdict | None:
    student, teacher, gap = f"{STUDENT}_accuracy", f"{TEACHER}_accuracy", f"{STUDENT}_minus_{TEACHER}"
    if not _have(values, [student, teacher, gap]):
        return None
    below = values[teacher] - values[student]
    goal = f"student within {DISTANCE_GOAL} of the teacher"
    return Verdict(goal=goal, met=below <= DISTANCE_GOAL, measured=f"student minus teacher {_gap(values, gap)}")


def _size_verdict(values: Mapping[str, float]) -> Verdict | None:
    student, teacher = f"{STUDENT}_activated_parameters", f"{TEACHER}_activated_parameters"
    if not _have(values, [student, teacher]):
        return None
    measured = f"{values[student]:,.0f} against {values[teacher]:,.0f} ({values[student] / values[teacher]:.2f} ×)"
    goal = "student activates fewer parameters than the teacher"
    return Verdict(goal=goal, met=values[student] < values[teacher], measured=measured)


def _signal_verdict(values: Mapping[str, float]) -> Verdict | None:
    if "signal_bytes_per_token" not in values:
        return None
    value = values["signal_bytes_per_token"]
    goal = f"stored signals at most {SIGNAL_BYTES_GOAL} bytes a response token"
    return Verdict(goal=goal, met=value <= SIGNAL_BYTES_GOAL, measured=f"{value:.1f}")


def _ground_truth_verdict(values: Mapping[str, float]) -> Verdict | None:
    answered, questions = "ground_truth_questions", "training_questions"
    if not _have(values, [answered, questions]) or not values[questions]:
        return None
    share = values[answered] / values[questions]
    measured = f"{values[answered]:,.0f} of {values[questions]:,.0f} ({share:.1%})"
    goal = f"ground-truth answers to at most {GROUND_TRUTH_GOAL:.0%} of the training questions reach the students"
    return Verdict(goal=goal, met=share <= GROUND_TRUTH_GOAL, measured=measured)


def _gap(values: Mapping[str, float], name: str) -> str:
    return f"{values[name]:+.4f} [{values[f'{name}_low']:+.4f}, {values[f'{name}_high']:+.4f}]"
