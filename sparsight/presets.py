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

_LLAVA_KD_TERMS = {"cross_entropy": 1.0, "forward_kl": 1.0, "visual_kl": 1.0, "relation": 0.5}
"""LLaVA-KD's whole loss, with its paper's weights."""

_PREFERENCE = {
    "name": "preference",
    "rows": "pairs",
    "trainable": _SPARSE_GROUPS,
    "terms": {"preference": 1.0, "balance": 0.01},
    "preference": {"loss": "kto_pair", "beta": 0.1, "reference": "teacher"},
    "epochs": 1.0,
    "batch_samples": 256,
    "learning_rate": 2e-6,
}

_DPT = {
    "name": "dpt",
    "trainable": ["projector"],
    "terms": _LLAVA_KD_TERMS,
    "epochs": 1.0,
    "batch_samples": 256,
    "learning_rate": 1e-3,
}

PRESETS: dict[str, list[dict[str, Any]]] = {
    # LLaVA-MoD (arXiv 2408.15881): batches and schedule of its paper, trainable sets and losses of its code.
    "llava_mod": [
        {
            "name": "adaptor",
            "trainable": ["projector"],
            "terms": {"cross_entropy": 1.0},
            "epochs": 1.0,
            "batch_samples": 512,
            "learning_rate": 1e-3,
        },
        {
            "name": "d2d",
            "trainable": ["projector", "text"],
            "terms": {"forward_kl": 1.0},
            "epochs": 1.0,
            "batch_samples": 256,
            "learning_rate": 2e-5,
        },
        {
            "name": "d2s",
            "upcycle": {"experts": 4, "active_experts": 2, "layers": "every_second"},
            "trainable": _SPARSE_GROUPS,
            "terms": {"forward_kl": 1.0, "cross_entropy": 1.0, "balance": 0.01},
            "epochs": 1.0,
            "batch_samples": 256,
            "learning_rate": 2e-5,
        },
        _PREFERENCE,
    ],
    # LLaVA-KD (arXiv 2410.16236): batches, schedule and weights of its paper.
    "llava_kd": [
        _DPT,
        {
            "name": "sft",
            "trainable": ["projector", "text"],
            "terms": {"cross_entropy": 1.0},
            "epochs": 1.0,
            "batch_samples": 128,
            "learning_rate": 2e-5,
        },
        {
            "name": "dft",
            "trainable": ["projector", "text"],
            "terms": _LLAVA_KD_TERMS,
            "epochs": 1.0,
            "batch_samples": 128,
            "learning_rate": 2e-5,
        },
    ],
    # Both: LLaVA-MoD's stages and sparse student, LLaVA-KD's terms wherever the teacher's signals are read.
    "sparsight": [
        _DPT,
        {
            "name": "d2d",
            "trainable": ["projector", "text"],
            "terms": {"forward_kl": 1.0, "visual_kl": 1.0, "relation": 0.5},
            "epochs": 1.0,
            "batch_samples": 256,
            "learning_rate": 2e-5,
        },
        {
            "name": "d2s",
            "upcycle": {"experts": 4, "active_experts": 2, "layers": "every_second"},
            "trainable": _SPARSE_GROUPS,
            "terms": {**_LLAVA_KD_TERMS, "balance": 0.01},
            "epochs": 1.0,
            "batch_samples": 256,
            "learning_rate": 2e-5,
        },
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
