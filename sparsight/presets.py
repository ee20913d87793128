"""Published methods as lists of stages: a student names one, and lays its own settings over single stages.

Plain values in the form of the YAML file; they are checked as if they stood there. Called by `config` when a student
is read, so that everything after it sees plain stages.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

_EITHER = ("epochs", "steps")
"""Settings of which a stage has one: giving either replaces the other."""

_SPARSE_GROUPS = ["projector", "experts", "routers"]

_LLAVA_KD = {"cross_entropy": 1.0, "forward_kl": 1.0, "visual_kl": 1.0, "relation": 0.5}
"""LLaVA-KD's whole loss, with its paper's weights."""


def _stage(
    name: str, trainable: list[str], terms: dict[str, float], batch_samples: int, rate: float, **more: Any
) -> dict[str, Any]:
    """One pass over the rows."""
    values: dict[str, Any] = {"name": name, "trainable": trainable, "terms": terms, "epochs": 1.0}
    return {**values, "batch_samples": batch_samples, "learning_rate": rate, **more}


_WHOLE_TEXT = ["projector", "text"]
_UPCYCLE = {"experts": 4, "active_experts": 2, "layers": "every_second"}
_DPT = _stage("dpt", ["projector"], _LLAVA_KD, 256, 1e-3)
_PREFERENCE = _stage(
    "preference",
    _SPARSE_GROUPS,
    {"preference": 1.0, "balance": 0.01},
    256,
    2e-6,
    rows="pairs",
    preference={"loss": "kto_pair", "beta": 0.1, "reference": "teacher"},
)

PRESETS: dict[str, list[dict[str, Any]]] = {
    # LLaVA-MoD (arXiv 2408.15881): batches and schedule of its paper, trainable sets and losses of its code.
    "llava_mod": [
        _stage("adaptor", ["projector"], {"cross_entropy": 1.0}, 512, 1e-3),
        _stage("d2d", _WHOLE_TEXT, {"forward_kl": 1.0}, 256, 2e-5),
        _stage(
            "d2s",
            _SPARSE_GROUPS,
            {"forward_kl": 1.0, "cross_entropy": 1.0, "balance": 0.01},
            256,
            2e-5,
            upcycle=_UPCYCLE,
        ),
        _PREFERENCE,
    ],
    # LLaVA-KD (arXiv 2410.16236): batches, schedule and weights of its paper.
    "llava_kd": [
        _DPT,
        _stage("sft", _WHOLE_TEXT, {"cross_entropy": 1.0}, 128, 2e-5),
        _stage("dft", _WHOLE_TEXT, _LLAVA_KD, 128, 2e-5),
    ],
    # Both: LLaVA-KD's three stages, mimicry in each, the last on LLaVA-MoD's sparse student and without the
    # distributions at pictures; then LLaVA-MoD's preference stage (docs/decisions/0013).
    "sparsight": [
        _DPT,
        _stage("sft", _WHOLE_TEXT, {"cross_entropy": 1.0, "forward_kl": 1.0}, 128, 2e-5),
        _stage(
            "d2s",
            _WHOLE_TEXT,
            {"forward_kl": 1.0, "cross_entropy": 1.0, "relation": 0.5, "balance": 0.01},
            128,
            2e-5,
            upcycle=_UPCYCLE,
        ),
        _PREFERENCE,
    ],
}


def stages_of(preset: str, overlays: Sequence[Any]) -> list[dict[str, Any]]:
    """The stages of a preset with the overlays, each laid over the stage that it names; groups are merged key by key.

    Raises `ValueError` for an overlay that names no stage of the preset, or one that another overlay names.
    """
    stages = copy.deepcopy(PRESETS[preset])
    names = [stage["name"] for stage in stages]
    seen: set[str] = set()
    for overlay in overlays:
        name = str(overlay.get("name")) if isinstance(overlay, Mapping) else None
        if name is None or name not in names:
            raise ValueError(f"preset '{preset}' has the stages {', '.join(names)}, but the settings are for '{name}'")
        if name in seen:
            raise ValueError(f"stage '{name}' of preset '{preset}' is given twice")
        seen.add(name)
        place = names.index(name)
        stages[place] = _laid_over(stages[place], overlay)
    return stages


def _laid_over(stage: dict[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    kept = dict(stage)
    if any(overlay.get(key) is not None for key in _EITHER):
        kept = {key: value for key, value in kept.items() if key not in _EITHER}
    for key, value in overlay.items():
        old = kept.get(key)
        kept[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, Mapping) else value
    return kept
