"""What one training stage consists of: what it reads, what may change, what it minimises, and for how long.

Settings only, and which of them contradict each other. `config` lists the students that go through stages, `presets`
the stages that published methods consist of.
"""

from typing import Literal

from pydantic import Field, model_validator

from sparsight.settings import Slice


class UpcycleConfig(Slice):
    experts: int = Field(default=4, ge=2)
    active_experts: int = Field(default=2, ge=1)
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

    @model_validator(mode="after")
    def _check(self) -> "TermsConfig":
        if self.cross_entropy == 0.0 and self.forward_kl == 0.0:
            raise ValueError("a stage needs a cross_entropy or a forward_kl weight above 0")
        return self


TrainableGroup = Literal["tower", "projector", "embeddings", "attention", "experts", "routers", "text"]


class StageConfig(Slice):
    """One training stage: what it reads, what may change, what it minimises, and for how long."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    rows: Literal["all", "ground_truth"] = "all"
    """All training rows, or only those whose answers are ground truth."""
    share: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of these rows' pictures that the stage learns from, chosen by seed: a small model finds its way sooner on
    few pictures seen often than on many seen once (arXiv 2410.07041); a later stage then takes them all."""
    upcycle: UpcycleConfig | None = None
    """Turn the dense student that this stage receives into a sparse one before training."""
    trainable: list[TrainableGroup] = Field(default=["projector", "text"])
    """Groups of weights that change; `text` is the whole text model, head and routers included."""
    terms: TermsConfig
    tail: Literal["sampled", "bucket"] = "sampled"
    """How the mass outside the exact head is used: unbiased sampled tail, or one bucket (biased, no variance)."""
    epochs: float | None = Field(default=None, gt=0.0)
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; give this or `epochs`."""
    batch_samples: int = Field(default=32, ge=1)
    """Samples of one optimiser step, over all workers."""
    learning_rate: float = Field(default=1e-3, gt=0.0)
    warmup_fraction: float = Field(default=0.03, ge=0.0, le=1.0)
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    checkpoint_every_steps: int = Field(default=200, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "StageConfig":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"stage '{self.name}': give exactly one of epochs and steps")
        return self
