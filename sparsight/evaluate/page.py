"""`report.md`: a `Report` in words and tables for a reader. Every number is read from the report object."""

from collections.abc import Iterable, Sequence

from sparsight.evaluate.report import SFT_STUDENT, Report
from sparsight.evaluate.results import TEACHER, Evaluation
from sparsight.evaluate.scores import Share

PROTOCOL = """\
Each question was asked alone, in a single-turn chat with its picture, and answered greedily; an answer is right
when it equals the reference up to case and white space. Intervals are 95 %, over pictures. Majority: the most
frequent training answer, in columns of an answer type the most frequent answer of that type. The protocol is
docs/protocol.md of the source tree."""


INVENTED = """\
Does a model speak of objects that are not in the picture? First, descriptions (CHAIR): how many of them name an object
that is not there, and how many of all named objects are not there. Who names little invents little, so beside it stand
the share of the pictures' objects that are named, and how many objects a description names."""

ASKED = """\
Second, questions whether an object is there (POPE), as many with the answer yes as with no. Objects that are not there
are of three kinds: drawn at random, the most frequent in all pictures, and adversarial, those that the picture makes
likely."""


STREAMED = """\
Questions about drawn streams (StreamQA), each at its time, of what was before (past) and of what is on (now); means
over the types of questions. Recall: the share of the evidence's seconds among the frames that an answer rests on."""


SHARED_TOWER = """\
All models share one vision tower, frozen after it was trained with the answers of all training pictures. """


def render(report: Report) -> str:
    """The whole page as Markdown; pictures are referred to by file name, beside the page."""
    evaluation = report.evaluation
    sections = [
        f"# Report of a run\n\n{_opening(report)}",
        f"## Result on {evaluation.headline_set}\n\n{_headline(evaluation)}",
        f"## Goals\n\n{_goals(report)}",
        f"## What the models have seen\n\n{_seen(report)}",
        f"## How it was measured\n\n{PROTOCOL}",
        *(f"## By answer type: {name}\n\n{_by_type(evaluation, name)}" for name in evaluation.baselines),
        f"## Agreement with the teacher\n\n{_agreement(evaluation)}",
        *(
            f"## Hallucination: {name}\n\n{_hallucination(evaluation, name)}"
            for name in _hallucination_sets(evaluation)
        ),
        *([f"## Long streams\n\n{STREAMED}\n\n{_streams(report)}"] if report.streams else []),
        f"## Size and speed\n\n{_size_and_speed(report)}",
        *(f"## {caption}\n\n![{caption}]({name})" for name, caption in report.pictures),
        f"## Stored signals and export\n\n{_stores(report)}",
        f"## Row accounting\n\n{_artifacts(report)}",
        f"## Wall time\n\n{_times(report)}",
        f"## Where\n\n- machine: {report.machine}\n- code: {report.revision}\n- figures as data: report.json",
    ]
    return "\n\n".join(sections) + "\n"


def headline_table(evaluation: Evaluation) -> str:
    """The accuracies that a run is about, as plain text for a terminal."""
    rows = [(name, model.sets[evaluation.headline_set].accuracy) for name, model in evaluation.models.items()]
    rows.append(("majority", evaluation.baselines[evaluation.headline_set].majority))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {_percent(value)}" for name, value in rows)


def _opening(report: Report) -> str:
    names = [name for name in report.evaluation.models if name != TEACHER]
    teacher = "the teacher, " if TEACHER in report.evaluation.models else ""
    sets = " and ".join(report.evaluation.baselines)
    return f"Compared: {teacher}{', '.join(names)}, and answers given without a picture. Questions: {sets}."


def _seen(report: Report) -> str:
    known, training = report.store_figures, report.training
    if "training_questions" not in known:
        return "The samples that the students learned from are not in this run directory."
    answered, questions = known["ground_truth_questions"], known["training_questions"]
    text = SHARED_TOWER if training.shared_tower else ""
    text += f"The students' samples hold ground-truth answers to {answered:,.0f} ({answered / questions:.1%}) of "
    text += f"{questions:,.0f} training questions."
    sources = ["the teacher's signals on all training pictures"] if training.student_sees_signals else []
    sources += ["those answers"] if training.student_sees_answers else []
    if sources:
        text += f" The first student learns from {' and from '.join(sources)}."
    if training.sft_is_twin:
        steps = ", with as many steps" if training.sft_takes_as_many_steps else ""
        text += f" `{SFT_STUDENT}` learns from those answers alone{steps}."
    return text


def _headline(evaluation: Evaluation) -> str:
    name = evaluation.headline_set
    baseline = evaluation.baselines[name]
    rows = [
        [model, _percent(result.sets[name].accuracy), f"{result.sets[name].accuracy.count:,}"]
        for model, result in evaluation.models.items()
    ]
    blind = {
        f"majority answer ('{baseline.majority_answer}')": baseline.majority,
        "majority answer of the question's type": baseline.type_majority,
        "best answer to the question's text alone": baseline.question_only,
    }
    rows += [[label, _percent(value), f"{value.count:,}"] for label, value in blind.items()]
    return _table(["", "accuracy [95 %]", "questions"], rows)


