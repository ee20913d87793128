"""The results of an evaluation as one object: what `pipelines.evaluate` stores and the report is made from."""

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from sparsight.evaluate.agreement import Agreement
from sparsight.evaluate.answers import Answer, ExpertCounts
from sparsight.evaluate.hallucination import Hallucination, hallucination_figures
from sparsight.evaluate.scores import Baselines, Difference, Share, answer_types, difference, score, share
from sparsight.model.routing import load_entropy

TEACHER, STUDENT = "teacher", "student"
DRAWN = "pope"
"""The hallucination set of drawn scenes, whose figures need no name of a set."""


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SetResult(_Result):
    """One model on one test set."""

    accuracy: Share
    by_type: dict[str, Share]
    agreement: Agreement | None = None
    """With the teacher; the teacher itself has none."""


class BaselineResult(_Result):
    """What can be had on a test set without looking at pictures."""

    majority: Share
    majority_by_type: dict[str, Share]
    """For each type its own most frequent answer."""
    majority_answer: str
    type_majority: Share
    question_only: Share


class ModelResult(_Result):
    """One model: its size, its speed, and what it did on each test set."""

    name: str
    directory: str
    activated_parameters: int
    total_parameters: int
    sets: dict[str, SetResult] = {}
    tokens_per_s: dict[int, float] = {}
    """By batch size."""
    expert_load: dict[str, dict[int, dict[str, list[float]]]] = {}
    """By test set, sparse layer and group of tokens: each expert's share of the routing decisions."""
    hallucination: dict[str, Hallucination] = {}
    """By set of questions that show it."""


class Evaluation(_Result):
    """All models (the teacher first, then the students in the order of the configuration) on all test sets."""

    headline_set: str
    models: dict[str, ModelResult]
    baselines: dict[str, BaselineResult]
    differences: dict[str, Difference] = {}
    """On the headline set: 'a - b' by that name, paired by question."""


def baseline_result(baselines: Baselines, answers: Sequence[Answer]) -> BaselineResult:
    """The baselines' score on a test set; any model's answers to it serve, their references are read."""
    pictures = [answer.picture for answer in answers]
    type_majority = baselines.type_majority(answers)
    kinds: dict[str, Share] = {}
    for kind in answer_types(answers):
        chosen = [index for index, answer in enumerate(answers) if answer.answer_type == kind]
        kinds[kind] = share([type_majority[index] for index in chosen], [pictures[index] for index in chosen])
    return BaselineResult(
        majority=share(baselines.majority(answers), pictures),
        majority_by_type=kinds,
        majority_answer=baselines.constant,
        type_majority=share(type_majority, pictures),
        question_only=share(baselines.question_only(answers), pictures),
    )


def set_result(answers: Sequence[Answer], agreement: Agreement | None) -> SetResult:
    accuracy, by_type = score(answers)
    return SetResult(accuracy=accuracy, by_type=by_type, agreement=agreement)


def paired(one: Sequence[Answer], other: Sequence[Answer]) -> Difference:
    """How much better `one` answers the same questions than `other`."""
    assert [answer.id for answer in one] == [answer.id for answer in other]
    return difference([a.correct for a in one], [a.correct for a in other], [a.picture for a in one])


def shares(counts: ExpertCounts) -> dict[int, dict[str, list[float]]]:
    """Counts of routing decisions as shares; a group without any has none."""
    return {
        layer: {group: [value / sum(values) for value in values] for group, values in groups.items() if sum(values)}
        for layer, groups in counts.items()
    }


def figures(evaluation: Evaluation) -> dict[str, float]:
    """Every number of an evaluation by a flat name; on the headline set the set's name is left out.

    A share of nothing is no number and has no name.
    """
    found: dict[str, float] = {}
    for name, model in evaluation.models.items():
        found |= _model_figures(name, model, evaluation)
    for test_set, result in evaluation.baselines.items():
        infix = _infix(test_set, evaluation)
        found |= _share_figures(f"majority{infix}", result.majority)
        found |= _share_figures(f"type_majority{infix}", result.type_majority)
        found |= _share_figures(f"question_only{infix}", result.question_only)
        for kind, of_type in result.majority_by_type.items():
            found[f"majority{infix}_{kind}_accuracy"] = of_type.value
    for name, gap in evaluation.differences.items():
        stem = name.replace(" - ", "_minus_")
        found |= {f"{stem}": gap.value, f"{stem}_low": gap.low, f"{stem}_high": gap.high}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _infix(test_set: str, evaluation: Evaluation) -> str:
    return "" if test_set == evaluation.headline_set else f"_{test_set}"


def _share_figures(stem: str, value: Share) -> dict[str, float]:
    return {f"{stem}_accuracy": value.value, f"{stem}_accuracy_low": value.low, f"{stem}_accuracy_high": value.high}


def _model_figures(name: str, model: ModelResult, evaluation: Evaluation) -> dict[str, float]:
    found: dict[str, float] = {
        f"{name}_activated_parameters": model.activated_parameters,
        f"{name}_total_parameters": model.total_parameters,
    }
    for test_set, result in model.sets.items():
        stem = f"{name}{_infix(test_set, evaluation)}"
        found |= _share_figures(stem, result.accuracy)
        found |= {f"{stem}_{kind}_accuracy": value.value for kind, value in result.by_type.items()}
        if result.agreement is not None:
            found |= {f"{stem}_kl_nats": result.agreement.kl_nats, f"{stem}_top1_agreement": result.agreement.top1}
    teacher: Mapping[int, float] = evaluation.models[TEACHER].tokens_per_s if TEACHER in evaluation.models else {}
    for batch, value in model.tokens_per_s.items():
        found[f"{name}_tokens_per_s_batch_{batch}"] = value
        if name != TEACHER and batch in teacher:
            found[f"{name}_speed_vs_teacher_batch_{batch}"] = value / teacher[batch]
    for test_set, shown in model.hallucination.items():
        found |= hallucination_figures(name if test_set == DRAWN else f"{name}_{test_set}", shown)
    for layer, groups in model.expert_load.get(evaluation.headline_set, {}).items():
        found[f"{name}_largest_expert_share_layer_{layer}"] = max(max(load) for load in groups.values())
        for group, load in groups.items():
            words = group.replace(": ", "_").replace(" ", "_")
            found[f"{name}_expert_entropy_layer_{layer}_{words}"] = load_entropy(load)
    return found
