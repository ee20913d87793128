"""Settings of the data: where pictures and questions come from, and how they are dealt out to the stages.

Settings only; the importers are in `sparsight.data`. Part of `config`, which gives them on.
"""

from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sparsight.settings import Slice

MAX_PICTURE_BYTES = 20_000_000
MAX_PICTURE_PIXELS = 50_000_000
"""What is opened where no other limits are set."""


class EasyVqaSource(Slice):
    """The easy-VQA benchmark: one coloured shape a picture, official training and test split."""

    kind: Literal["easy_vqa"]
    path: str | None = None
    """The package's data folder; None finds the installed `easy-vqa` package."""
    limit: int | None = Field(default=None, ge=1)
    """Keep only the first pictures of each split."""


class ScenesSource(Slice):
    """Drawn scenes of several coloured shapes, whose answers are exactly known."""

    kind: Literal["scenes"]
    pictures: int = Field(default=1000, ge=1)
    """Training pictures to draw."""
    test_pictures: int = Field(default=200, ge=0)
    """Held-out pictures to draw, from another seed."""
    max_objects: int = Field(default=4, ge=1, le=6)
    """Most shapes in one picture."""
    distinct: bool = Field(default=False, exclude_if=lambda value: not value)
    """No two shapes of a picture alike, so that who names one twice is wrong."""
    hidden: float = Field(default=0.0, ge=0.0, le=1.0, exclude_if=lambda value: not value)
    """Share of the training pictures in which one more shape lies unseen behind another. Their descriptions end with
    it, as their writers knew of it. Other questions and answers know only what shows, and so do held-out pictures'."""
    pair_pictures: int = Field(default=0, ge=0, exclude_if=lambda value: not value)
    """Further pictures for preference pairs (`pairs.samples: kept`), which no other stage sees; they hide nothing."""
    existence_questions: int = Field(default=1, ge=1, exclude_if=lambda value: value == 1)
    """How often each scene is asked for a shape that is there, and as often for one that is not; of equal questions one
    stays."""
    size_pixels: int = 64
    """Side of the square pictures."""


class LlavaSource(Slice):
    """Records in LLaVA form, beside a folder of pictures; a record without an `image` is text alone."""

    kind: Literal["llava"]
    path: str
    """The JSON file."""
    pictures: str
    """Folder that the records' `image` names are relative to."""
    test_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the pictures held out as a test set; whole pictures, by content hash."""


class HuggingFaceSource(Slice):
    """A dataset as Hugging Face `datasets` saves it, pictures inside."""

    kind: Literal["hugging_face"]
    path: str
    """A folder written by `save_to_disk`, or Parquet files of a dataset."""
    picture_column: str = "image"
    """The column of pictures; a row that has none in it is text alone."""
    question_column: str = "question"
    """The column of questions: a text or a list of texts."""
    answer_column: str = "answer"
    """The column of answers, as many as there are questions."""
    conversation_column: str | None = None
    """A column in LLaVA form; when set, the question and answer columns are not read."""
    split: str | None = None
    """The split of a dataset that has several."""
    test_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the pictures held out as a test set; whole pictures, by content hash."""


class StreamsSource(Slice):
    """Drawn streams of changing scenes, with timed questions (StreamQA): clips to learn from, streams for testing."""

    kind: Literal["streams"]
    clips: int = Field(default=1000, ge=1)
    """Training clips to draw."""
    test_clips: int = Field(default=100, ge=0)
    """Held-out clips to draw, from another seed."""
    clip_frames: list[Annotated[int, Field(ge=1)]] = Field(default=[*range(1, 17)], min_length=1)
    """Lengths of the clips in frames, taken in turn."""
    clip_colours: list[Annotated[int, Field(ge=4, le=8)]] = Field(default=[8], min_length=1)
    """Colours of the shapes of a clip, taken in turn: where they are few, frames are easily mistaken for each other."""
    clip_frames_per_second: float = Field(default=0.25, gt=0.0)
    """Sampling rate of the clips: lower than that of streams, so that a clip changes as often as retrieved frames."""
    streams: int = Field(default=0, ge=0)
    """Long streams of each length to draw for evaluation alone, and as many for choosing its settings."""
    lengths_s: list[float] = Field(default=[60.0, 600.0, 3600.0], min_length=1)
    """Lengths of the long streams, in seconds."""
    questions: int = Field(default=36, ge=1)
    """Questions of one long stream."""
    frames_per_second: float = Field(default=0.5, gt=0.0)
    """Sampling rate of the long streams."""
    scene_s: tuple[float, float] = (4.0, 12.0)
    """The shortest and the longest time that a scene is on, in seconds."""
    size_pixels: int = 64
    """Side of the square frames."""

    @model_validator(mode="after")
    def _check(self) -> "StreamsSource":
        if not 0.0 < self.scene_s[0] <= self.scene_s[1]:
            raise ValueError(f"scene_s {list(self.scene_s)}: give the shortest time above 0, then the longest")
        short = [seconds for seconds in self.lengths_s if round(seconds * self.frames_per_second) < 1]
        if short:
            raise ValueError(
                f"lengths_s {short}: a stream of {self.frames_per_second:g} frames a second needs one frame"
            )
        return self


