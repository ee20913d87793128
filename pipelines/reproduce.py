"""A paper's comparisons over seeds: one run a seed, then a page of differences with intervals.

A seed is a whole run (`pipelines.run`) in a folder of its own, so a stopped reproduction continues where it was. What
is trained is the configuration's students; what is compared is `MOD`, in their names. Run as
`python -m pipelines.reproduce --config configs/mod.yaml --seeds 3 --out docs/results`; fewer seeds are a trial, and
belong into another folder.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.command import parser_of, run_with
from pipelines.report import KIND as REPORT_KIND
from pipelines.report import read_evaluation
from pipelines.run import run
from sparsight import layout
from sparsight.artifacts import RunDirectory
from sparsight.config import RunConfig
from sparsight.errors import ConfigError
from sparsight.evaluate.reproduction import (
    ACCURACY,
    CHAIR_OBJECT,
    CHAIR_RECALL,
    CHAIR_RESPONSE,
    Compared,
    Comparison,
    Metrics,
    compare,
    metrics_of,
    over_seeds,
)
from sparsight.evaluate.reproduction_page import Reproduction, reading_of, render, to_json
from sparsight.evaluate.reproduction_plots import differences, trade_off
from sparsight.observe import say

NAME = "llava-mod"

MOD = (
    Comparison(
        "mimic_minus_sft",
        "mimic on all pictures than SFT on the answered tenth",
        "mimic",
        "sft",
        ACCURACY,
        "better, +8.1 %",
    ),
    Comparison(
        "mimic_minus_sft_same_pictures",
        "mimic than SFT on the same answered pictures",
        "mimic_few",
        "sft",
        ACCURACY,
        "better, +8.1 %",
    ),
    Comparison("d2d_d2s_minus_d2s", "D2D then D2S than D2S only", "mimic", "d2s_only", ACCURACY, "better, +4.0 %"),
    Comparison(
        "sparse_minus_dense_activated",
        "sparse than dense of equal activated parameters",
        "mimic",
        "dense_activated",
        ACCURACY,
        "better, +3.7 % (than dense, size not said)",
    ),
    Comparison(
        "sparse_minus_dense_total",
        "sparse than dense of equal total parameters",
        "mimic",
        "dense_total",
        ACCURACY,
        "not reported",
    ),
    Comparison("experts_4_minus_2", "4 experts than 2", "mimic", "experts_2", ACCURACY, "not reported"),
    Comparison("experts_8_minus_4", "8 experts than 4", "experts_8", "mimic", ACCURACY, "worse, 64.6 to 65.1 on MMB"),
    Comparison(
        "chair_response_after_minus_before",
        "after preference than before",
        "preference",
        "mimic",
        CHAIR_RESPONSE,
        "better",
    ),
    Comparison(
        "chair_response_after_minus_teacher",
        "after preference than the teacher",
        "preference",
        "teacher",
        CHAIR_RESPONSE,
        "better, 11.2 to 29.7 on Object HalBench",
    ),
    Comparison(
        "chair_object_after_minus_before",
        "after preference than before",
        "preference",
        "mimic",
        CHAIR_OBJECT,
        "better",
    ),
    Comparison(
        "chair_object_after_minus_teacher",
        "after preference than the teacher",
        "preference",
        "teacher",
        CHAIR_OBJECT,
        "better",
    ),
    Comparison(
        "chair_response_kto_minus_dpo", "KTO-pair than DPO", "preference", "dpo", CHAIR_RESPONSE, "better, 11.4 to 20.0"
    ),
    Comparison(
        "chair_response_teacher_minus_self_reference",
        "teacher as reference than the student's snapshot",
        "preference",
        "self_reference",
        CHAIR_RESPONSE,
        "not reported",
    ),
    Comparison(
        "chair_response_preference_minus_chosen_sft",
        "preference than SFT on the chosen answers",
        "preference",
        "chosen_sft",
        CHAIR_RESPONSE,
        "not reported",
    ),
    Comparison(
        "accuracy_after_minus_before", "after preference than before", "preference", "mimic", ACCURACY, "slightly worse"
    ),
)

COLUMNS = (
    (ACCURACY, "accuracy", ".3f"),
    (CHAIR_RESPONSE, "CHAIR, responses", ".3f"),
    (CHAIR_OBJECT, "CHAIR, objects", ".3f"),
    (CHAIR_RECALL, "objects named", ".3f"),
    ("pope_adversarial_f1", "POPE adversarial F1", ".3f"),
    ("kl_nats", "KL to teacher, nats", ".3f"),
    ("activated_parameters", "activated", ",.0f"),
    ("total_parameters", "total", ",.0f"),
)

INTRODUCTION = """\
LLaVA-MoD's comparisons at the size of one machine: every seed draws its own pictures, makes its own teacher and labels,
and trains every student of `configs/mod.yaml` from them. Accuracy is over the closed questions of all test sets,
CHAIR over the descriptions of held-out scenes. The column "published" says what the paper reports for its models of
billions of parameters. Four training descriptions in five end with a shape that does not show, as people's do who know
more than the picture; preference pairs are about further pictures, judged by what shows (docs/decisions/0010). `mimic`
learns from the teacher's signals on all training pictures and the answers of one in ten, `sft` and `mimic_few` from
that tenth alone. Made by `make reproduce-mod`; the protocol is in docs/protocol.md."""


class Origin(NamedTuple):
    """The machines and the revisions of the code that a seed's figures come from."""

    machines: Sequence[str]
    revisions: Sequence[str]