def _goals(report: Report) -> str:
    lines = [f"- **{'met' if v.met else 'missed'}**: {v.goal}: {v.measured}" for v in report.verdicts]
    return "\n".join(lines) or "No goal can be judged from this run."


def _by_type(evaluation: Evaluation, test_set: str) -> str:
    baseline = evaluation.baselines[test_set]
    kinds = list(baseline.majority_by_type)
    counts = {kind: baseline.majority_by_type[kind].count for kind in kinds}
    rows = [
        [
            name,
            _percent(model.sets[test_set].accuracy),
            *(_percent(model.sets[test_set].by_type[kind]) for kind in kinds),
        ]
        for name, model in evaluation.models.items()
    ]
    majority = [f"{baseline.majority_by_type[kind].value:.1%}" for kind in kinds]
    rows.append(["majority", f"{baseline.majority.value:.1%}", *majority])
    head = [
        "",
        f"all ({baseline.majority.count:,})",
        *(f"{kind.replace('_', '/')} ({counts[kind]:,})" for kind in kinds),
    ]
    return _table(head, rows)


def _agreement(evaluation: Evaluation) -> str:
    rows = [
        [name, test_set, f"{found.kl_nats:.4f}", f"{found.top1:.1%}", f"{found.positions:,}"]
        for name, model in evaluation.models.items()
        for test_set, result in model.sets.items()
        if (found := result.agreement) is not None
    ]
    if not rows:
        return "Not measured: the teacher is not of the students' architecture."
    return _table(["", "test set", "KL(teacher ‖ student), nats", "same first token", "answer positions"], rows)


def _hallucination_sets(evaluation: Evaluation) -> list[str]:
    return list(next(iter(evaluation.models.values())).hallucination)


def _hallucination(evaluation: Evaluation, test_set: str) -> str:
    results = {name: model.hallucination[test_set] for name, model in evaluation.models.items()}
    described = [
        [name, *map(_percent, (it.response, it.object, it.recall)), f"{it.mentions_per_answer:.2f}"]
        for name, result in results.items()
        if (it := result.chair) is not None
    ]
    asked = [
        [
            kind,
            name,
            f"{scores.f1.value:.3f} [{scores.f1.low:.3f}, {scores.f1.high:.3f}]",
            *map(_percent, (scores.accuracy, scores.precision, scores.recall, scores.yes_rate)),
        ]
        for kind in next(iter(results.values())).pope
        for name, scores in ((name, result.pope[kind]) for name, result in results.items())
    ]
    parts: list[str] = []
    if described:
        head = ["", "descriptions with an object not there", "named objects not there", "objects named", "names each"]
        parts += [INVENTED, _table(head, described)]
    if asked:
        head = ["absent objects", "", "F1 [95 %]", "accuracy", "precision of yes", "objects recognised", "says yes"]
        parts += [ASKED, _table(head, asked)]
    return "\n\n".join(parts)


def _streams(report: Report) -> str:
    names = ("past", "now", "recall")
    rows = [
        [*asked.split("/"), *(f"{scores[name]:.1%}" if name in scores else "–" for name in names)]
        for asked, scores in report.streams.items()
    ]
    return _table(["", "frames", *names], rows)


def _size_and_speed(report: Report) -> str:
    models = report.evaluation.models
    batches = list(next(iter(models.values())).tokens_per_s)
    head = ["", "activated parameters", "total parameters", *(f"tokens/s, batch {batch}" for batch in batches)]
    rows = [
        [
            name,
            f"{model.activated_parameters:,}",
            f"{model.total_parameters:,}",
            *(_speed(report, name, model.tokens_per_s[batch], batch) for batch in batches),
        ]
        for name, model in models.items()
    ]
    return _table(head, rows) + "\n\nDecoding after the prompt; all models in turns in one process, medians."


def _speed(report: Report, name: str, value: float, batch: int) -> str:
    ratio = report.figures.get(f"{name}_speed_vs_teacher_batch_{batch}")
    return f"{value:,.0f}" + (f" ({ratio:.2f} × teacher)" if ratio is not None else "")


def _stores(report: Report) -> str:
    lines = [f"- {name.replace('_', ' ')}: {value:,.2f}" for name, value in report.store_figures.items()]
    lines += [f"- export, {reader}: {verdict}" for reader, verdict in report.export.items()]
    return "\n".join(lines) or "None in this run."


def _artifacts(report: Report) -> str:
    rows = [
        [
            f"`{row.name}`",
            row.kind,
            ", ".join(f"{name} {value:,}" for name, value in row.counts.items()) or "-",
            f"`{row.fingerprint}`",
            row.code_revision,
        ]
        for row in report.artifacts
    ]
    return _table(["artefact", "kind", "counts", "fingerprint", "code"], rows)


def _times(report: Report) -> str:
    if not report.stage_seconds:
        return "Not recorded."
    rows = [[stage, f"{seconds:,.1f}"] for stage, seconds in report.stage_seconds.items()]
    rows.append(["together", f"{sum(report.stage_seconds.values()):,.1f}"])
    return _table(["stage", "seconds"], rows)


def _percent(share: Share) -> str:
    if not share.count:
        return "-"
    return f"{share.value:.2%} [{share.low:.2%}, {share.high:.2%}]"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
