"""Labelling against a bare forward loop of the same model: what do signals, Ray Data and Parquet cost?

The teacher has the tiny configuration's architecture; a row has eight answered, independent questions about one
picture, packed. The bare loop runs tower, projector and text model (no head) over the same padded batches, prepared
beforehand, in as many processes as there are labelling workers, with the same threads. Start-up counts for neither: a
bare process is warm before its clock starts, labelling is timed between its files. Bare and labelling runs alternate,
so that a busy machine slows both. Run as `python -m benchmarks.label --json FILE`.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.result import write_result
from pipelines.label import label
from pipelines.row_job import BATCHES_PER_CALL
from sparsight.artifacts import RunDirectory
from sparsight.config import ArchitectureConfig, RunConfig
from sparsight.data.samples import write_samples
from sparsight.media.images import decode, encode_png
from sparsight.media.pixels import to_pixels
from sparsight.model.packing import Packing, pack
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import Sample, Turn
from sparsight.storage import open_storage

BATCH = 32
CALL_ROWS = BATCH * BATCHES_PER_CALL
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow")
THREADS = 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--workers", type=int, default=1, help="labelling workers, and bare processes")
    parser.add_argument("--calls", type=int, default=16, help=f"calls of {CALL_ROWS} rows a worker, each round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    rows = arguments.calls * arguments.workers * CALL_ROWS
    with tempfile.TemporaryDirectory() as folder:
        config = prepare(Path(folder), rows, arguments.workers)
        bare, labelled = [bare_rows_per_s(config)], []
        for _ in range(arguments.rounds):
            labelled.append(labelled_rows_per_s(config))
            bare.append(bare_rows_per_s(config))
    ratios = [rate / statistics.fmean(around) for rate, around in zip(labelled, pairwise(bare), strict=True)]
    figures = {
        "label_vs_bare_forward": statistics.median(ratios),
        "label_rows_per_s": statistics.median(labelled),
        "bare_forward_rows_per_s": statistics.median(bare),
        "label_vs_bare_forward_lowest": min(ratios),
        "label_vs_bare_forward_highest": max(ratios),
        "workers": arguments.workers,
        "rows": rows,
    }
    write_result(arguments.json, figures)
    return 0


def prepare(folder: Path, rows: int, workers: int) -> RunConfig:
    """A run directory with a random teacher and answered samples, and the configuration that labels it."""
    run = RunDirectory(str(folder))
    teacher = run.artifact("teacher", "model", 1, {})
    teacher.begin()
    corpus = [turn.question + " " + str(turn.answer) for sample in samples(64) for turn in sample.turns]
    make_dense(ArchitectureConfig(), make_tokenizer(corpus, 512), seed=0).save(teacher.storage.fetch() / "model")
    teacher.commit()
    store = run.artifact("samples/student", "samples", 1, {})
    store.begin()
    write_samples(store.storage, samples(rows))
    store.commit({"samples": rows})
    stage = {"name": "only", "terms": {"cross_entropy": 1.0}, "steps": 1}
    return RunConfig.model_validate(
        {
            "run_dir": str(folder),
            "data": {"sources": [{"kind": "scenes"}]},
            "teacher": {"kind": "tiny", "stages": [stage]},
            "distill": {"students": [{"name": "student", "stages": [stage]}]},
            "label": {"batch_samples": BATCH, "rows_per_file": CALL_ROWS},
            "resources": {"label_workers": workers, "threads_per_worker": THREADS},
        }
    )


def samples(rows: int) -> Iterator[Sample]:
    """Questions in the manner of easy-VQA about pictures of noise."""
    draw = np.random.default_rng(0)
    for number in range(rows):
        picture = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64))
        yield Sample(
            f"row-{number:06d}", (encode_png(picture),), tuple(turn(draw) for _ in range(8)), "noise", independent=True
        )


def turn(draw: np.random.Generator) -> Turn:
    shape, colour = draw.choice(SHAPES), draw.choice(COLOURS)
    asked = (
        (f"what colour is the {shape}?", colour),
        ("what shape is in the picture?", shape),
        (f"is there a {colour} {shape} in the picture?", draw.choice(("yes", "no"))),
    )
    question, answer = asked[draw.integers(len(asked))]
    return Turn(str(question), str(answer))


def labelled_rows_per_s(config: RunConfig) -> float:
    """Rows a second of a fresh labelling, from the time when every worker is at work to the last file."""
    folder = Path(config.run_dir) / "signals"
    open_storage(str(folder)).delete("")
    label(config)
    files = sorted((path.stat().st_mtime, path) for path in folder.glob("part-*.parquet"))
    warm = 2 * config.resources.label_workers
    rows = sum(pq.ParquetFile(path).metadata.num_rows for _, path in files[warm:])
    return rows / (files[-1][0] - files[warm - 1][0])


def bare_rows_per_s(config: RunConfig) -> float:
    """Rows a second of bare forward loops, one a process, all at the same time."""
    context = get_context("spawn")
    workers = config.resources.label_workers
    barrier, results = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(target=bare_loop, args=(config.run_dir, number, workers, barrier, results))
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    rates = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return sum(rates)


def bare_loop(run_dir: str, number: int, workers: int, barrier: Any, results: Any) -> None:
    """One process: prepare its share of the batches, wait for the others, forward them all."""
    torch.set_num_threads(THREADS)
    model = VisionLanguageModel.load(Path(run_dir) / "teacher" / "model")
    rows = int(RunDirectory(run_dir).finished("samples/student")[1].counts["samples"])
    batches = list(padded_batches(model, list(samples(rows))[number::workers]))
    with torch.inference_mode():
        for batch in batches[:4]:
            forward(model, batch)
        barrier.wait()
        start_s = time.perf_counter()
        for batch in batches:
            forward(model, batch)
        results.put(rows / workers / (time.perf_counter() - start_s))


class PaddedBatch(NamedTuple):
    pixels_BCHW: torch.Tensor
    input_ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    packing: Packing | None


def padded_batches(model: VisionLanguageModel, rows: Sequence[Sample]) -> Iterator[PaddedBatch]:
    """The batches that labelling forms: rows of similar length within each call."""
    for start in range(0, len(rows), CALL_ROWS):
        call = rows[start : start + CALL_ROWS]
        encoded = [(model.chat.encode_independent(row.turns, model.visual_tokens()), row.frames[0]) for row in call]
        encoded.sort(key=lambda item: len(item[0].input_ids))
        for first in range(0, len(encoded), BATCH):
            batch = encoded[first : first + BATCH]
            pixels = to_pixels([decode(picture) for _, picture in batch], model.pixels)
            ids_BT, mask_BT = model.pad([chat.input_ids for chat, _ in batch])
            packing = pack([chat.starts for chat, _ in batch], ids_BT.shape[1])
            yield PaddedBatch(pixels, ids_BT, mask_BT, packing)


def forward(model: VisionLanguageModel, batch: PaddedBatch) -> None:
    visual_BSD = model.clip_embeds(model.features(batch.pixels_BCHW)[:, None])
    model.hidden(batch.input_ids_BT, batch.mask_BT, visual_BSD.flatten(0, 1), batch.packing)


if __name__ == "__main__":
    sys.exit(main())