HEADLINES = {"teacher": "teacher", "before": "mimic", "after": "preference"}


def reproduce(config: RunConfig, seeds: int, out: Path) -> None:
    """Run every seed that is not finished, then write `llava-mod.md`, `.json` and plots into `out`."""
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: a reproduction needs at least one seed, and three for an interval")
    compared = {model for it in MOD for model in (it.one, it.other)} | set(HEADLINES.values())
    missing = sorted(compared - {"teacher", *(student.name for student in config.distill.students)})
    if missing:
        raise ConfigError(f"the comparisons need students that distill.students lacks: {', '.join(missing)}")
    reading_of(page_in(out))  # a page that cannot be written again is found before hours have passed
    found: list[Metrics] = []
    origins: list[Origin] = []
    for one in seed_configs(config, seeds):
        say(f"seed {one.seed}, {len(found) + 1} of {seeds}: {one.run_dir}")
        run(one)
        found.append(metrics_of(read_evaluation(one)))
        origins.append(origin_of(one))
    write_pages(found, origins, out)


def page_in(out: Path) -> Path:
    return out / f"{NAME}.md"


def origin_of(config: RunConfig) -> Origin:
    """Where a finished run's report says that it was made."""
    storage, _ = RunDirectory(config.run_dir).finished(layout.REPORT, REPORT_KIND)
    report = json.loads(storage.read_bytes("report.json"))
    return Origin([report["machine"]], [row["code_revision"] for row in report["artifacts"]])


def seed_configs(config: RunConfig, seeds: int) -> list[RunConfig]:
    """The run of each seed from the configuration's on, in a folder of its own."""
    folder = config.run_dir.rstrip("/")
    chosen = range(config.seed, config.seed + seeds)
    return [config.model_copy(update={"seed": seed, "run_dir": f"{folder}/seed-{seed}"}) for seed in chosen]


def write_pages(seeds: Sequence[Metrics], origins: Sequence[Origin], out: Path) -> None:
    """The page, its data and its plots; what people wrote into an earlier page stays."""
    compared = compare(MOD, seeds)
    pictures = {f"{NAME}-differences.png": ("Differences with 95 % intervals", differences(compared))}
    shown = [model for model in seeds[0] if CHAIR_RESPONSE in seeds[0][model]]
    if shown:
        drawn = trade_off(seeds, shown, CHAIR_RESPONSE, ACCURACY)
        pictures[f"{NAME}-trade-off.png"] = ("Hallucination against accuracy", drawn)
    page = Reproduction(
        title="LLaVA-MoD, reproduced in kind",
        introduction=INTRODUCTION,
        seeds=seeds,
        compared=compared,
        columns=COLUMNS,
        figures=headline_figures(seeds, compared),
        machine="; ".join(dict.fromkeys(name for it in origins for name in it.machines)),
        revision=", ".join(dict.fromkeys(name for it in origins for name in it.revisions)),
        pictures=[(name, caption) for name, (caption, _) in pictures.items()],
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, (_, data) in pictures.items():
        (out / name).write_bytes(data)
    (out / f"{NAME}.json").write_text(to_json(page))
    target = page_in(out)
    target.write_text(render(page, reading_of(target)))
    say(f"reproduction: {target}")


def headline_figures(seeds: Sequence[Metrics], compared: Sequence[Compared]) -> dict[str, float]:
    """Means over the seeds by flat names, and every comparison with its interval."""
    found: dict[str, float] = {"seeds": len(seeds)}
    for entry in compared:
        key, gap = entry.comparison.key, entry.difference
        found[key] = gap.mean
        if len(seeds) > 1:
            found |= {f"{key}_ci_low": gap.low, f"{key}_ci_high": gap.high}
    for when, model in HEADLINES.items():
        for metric in (CHAIR_RESPONSE, CHAIR_OBJECT, CHAIR_RECALL, ACCURACY):
            value = over_seeds(seeds, model, metric)
            if value is not None:
                found[f"{metric}_{when}"] = value.mean
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("Repeat a paper's comparisons over seeds and write what came out.")
    parser.add_argument(
        "--seeds", type=int, default=3, help="how many runs, of the configuration's seed and the next ones (3)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the page, its data and its plots")
    arguments = parser.parse_args(argv)

    def plan(config: RunConfig) -> list[str]:
        return [f"run seed {one.seed} in '{one.run_dir}'" for one in seed_configs(config, arguments.seeds)]

    return run_with(arguments, lambda config: reproduce(config, arguments.seeds, arguments.out), plan)


if __name__ == "__main__":
    sys.exit(main())
