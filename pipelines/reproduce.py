"""A paper's comparisons over seeds: one run a seed, then a page of differences with intervals.

A seed is a whole run (`pipelines.run`) in a folder of its own, so a stopped reproduction continues where it was. What
is trained is the configuration's students; what is compared is a study (`study_llava_mod`, `study_llava_kd`,
`study_rekv`), in their names. Run as
`python -m pipelines.reproduce --study llava-mod --config configs/mod.yaml --seeds 3 --out docs/results`; fewer seeds
are a trial, and belong into another folder.
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
from pipelines.stream_trials import read_stream_metrics
from pipelines.study_llava_kd import LLAVA_KD
from pipelines.study_llava_mod import LLAVA_MOD
from pipelines.study_rekv import REKV
from sparsight import layout
from sparsight.artifacts import RunDirectory
from sparsight.config import RunConfig
from sparsight.errors import ConfigError
from sparsight.evaluate.reproduction import SIGNAL_BYTES, Metrics, Study, compare, figures_of, metrics_of
from sparsight.evaluate.reproduction_page import Reproduction, reading_of, render, to_json
from sparsight.evaluate.reproduction_plots import differences, plane, side_by_side
from sparsight.observe import say

STUDIES = {study.name: study for study in (LLAVA_MOD, LLAVA_KD, REKV)}


class Origin(NamedTuple):
    """The machines and the revisions of the code that a seed's figures come from."""

    machines: Sequence[str]
    revisions: Sequence[str]


def reproduce(study: Study, config: RunConfig, seeds: int, out: Path) -> None:
    """Run every seed that is not finished, then write the study's page, its data and its plots into `out`."""
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: a reproduction needs at least one seed, and three for an interval")
    missing = sorted(study.models - _compared(config))
    if missing:
        raise ConfigError(f"the comparisons need models or methods that the configuration lacks: {', '.join(missing)}")
    reading_of(page_in(out, study))  # a page that cannot be written again is found before hours have passed
    found: list[Metrics] = []
    origins: list[Origin] = []
    for one in seed_configs(config, seeds):
        say(f"seed {one.seed}, {len(found) + 1} of {seeds}: {one.run_dir}")
        run(one)
        found.append(_metrics(one))
        origins.append(origin_of(one))
    write_pages(study, found, origins, out)


def page_in(out: Path, study: Study) -> Path:
    return out / f"{study.name}.md"


def _compared(config: RunConfig) -> set[str]:
    """What a run of the configuration can be compared by: its models and, about streams, `model/method`."""
    models = {"teacher", *(student.name for student in config.distill.students)}
    trials = config.evaluate.streams
    if trials is None:
        return models
    return models | {f"{model}/{method.name}" for model in trials.models for method in trials.methods_of(model)}


def _metrics(config: RunConfig) -> Metrics:
    """What a finished run's models came to, about streams too, and what the teacher's labels took."""
    _, signals = RunDirectory(config.run_dir).finished(layout.SIGNALS, "signals")
    found = metrics_of(read_evaluation(config))
    found["teacher"][SIGNAL_BYTES] = signals.figures["signal_bytes_per_token"]
    return found if config.evaluate.streams is None else found | read_stream_metrics(config)


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


def write_pages(study: Study, seeds: Sequence[Metrics], origins: Sequence[Origin], out: Path) -> None:
    """The page, its data and its plots; what people wrote into an earlier page stays."""
    compared = compare(study.comparisons, seeds)
    pictures = {f"{study.name}-differences.png": ("Differences with 95 % intervals", differences(compared))}
    drawable = [model for model, metrics in seeds[0].items() if all(metric in metrics for metric in study.plane)]
    shown = [model for model in drawable if not study.in_plane or model in study.in_plane]
    if shown:
        headings = {metric: heading for metric, heading, _ in study.columns}
        across, up = (headings[metric] for metric in study.plane)
        drawn = plane(seeds, shown, study.plane, (across, up))
        pictures[f"{study.name}-plane.png"] = (f"Models: {up} against {across}", drawn)
    for row in study.rows:
        pictures[f"{study.name}-{row.name}.png"] = (row.caption, side_by_side(seeds, row))
    page = Reproduction(
        title=study.title,
        introduction=study.introduction,
        seeds=seeds,
        compared=compared,
        columns=study.columns,
        figures=figures_of(study, seeds, compared),
        machine="; ".join(dict.fromkeys(name for it in origins for name in it.machines)),
        revision=", ".join(dict.fromkeys(name for it in origins for name in it.revisions)),
        pictures=[(name, caption) for name, (caption, _) in pictures.items()],
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, (_, data) in pictures.items():
        (out / name).write_bytes(data)
    (out / f"{study.name}.json").write_text(to_json(page))
    target = page_in(out, study)
    target.write_text(render(page, reading_of(target)))
    say(f"reproduction: {target}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("Repeat a paper's comparisons over seeds and write what came out.")
    parser.add_argument("--study", choices=sorted(STUDIES), required=True, help="which paper's comparisons")
    parser.add_argument(
        "--seeds", type=int, default=3, help="how many runs, of the configuration's seed and the next ones (3)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the page, its data and its plots")
    arguments = parser.parse_args(argv)

    def plan(config: RunConfig) -> list[str]:
        return [f"run seed {one.seed} in '{one.run_dir}'" for one in seed_configs(config, arguments.seeds)]

    study = STUDIES[arguments.study]
    return run_with(arguments, lambda config: reproduce(study, config, arguments.seeds, arguments.out), plan)


if __name__ == "__main__":
    sys.exit(main())
