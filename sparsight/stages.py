"""What one training stage consists of: what it reads, what may change, what it minimises, and for how long.

Settings only, which of them contradict each other, and what they ask of the teacher. A student is a list of stages,
which it may take from `presets`; `config` lists the students of a run.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from sparsight.presets import PRESETS, stages_of
from sparsight.settings import Slice


def _unless(unset: object) -> Callable[[Any], bool]:
    """Leaves a setting that is not in use out of what is written, so that it changes no stage's fingerprint."""
    return lambda value: value == unset


class UpcycleConfig(Slice):
    """How a dense text model becomes its sparse twin, with equal logits at first."""

    experts: int = Field(default=4, ge=2)
    """Copies of a layer's feed-forward network."""
    active_experts: int = Field(default=2, ge=1)
    """How many of them a token goes through."""
    layers: Literal["every_second", "first_half", "second_half", "all"] | list[int] = "every_second"
    """Which text layers become sparse; every_second starts at layer 0, as LLaVA-MoD does."""

    @model_validator(mode="after")
    def _check(self) -> "UpcycleConfig":
        if self.active_experts > self.experts:
            raise ValueError(f"active_experts {self.active_experts} is more than experts {self.experts}")
        return self


class TermsConfig(Slice):
    """Weights of the loss terms of a stage; a term of weight 0 is not computed."""

    cross_entropy: float = Field(default=0.0, ge=0.0)
    """On answers that are ground truth (never on answers that the teacher wrote)."""
    forward_kl: float = Field(default=0.0, ge=0.0)
    """To the teacher's sparse targets, on every answer."""
    balance: float = Field(default=0.0, ge=0.0)
    """Router load balance, averaged over the sparse layers; padding is not counted."""
    preference: float = Field(default=0.0, ge=0.0, exclude_if=_unless(0.0))
    """Of `rows: pairs`, by the stage's `preference` settings; `cross_entropy` then is on the chosen answers."""
    visual_kl: float = Field(default=0.0, ge=0.0, exclude_if=_unless(0.0))
    """To the teacher's sparse targets at the picture's positions (LLaVA-KD's MDist), a mean over each sample's."""
    relation: float = Field(default=0.0, ge=0.0, exclude_if=_unless(0.0))
    """One minus the cosine of teacher's and student's relations between the picture's positions (RDist)."""
    attention: float = Field(default=0.0, ge=0.0, exclude_if=_unless(0.0))
    """One minus the cosine of how text attends to the picture's positions in the middle layers (CompoDistill)."""
    retrieval: float = Field(default=0.0, ge=0.0, exclude_if=_unless(0.0))
    """That each layer's own queries find the frames that a question's answer follows from among all of its clip, as
    retrieval from a stream needs it (docs/numerics.md); of questions that say which these are."""

    @property
    def of_teacher(self) -> bool:
        """Whether a term compares with the teacher at a sample's positions."""
        return self.forward_kl > 0.0 or self.visual

    @property
    def visual(self) -> bool:
        """Whether a term compares with the teacher at the picture's positions."""
        return self.visual_kl > 0.0 or self.relation > 0.0 or self.attention > 0.0

    @model_validator(mode="after")
    def _check(self) -> "TermsConfig":
        if not self.of_teacher and self.cross_entropy == self.preference == self.retrieval == 0.0:
            raise ValueError("a stage needs a term to learn from: give cross_entropy, forward_kl or another a weight")
        return self


class PreferenceConfig(Slice):
    """How a student is brought to prefer the chosen answers; the formulas are in docs/numerics.md."""

    loss: Literal["dpo", "kto_pair"] = "kto_pair"
    """`dpo` compares the two answers of a pair, `kto_pair` each with the batch's mean change of the other kind."""
    beta: float = Field(default=0.1, gt=0.0)
    """How much of a change in log-prob counts as a change in preference."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Share of pairs that are held to be the wrong way round; for `dpo` only."""
    reference: Literal["teacher", "student"] = "teacher"
    """Log-probs are taken relative to the teacher's, stored with the pairs, or to those that the student itself had
    when the stage began."""

    @model_validator(mode="after")
    def _check(self) -> "PreferenceConfig":
        if self.label_smoothing > 0.0 and self.loss != "dpo":
            raise ValueError(f"label_smoothing is a setting of the loss 'dpo', not of '{self.loss}': set it to 0")
        return self


TrainableGroup = Literal["tower", "projector", "embeddings", "attention", "experts", "routers", "text"]


