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
        {
            "name": "preference",
            "rows": "pairs",
            "trainable": _SPARSE_GROUPS,
            "terms": {"preference": 1.0, "balance": 0.01},
            "preference": {"loss": "kto_pair", "beta": 0.1, "reference": "teacher"},
            "epochs": 1.0,
            "batch_samples": 256,
            "learning_rate": 2e-6,
        },
    ]
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
