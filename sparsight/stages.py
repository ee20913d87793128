"""What one training stage consists of: what it reads, what may change, what it minimises, and for how long.

Settings only, and which of them contradict each other. A student is a list of stages, which it may take from
`presets`; `config` lists the students of a run.
"""

from collections.abc import Callable
from typing import Any, Literal

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
    """To the teacher's stored sparse targets, on every answer."""
    balance: float = Field(default=0.0, ge=0.0)
    """Router load balance, averaged over the sparse layers; padding is not counted."""
    preference: float = Field(default=0.0, ge=0.0, exclude_if=_unless(0.0))
    """Of `rows: pairs`, by the stage's `preference` settings; `cross_entropy` then is on the chosen answers."""

    @model_validator(mode="after")
    def _check(self) -> "TermsConfig":
        if self.cross_entropy == 0.0 and self.forward_kl == 0.0 and self.preference == 0.0:
            raise ValueError("a stage needs a cross_entropy, a forward_kl or a preference weight above 0")
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
    upcycle: UpcycleConfig | None = None
    """Turn the dense student that this stage receives into a sparse one before training."""
    preference: PreferenceConfig | None = Field(default=None, exclude_if=_unless(None))
    """For `rows: pairs`, and only there."""
    trainable: list[TrainableGroup] = Field(default=["projector", "text"], min_length=1)
    """Groups of weights that change. `experts` are the feed-forward networks of all text layers, dense ones included;
    `attention` holds the norms, `embeddings` the head; `text` is the whole text model, routers included."""
    terms: TermsConfig
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
        fault = self._preference_fault()
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
        if self.terms.forward_kl > 0.0:
            return "pairs hold no teacher targets for terms.forward_kl: the teacher enters as preference.reference"
        return None


class StudentRun(Slice):
    """One student: its name and its stages, each starting where the one before ended."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """Names its folder under `students/`, and its figures in the report."""
    start: str | None = Field(default=None, pattern=r"^[a-z0-9_]+/[a-z0-9_]+$", exclude_if=_unless(None))
    """Begin where a stage of a student listed before ended, as `student/stage`; None begins with a new student."""
    text_intermediate: int | None = Field(default=None, ge=1, exclude_if=_unless(None))
    """Width of a new student's feed-forward networks, where it differs from `student.architecture`'s."""
    preset: Literal["llava_mod"] | None = Field(default=None, exclude_if=_unless(None))
    """Take the stages of a published method: `llava_mod` has `adaptor`, `d2d` (KL on a dense student), `d2s` (KL and
    cross-entropy on a sparse one) and `preference`, with its paper's batches and learning rates, one epoch each."""
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