class StageConfig(Slice):
    """One training stage: what it reads, what may change, what it minimises, and for how long."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """Names its folder under the student's or teacher's."""
    rows: Literal["all", "ground_truth", "pairs"] = "all"
    """All training rows, or only those whose answers are ground truth, or the student's preference pairs."""
    share: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of these rows' pictures that the stage learns from, chosen by seed: a small model finds its way sooner on
    few pictures seen often than on many seen once (arXiv 2410.07041); a later stage then takes them all."""
    most_tokens: int | None = Field(default=None, ge=1, exclude_if=_unless(None))
    """Learn from rows of at most so many tokens, pictures' included: short clips first is a curriculum by length."""
    upcycle: UpcycleConfig | None = None
    """Turn the dense student that this stage receives into a sparse one before training."""
    preference: PreferenceConfig | None = Field(default=None, exclude_if=_unless(None))
    """For `rows: pairs`, and only there."""
    trainable: list[TrainableGroup] = Field(default=["projector", "text"], min_length=1)
    """Groups of weights that change. `experts` are the feed-forward networks of all text layers, dense ones included;
    `attention` holds the norms, `embeddings` the head; `text` is the whole text model, routers included."""
    terms: TermsConfig
    teacher: Literal["stored", "live"] = Field(default="stored", exclude_if=_unless("stored"))
    """Where the teacher's side of a term comes from: the signals that labelling stored, or the frozen teacher itself,
    beside the student in every training worker; its answers are the stored ones in both."""
    live_head: int | None = Field(default=None, ge=1, exclude_if=_unless(None))
    """Exact tokens a position of a live teacher, where not `label.head`; as many as the vocabulary are whole logits."""
    live_tail_samples: int | None = Field(default=None, ge=0, exclude_if=_unless(None))
    """Draws from the remaining mass of a live teacher, where not `label.tail_samples`."""
    relation_centred: bool = Field(default=False, exclude_if=_unless(False))
    """Take relations after the mean over the picture's positions is subtracted from the logits."""
    tail: Literal["sampled", "bucket"] = "sampled"
    """How the mass outside the exact head is used: unbiased sampled tail, or one bucket (biased, no variance)."""
    epochs: float | None = Field(default=None, gt=0.0)
    """Passes over the stage's rows; need not be whole."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; give this or `epochs`."""
    batch_samples: int = Field(default=32, ge=1)
    """Samples of one optimiser step, over all workers."""
    learning_rate: float = Field(default=1e-3, gt=0.0)
    """Its peak: it rises linearly and falls along a cosine."""
    warmup_fraction: float = Field(default=0.03, ge=0.0, le=1.0)
    """Share of the steps in which it rises."""
    weight_decay: float = 0.0
    """AdamW's, on weight matrices; not on norms and biases."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay rates of the gradient's mean and of its square."""
    clip_norm: float = 1.0
    """Longest gradient; a longer one is scaled down."""
    checkpoint_every_steps: int = Field(default=200, ge=1)
    """Steps that a killed worker costs at most."""

    @model_validator(mode="after")
    def _check(self) -> "StageConfig":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"stage '{self.name}': give exactly one of epochs and steps")
        fault = self._preference_fault() or self._teacher_fault()
        if fault is not None:
            raise ValueError(f"stage '{self.name}': {fault}")
        return self

    def _preference_fault(self) -> str | None:
        if self.rows != "pairs":
            if self.terms.preference > 0.0:
                return "terms.preference learns from pairs of answers: set rows: pairs"
            return None if self.preference is None else "preference settings are for rows: pairs"
        if self.preference is None:
            return "rows: pairs need the settings of the preference loss: give preference: {loss: kto_pair}"
        if self.terms.retrieval > 0.0:
            return "pairs do not say what frames an answer follows from: leave terms.retrieval out"
        if self.terms.of_teacher:
            return "pairs hold no teacher targets for forward_kl and visual terms: set preference.reference instead"
        return None

    def _teacher_fault(self) -> str | None:
        if self.relation_centred and self.terms.relation == 0.0:
            return "relation_centred is a setting of terms.relation: give that a weight, or leave it out"
        if self.teacher == "stored" and (self.live_head is not None or self.live_tail_samples is not None):
            return "live_head and live_tail_samples are settings of teacher: live; what is stored says label"
        if self.teacher == "live" and not self.terms.of_teacher:
            return "teacher: live is for terms that compare with the teacher: give one a weight, or leave it out"
        return None


class StudentRun(Slice):
    """One student: its name and its stages, each starting where the one before ended."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """Names its folder under `students/`, and its figures in the report."""
    start: str | None = Field(default=None, pattern=r"^[a-z0-9_]+/[a-z0-9_]+$", exclude_if=_unless(None))
    """Begin where a stage of a student listed before ended, as `student/stage`; None begins with a new student."""
    text_intermediate: int | None = Field(default=None, ge=1, exclude_if=_unless(None))
    """Width of a new student's feed-forward networks, where it differs from `student.architecture`'s."""
    preset: Literal["llava_mod", "llava_kd", "sparsight"] | None = Field(default=None, exclude_if=_unless(None))
    """Take the stages of a published method, with its paper's batches and learning rates, one epoch each. `llava_mod`
    has `adaptor`, `d2d` (KL on a dense student), `d2s` (KL and cross-entropy on a sparse one) and `preference`;
    `llava_kd` has `dpt` (all terms, on the projector), `sft` (cross-entropy) and `dft` (all terms); `sparsight` has
    `dpt`, `sft` (with KL), `d2s` and `preference`: the second method's stages on the first's student."""
    stages: list[StageConfig] = Field(min_length=1)
    """With a preset: settings laid over the preset's stages, each naming its stage; all others stay as they are."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(preset, str) or preset not in PRESETS:
            return values
        return {**values, "stages": stages_of(preset, values.get("stages") or [])}

    @model_validator(mode="after")
    def _check(self) -> "StudentRun":
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"student '{self.name}': stage names are not unique: {names}")
        if self.start is not None and self.text_intermediate is not None:
            raise ValueError(f"student '{self.name}' starts at '{self.start}': its text_intermediate is that one's")
        pairs = [index for index, stage in enumerate(self.stages) if stage.rows == "pairs"]
        if pairs and ((pairs[0] == 0 and self.start is None) or len(pairs) > 1):
            raise ValueError(
                f"student '{self.name}': pairs are made once, from answers that an earlier stage taught: give one "
                "stage with rows: pairs, and not the first"
            )
        return self


class VisualAsk(NamedTuple):
    """What stages ask the teacher to say about a picture's positions, beside its answers."""

    targets: bool = False
    relation: bool = False
    attention: bool = False


def visual_ask(stages: Iterable[StageConfig]) -> VisualAsk:
    """Everything that the visual terms of any of these stages need."""
    terms = [stage.terms for stage in stages]
    return VisualAsk(
        any(it.visual_kl > 0.0 for it in terms),
        any(it.relation > 0.0 for it in terms),
        any(it.attention > 0.0 for it in terms),
    )