class CocoSource(Slice):
    """Real pictures with COCO-style annotations, for testing alone: existence questions and descriptions."""

    kind: Literal["coco"]
    annotations: str
    """An `instances_*.json`."""
    pictures: str
    """Folder that the file names in it are relative to."""
    captions: str | None = None
    """The `captions_*.json` of the same pictures; what captions mention is there, too."""
    description_prompt: str = "Describe the image in detail."
    """What models are asked where a picture is to be described."""


TrainingSource = EasyVqaSource | ScenesSource | StreamsSource | LlavaSource | HuggingFaceSource
DataSource = Annotated[TrainingSource | CocoSource, Field(discriminator="kind")]


def row_prefix(source: TrainingSource) -> str:
    """What the ids of a source's rows begin with; it tells the sources of a run apart."""
    if isinstance(source, LlavaSource):
        return f"{source.kind}/{Path(source.path).stem}"
    if isinstance(source, HuggingFaceSource):
        return "/".join([source.kind, Path(source.path).stem, *([source.split] if source.split else [])])
    return source.kind


class HallucinationConfig(Slice):
    """Questions about scenes and COCO pictures that show whether models speak of what is not there (POPE, CHAIR)."""

    questions: int = Field(default=2, ge=1)
    """Objects of a picture that are asked for, and as many absent ones of each kind: random, popular, adversarial."""
    pictures: int | None = Field(default=None, ge=0)
    """At most so many pictures of each source; None takes all, 0 asks nothing."""


class DataConfig(Slice):
    """Where pictures and questions come from, and how they are dealt out; text without a picture counts as one."""

    sources: list[DataSource] = Field(min_length=1)
    """What is read, one after another."""
    turns_per_sample: int = Field(default=8, ge=1)
    """At most this many questions of one picture in one conversation."""
    validation_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the training pictures kept apart for choosing settings; whole pictures, by content hash."""
    ground_truth_fraction: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the student's training pictures whose answers it may see; the others reach it without answers."""
    hallucination: HallucinationConfig = HallucinationConfig()
    max_picture_bytes: int = MAX_PICTURE_BYTES
    """Largest encoded picture that is opened; rows with larger ones are quarantined."""
    max_picture_pixels: int = MAX_PICTURE_PIXELS
    """Largest width × height that is opened."""

    @property
    def training_sources(self) -> list[TrainingSource]:
        """The sources without those for testing alone."""
        return [source for source in self.sources if not isinstance(source, CocoSource)]

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if not self.training_sources:
            raise ValueError("sources of kind coco are for testing alone: name a source to learn from, too")
        if len(self.sources) - len(self.training_sources) > 1:
            raise ValueError("more than one source of kind coco: their annotation files name other objects")
        named = [(row_prefix(source), index) for index, source in enumerate(self.sources) if source.kind != "coco"]
        for (name, first), (longer, second) in combinations(sorted(named), 2):
            if f"{longer}/".startswith(f"{name}/"):
                mend = "give one of the files another name" if "/" in name else f"a run has one source of kind {name}"
                raise ValueError(f"sources {first} and {second} would both give rows named '{name}/…': {mend}")
        return self
