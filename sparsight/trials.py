"""Settings of the evaluation on long streams: who is asked, and which frames an answer may rest on.

Settings only; `pipelines.stream_exam` carries them out, docs/protocol.md says what the methods mean. Part of `config`.
"""

from typing import Literal

from pydantic import Field, NonNegativeInt, model_validator

from sparsight.settings import Slice

MethodKind = Literal["full", "internal", "external", "uniform", "recent", "oracle"]

_READ: dict[MethodKind, frozenset[str]] = {
    "full": frozenset({"two_pass"}),
    "internal": frozenset({"frames", "recent", "similarity", "group", "around", "mass", "pages", "two_pass"}),
    "external": frozenset({"frames", "recent", "group", "around", "pages", "two_pass"}),
    "uniform": frozenset({"frames", "two_pass"}),
    "recent": frozenset({"frames", "two_pass"}),
    "oracle": frozenset({"frames", "recent", "pages", "two_pass"}),
}
"""The settings that each kind of method reads."""


class StreamMethod(Slice):
    """One way to answer a question about a long stream."""

    name: str
    """Its name in figures."""
    kind: MethodKind = "internal"
    """Which frames: all (`full`), those that each layer's own keys point to (`internal`), those whose embeddings are
    nearest to the question's (`external`), frames at equal distances (`uniform`), the newest (`recent`), or frames of
    the evidence (`oracle`)."""
    frames: int = Field(default=16, ge=1)
    """Frames that an answer may rest on, recent ones included; `full` takes all."""
    recent: int = Field(default=4, ge=0)
    """Of these, how many are always the newest; `internal`, `external` and `oracle` keep to it."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """How a question's queries are compared with a block's mean keys (`internal`)."""
    group: int = Field(default=1, ge=1)
    """Neighbouring frames that share the mean of their scores (`internal`, `external`)."""
    around: tuple[NonNegativeInt, NonNegativeInt] = (0, 0)
    """How many frames before and after it a chosen frame brings along, out of the same number (`internal`,
    `external`)."""
    mass: float | None = Field(default=None, gt=0.0, le=1.0)
    """Stop at this share of a layer's estimated attention, before `frames` are reached (`internal`)."""
    pages: Literal["plain", "int8", "int4"] = "plain"
    """How blocks are stored."""
    two_pass: bool = False
    """Retrieve with the bare question first, as published, and read the prompt afterwards."""

    @model_validator(mode="after")
    def _check(self) -> "StreamMethod":
        if self.kind in ("internal", "external", "oracle") and self.recent > self.frames:
            raise ValueError(f"method '{self.name}': recent {self.recent} is more than frames {self.frames}")
        unread = self.model_fields_set - _READ[self.kind] - {"name", "kind"}
        if unread:
            raise ValueError(
                f"method '{self.name}': {', '.join(sorted(unread))} would change nothing for '{self.kind}'"
            )
        return self


class StreamTrials(Slice):
    """Questions about long streams, asked of some models by several methods."""

    models: list[str] = Field(default=["student"], min_length=1)
    """Roles of the evaluation (`teacher`, `student`, a student's name); the first is asked by `ablations`, too."""
    window_tokens: int = Field(default=512, ge=1)
    """Sliding window of the encoder, in tokens."""
    methods: list[StreamMethod] = Field(min_length=1)
    """What every model is asked by."""
    ablations: list[StreamMethod] = Field(default=[])
    """What the first model is asked by besides."""
    max_answer_tokens: int = Field(default=8, ge=1)
    """Longest answer."""

    @model_validator(mode="after")
    def _check(self) -> "StreamTrials":
        names = [method.name for method in (*self.methods, *self.ablations)]
        if len(set(names)) != len(names):
            raise ValueError(f"names of methods are not unique: {names}")
        return self

    def methods_of(self, model: str) -> list[StreamMethod]:
        """How one of the models is asked."""
        return [*self.methods, *(self.ablations if model == self.models[0] else [])]
