"""First stage: every source becomes checked samples; pictures go to training, validation and test sets.

Training rows of all sources are imported once (decoded, checked, quarantined where unusable) into a scratch folder of
the run, then dealt out by content hash into `samples/teacher` (all answers), `samples/student` (answers for a share
of the pictures), `samples/validation` and `samples/test_<source>`. About held-out scenes and COCO pictures,
`samples/test_pope` and `samples/test_coco` ask what shows hallucination; `samples/kept` are for preference pairs.
Long streams (`samples/test_streams`, `samples/validation_streams`) are recipes and questions without frames.
Memory holds one file of samples and the rows' hashes. Plain Python: nothing here needs a cluster. Run as
`python -m pipelines.prepare --config FILE`.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipelines.command import run_command
from sparsight import layout
from sparsight.artifacts import Artifact, RunDirectory, digest
from sparsight.config import (
    CocoSource,
    DataConfig,
    DataSource,
    EasyVqaSource,
    HuggingFaceSource,
    LlavaSource,
    RunConfig,
    ScenesSource,
    StreamsSource,
    TrainingSource,
)
from sparsight.data.coco import read_coco
from sparsight.data.easy_vqa import find_folder, read_easy_vqa
from sparsight.data.files import files_digest
from sparsight.data.hugging_face import read_hugging_face
from sparsight.data.llava import read_llava
from sparsight.data.objects import VOCABULARY, ObjectVocabulary
from sparsight.data.pope import questions_about_coco, questions_about_scenes
from sparsight.data.samples import Rows, iter_samples, write_quarantine, write_samples
from sparsight.data.scene_questions import scene_samples
from sparsight.data.scenes import SCENES_VERSION
from sparsight.data.split import choose_pictures
from sparsight.data.stream_questions import clip_samples, long_streams
from sparsight.data.stream_scenes import STREAM_SCENES_VERSION
from sparsight.data.streams import STREAMS_VERSION, write_streams
from sparsight.errors import DataError
from sparsight.observe import progress, say
from sparsight.records import SAMPLES_VERSION, Quarantined, Sample
from sparsight.storage import Storage

KIND = "samples"
STREAMS_KIND = "streams"
STREAM_SPLITS: dict[str, Literal["validation", "test"]] = {
    layout.TEST_STREAMS: "test",
    layout.VALIDATION_STREAMS: "validation",
}
"""The splits of long streams by artefact."""
SCRATCH = "samples/imported"
LONG_STREAM_SETTINGS = ("streams", "lengths_s", "frames_per_second", "questions")
HALLUCINATION_SETS = {"scenes": layout.held_out_samples("pope"), "coco": layout.held_out_samples("coco")}
"""The artefacts of questions that show hallucination, by kind of source."""


def name_of_test_set(source: TrainingSource) -> str:
    """The artefact that holds a source's test samples."""
    if isinstance(source, StreamsSource):
        return layout.held_out_samples("clips")
    return layout.held_out_samples(source.kind)


class Imported(NamedTuple):
    """What the training rows of all sources came to; the samples themselves lie in the scratch folder."""

    hash_of: dict[str, str]  # content hash by sample id
    source_of: dict[str, int]  # number of the training source by sample id
    quarantined: list[Quarantined]


class Deal(NamedTuple):
    """Which pictures go where, as content hashes; pictures in none of the first two are for training.

    Text alone is dealt out like a picture, by its own hash.
    """

    test: dict[str, frozenset[str]]  # by artefact
    validation: frozenset[str]
    answered: frozenset[str]

    @property
    def held_out(self) -> frozenset[str]:
        return self.validation.union(*self.test.values())


def prepare(config: RunConfig) -> None:
    """Write the sample artefacts of a run; finished ones are left alone.

    Raises `DataError` where a source cannot be read, and where no row of it can be used.
    """
    artifacts = {name: artifact for name, artifact in plan_artifacts(config).items() if not artifact.finished}
    if not artifacts:
        say("prepare: nothing to do, all samples are there")
        return
    for name in STREAM_SPLITS:
        if name in artifacts:
            _write_streams(name, artifacts.pop(name), config)
    if not artifacts:
        return
    scratch = RunDirectory(config.run_dir).storage.child(SCRATCH)
    imported = import_training_rows(config, scratch)
    deal = deal_pictures(config, imported)
    for name, artifact in artifacts.items():
        _write(name, artifact, config, scratch, imported, deal)
    scratch.delete("")


def plan_artifacts(config: RunConfig) -> dict[str, Artifact]:
    """The artefacts of this stage by name, fingerprinted by the data settings, the seed and the sources' files.

    What only one artefact depends on counts for it alone: the share of answers that the student sees, and what is asked
    to show hallucination. Changing it does not remake a teacher.
    """
    run = RunDirectory(config.run_dir)
    sources = config.data.training_sources
    data = config.data.model_dump(mode="json") | {"sources": [_trained_on(source) for source in sources]}
    fraction, hallucination = data.pop("ground_truth_fraction"), data.pop("hallucination")
    shared = {"data": data, "seed": config.seed, "scenes_version": SCENES_VERSION}
    inputs = {f"source_{index}_{source.kind}": source_digest(source) for index, source in enumerate(sources)}
    configs: dict[str, Any] = {
        layout.TEACHER_SAMPLES: shared,
        layout.STUDENT_SAMPLES: {**shared, "ground_truth_fraction": fraction},
    }
    if config.data.validation_fraction > 0.0:
        configs[layout.VALIDATION_SAMPLES] = shared
    configs |= dict.fromkeys(question_sets(config.data), shared)
    kept = [source.model_dump(mode="json") for source in _keeping(config.data)]
    if kept:
        configs[layout.KEPT_SAMPLES] = {**shared, "kept": kept}
    for source in _hallucination_sources(config.data):
        settings = {"source": _trained_on(source), "source_digest": source_digest(source)}
        configs[HALLUCINATION_SETS[source.kind]] = {**shared, "hallucination": hallucination, **settings}
    artifacts = {
        name: run.artifact(name, KIND, SAMPLES_VERSION, {"name": name, **settings}, inputs)
        for name, settings in configs.items()
    }
    for source in _streaming(config.data):
        settings = {"seed": config.seed, "source": source, "scenes_version": [SCENES_VERSION, STREAM_SCENES_VERSION]}
        for name in STREAM_SPLITS:
            artifacts[name] = run.artifact(name, STREAMS_KIND, STREAMS_VERSION, {"name": name, **settings})
    return artifacts


def question_sets(data: DataConfig) -> list[str]:
    """The artefacts of test questions that a model answers rightly or wrongly, as the sources come."""
    return list(dict.fromkeys(name_of_test_set(source) for source in data.training_sources if _has_test(source)))


def hallucination_sets(data: DataConfig) -> list[str]:
    """The artefacts of questions that show hallucination, those about scenes first."""
    return [HALLUCINATION_SETS[source.kind] for source in _hallucination_sources(data)]


def source_digest(source: DataSource) -> str:
    """A digest of a source's files, so that changed data is imported anew. Raises `DataError` if they are missing."""
    if isinstance(source, EasyVqaSource):
        folder = find_folder(source)
        questions = [folder / split / "questions.json" for split in ("train", "test")]
        return files_digest(*questions, folder / "train" / "images", folder / "test" / "images")
    if isinstance(source, LlavaSource):
        return files_digest(Path(source.path), Path(source.pictures))
    if isinstance(source, HuggingFaceSource):
        return files_digest(Path(source.path))
    if isinstance(source, CocoSource):
        captions = [] if source.captions is None else [Path(source.captions)]
        return files_digest(Path(source.annotations), *captions, Path(source.pictures))
    if isinstance(source, StreamsSource):
        return digest([_trained_on(source), STREAM_SCENES_VERSION])
    return digest(_trained_on(source))


def _trained_on(source: DataSource) -> dict[str, Any]:
    """A source's settings but for those that the kept pictures or the long streams alone depend on."""
    return source.model_dump(mode="json", exclude={"pair_pictures", *LONG_STREAM_SETTINGS})


def _keeping(data: DataConfig) -> list[ScenesSource]:
    """The sources that keep pictures for preference pairs."""
    return [source for source in data.sources if isinstance(source, ScenesSource) and source.pair_pictures > 0]


def _streaming(data: DataConfig) -> list[StreamsSource]:
    """The sources that long streams are drawn from."""
    return [source for source in data.sources if isinstance(source, StreamsSource) and source.streams > 0]


def _hallucination_sources(data: DataConfig) -> list[ScenesSource | CocoSource]:
    if data.hallucination.pictures == 0:
        return []
    scenes = [source for source in data.sources if isinstance(source, ScenesSource) and _has_test(source)]
    return [*scenes, *(source for source in data.sources if isinstance(source, CocoSource))]


def _has_test(source: TrainingSource) -> bool:
    if isinstance(source, ScenesSource):
        return source.test_pictures > 0
    if isinstance(source, StreamsSource):
        return source.test_clips > 0
    return isinstance(source, EasyVqaSource) or source.test_fraction > 0.0


def training_rows(source: TrainingSource, data: DataConfig, seed: int) -> Rows:
    """The rows of a source that training, validation and cut test sets are dealt from."""
    if isinstance(source, EasyVqaSource):
        return read_easy_vqa(source, "train", data, seed)
    if isinstance(source, ScenesSource):
        return Rows(source.pictures, scene_samples(source, "train", seed, data.turns_per_sample))
    if isinstance(source, StreamsSource):
        return Rows(source.clips, clip_samples(source, "train", seed, data.turns_per_sample))
    if isinstance(source, LlavaSource):
        return read_llava(source, data)
    return read_hugging_face(source, data)


def official_test_rows(source: TrainingSource, data: DataConfig, seed: int, seen: frozenset[str]) -> Rows | None:
    """The rows of a source's own test set, or None where it has none; `seen` are the training pictures' hashes."""
    if isinstance(source, EasyVqaSource):
        return read_easy_vqa(source, "test", data, seed)
    if isinstance(source, ScenesSource):
        items = scene_samples(source, "test", seed, data.turns_per_sample, exclude=seen)
        return Rows(source.test_pictures, items)
    if isinstance(source, StreamsSource):
        return Rows(source.test_clips, clip_samples(source, "test", seed, data.turns_per_sample, exclude=seen))
    return None


def import_training_rows(config: RunConfig, scratch: Storage) -> Imported:
    """Read every source's training rows once and keep the usable ones in `scratch`."""
    imported = Imported({}, {}, [])

    def good_rows() -> Iterator[Sample]:
        for number, source in enumerate(config.data.training_sources):
            before = len(imported.hash_of), len(imported.quarantined)
            rows = training_rows(source, config.data, config.seed)
            for row in progress(rows.items, f"importing {source.kind}", total=rows.total):
                if isinstance(row, Quarantined):
                    imported.quarantined.append(row)
                    continue
                assert row.id not in imported.hash_of, row.id
                imported.hash_of[row.id] = row.content_hash
                imported.source_of[row.id] = number
                yield row
            _check_usable(source, len(imported.hash_of) - before[0], imported.quarantined[before[1] :])

    write_samples(scratch, good_rows())
    return imported


def _check_usable(source: TrainingSource, samples: int, quarantined: Sequence[Quarantined]) -> None:
    if quarantined:
        first = quarantined[0]
        say(f"{source.kind}: {len(quarantined)} rows quarantined, the first is '{first.id}': {first.reason}")
    if samples == 0:
        reason = f"; the first, '{quarantined[0].id}': {quarantined[0].reason}" if quarantined else ""
        raise DataError(f"source '{source.kind}' gave no usable row, {len(quarantined)} were quarantined{reason}")


def deal_pictures(config: RunConfig, imported: Imported) -> Deal:
    """Choose the pictures of each side: tests first, then validation, then those whose answers the student sees."""
    test: dict[str, frozenset[str]] = {}
    for number, source in enumerate(config.data.training_sources):
        if isinstance(source, LlavaSource | HuggingFaceSource) and source.test_fraction > 0.0:
            own = (imported.hash_of[row] for row, origin in imported.source_of.items() if origin == number)
            chosen = choose_pictures(own, source.test_fraction, config.seed, "test")
            test[name_of_test_set(source)] = test.get(name_of_test_set(source), frozenset()) | chosen
    rest = set(imported.hash_of.values()).difference(*test.values())
    validation = choose_pictures(rest, config.data.validation_fraction, config.seed, "validation")
    answered = choose_pictures(rest - validation, config.data.ground_truth_fraction, config.seed, "ground_truth")
    return Deal(test, validation, answered)


def _write(name: str, artifact: Artifact, config: RunConfig, scratch: Storage, imported: Imported, deal: Deal) -> None:
    quarantined: list[Quarantined] = []
    counts = {"samples": 0, "questions": 0, "answered_questions": 0}
    pictures: set[str] = set()

    def counted(samples: Iterator[Sample]) -> Iterator[Sample]:
        for sample in samples:
            counts["samples"] += 1
            counts["questions"] += len(sample.turns)
            counts["answered_questions"] += sum(turn.answer is not None for turn in sample.turns)
            if sample.frames:
                pictures.add(sample.content_hash)
            yield sample

    artifact.begin()
    if name in (layout.TEACHER_SAMPLES, layout.STUDENT_SAMPLES):
        quarantined += imported.quarantined
        samples = _dealt(scratch, lambda content_hash: content_hash not in deal.held_out)
        if name == layout.STUDENT_SAMPLES:
            samples = (row if row.content_hash in deal.answered else row.without_answers() for row in samples)
    elif name == layout.VALIDATION_SAMPLES:
        samples = _dealt(scratch, lambda content_hash: content_hash in deal.validation)
    elif name == layout.KEPT_SAMPLES:
        samples = _kept_samples(config, imported)
    elif name in HALLUCINATION_SETS.values():
        rows, vocabulary = hallucination_rows(name, config, imported)
        artifact.storage.write_bytes(VOCABULARY, vocabulary.to_json())
        samples = _usable(rows, name, quarantined)
    else:
        samples = _test_samples(name, config, scratch, imported, deal, quarantined)
    write_samples(artifact.storage, counted(samples))
    if counts["samples"] == 0:
        raise DataError(f"'{name}' would be empty: give more pictures or another fraction in data, or mend the sources")
    write_quarantine(artifact.storage, quarantined)
    total = counts["samples"] + len(quarantined)
    artifact.commit({"input": total, "quarantined": len(quarantined), "pictures": len(pictures), **counts})
    say(f"{name}: {counts['questions']} questions, {len(pictures)} pictures, {len(quarantined)} rows quarantined")


def _write_streams(name: str, artifact: Artifact, config: RunConfig) -> None:
    (source,) = _streaming(config.data)
    streams = list(long_streams(source, STREAM_SPLITS[name], config.seed))
    artifact.begin()
    write_streams(artifact.storage, streams)
    questions = sum(len(stream.questions) for stream in streams)
    frames = sum(stream.recipe.frames for stream in streams)
    artifact.commit({"streams": len(streams), "questions": questions, "frames": frames})
    say(f"{name}: {questions} questions, {len(streams)} streams, {frames} frames to be drawn")


def _dealt(scratch: Storage, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    return (sample for sample in iter_samples(scratch) if wanted(sample.content_hash))


def _test_samples(
    name: str, config: RunConfig, scratch: Storage, imported: Imported, deal: Deal, quarantined: list[Quarantined]
) -> Iterator[Sample]:
    """The test samples of all sources that share an artefact; unusable rows are put into `quarantined`."""
    seen = frozenset(imported.hash_of.values())
    for source in config.data.training_sources:
        rows = official_test_rows(source, config.data, config.seed, seen) if name_of_test_set(source) == name else None
        if rows is not None:
            yield from _usable(rows, f"{source.kind} test", quarantined)
    if name in deal.test:
        yield from _dealt(scratch, lambda content_hash: content_hash in deal.test[name])


def _kept_samples(config: RunConfig, imported: Imported) -> Iterator[Sample]:
    """The pictures kept for preference pairs; none is a training or a test picture."""
    seen = frozenset(imported.hash_of.values())
    for source in _keeping(config.data):
        tests = scene_samples(source, "test", config.seed, config.data.turns_per_sample, exclude=seen)
        seen |= {sample.content_hash for sample in tests}
        yield from scene_samples(source, "pairs", config.seed, config.data.turns_per_sample, exclude=seen)


def hallucination_rows(name: str, config: RunConfig, imported: Imported) -> tuple[Rows, ObjectVocabulary]:
    """The rows of an artefact that shows hallucination, and the objects that its answers are read for."""
    seen = frozenset(imported.hash_of.values())
    source = next(it for it in _hallucination_sources(config.data) if HALLUCINATION_SETS[it.kind] == name)
    if isinstance(source, ScenesSource):
        return questions_about_scenes(source, config.data, config.seed, seen)
    annotated = read_coco(source)
    return questions_about_coco(annotated, source, config.data, config.seed, seen), annotated.vocabulary


def _usable(rows: Rows, name: str, quarantined: list[Quarantined]) -> Iterator[Sample]:
    for row in progress(rows.items, f"importing {name}", total=rows.total):
        if isinstance(row, Quarantined):
            quarantined.append(row)
        else:
            yield row


def plan(config: RunConfig) -> list[str]:
    """One line an artefact: what would be done."""
    return [
        f"{name}: {'finished, kept' if artifact.finished else 'to be written'} ({artifact.storage.uri})"
        for name, artifact in plan_artifacts(config).items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("Import the data sources and write the sample sets of a run.", prepare, argv, plan)


if __name__ == "__main__":
    sys.exit(main())
