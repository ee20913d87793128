"""Training of a new vision tower to see coloured shapes, so that a tiny teacher can be made on a laptop.

Training everything at once from nothing stays at the language prior; a tower that already names shape and colour,
patch by patch, does not. It learns from drawn scenes (what every patch shows, and where objects are) and from
training pictures of one object (what their answers call it). The read-out heads are thrown away. Called by
`pipelines.teacher`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from sparsight.config import TowerStageConfig
from sparsight.data.easy_vqa import SOURCE as ONE_OBJECT_SOURCE
from sparsight.data.scenes import COLOUR_NAMES, SHAPES, Scene, draw, patch_labels, random_scene
from sparsight.media.images import DEFAULT_LIMITS, DecodeLimits, decode
from sparsight.media.pixels import to_pixels
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import Sample

WEIGHT_DECAY = 0.05
WARMUP_STEPS = 40
GROUND_WEIGHT = 0.15
"""Of the ground in the patch losses: most patches show nothing else."""
TRAINING_PICTURE_SHARE = 0.25
"""Of a batch; the rest are drawn scenes."""
ONE_OBJECT_SHARE = 0.3
"""Of the drawn scenes."""
CHECK_PICTURES = 400

Report = Callable[[int, dict[str, float]], None]
"""Told the step (from 1) and its losses."""


class Drawn(NamedTuple):
    """Drawn scenes: pixels [N, 3, side, side]; per patch shape and colour ids (0 is ground) and object centres [N, P];
    and for scenes of one object its shape and colour [N], else -1."""

    pixels: torch.Tensor
    shapes_NP: torch.Tensor
    colours_NP: torch.Tensor
    centres_NP: torch.Tensor
    shape_N: torch.Tensor
    colour_N: torch.Tensor


class OneObject(NamedTuple):
    """Training pictures of one object: pixels [N, 3, side, side], shape and colour ids [N], -1 where not known."""

    pixels: torch.Tensor
    shape_N: torch.Tensor
    colour_N: torch.Tensor


def train_tower(
    model: VisionLanguageModel,
    settings: TowerStageConfig,
    samples: Iterable[Sample],
    seed: int,
    report: Report,
    limits: DecodeLimits = DEFAULT_LIMITS,
) -> dict[str, float]:
    """Train the model's tower in place; returns its accuracy on freshly drawn scenes (patches that show objects).

    Equal arguments on one machine give equal weights.
    """
    torch.manual_seed(seed)
    start_positions(model)
    real = one_object(model, samples, limits)
    trainer = _TowerTrainer(model, settings, draw_scenes(model, settings.drawn_pictures, seed), real)
    picks = np.random.default_rng(seed)
    for step in range(settings.steps):
        report(step + 1, trainer.train_step(step, picks))
    return trainer.check(draw_scenes(model, CHECK_PICTURES, seed + 1))


def start_positions(model: VisionLanguageModel) -> None:
    """Position embeddings that start as sines and cosines of x and y, turned at random: neighbours start alike."""
    weight_PD: torch.Tensor = model.model.model.vision_tower.embeddings.position_embedding.weight
    P, D = weight_PD.shape
    side = math.isqrt(P)
    frequencies = 2 * math.pi / side * torch.tensor([0.25, 0.5, 0.75, 1.0, 4 / 3, 1.6, 2.0, 8 / 3])
    y_P, x_P = (axis.flatten() for axis in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    angles = [axis_P[:, None] * frequencies for axis_P in (x_P, y_P)]
    code_PC = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    turn_CD = torch.linalg.qr(torch.randn(D, D))[0][: code_PC.shape[1]]
    start_PD = code_PC[:, : len(turn_CD)] @ turn_CD
    with torch.no_grad():
        weight_PD.copy_(start_PD / start_PD.pow(2).mean().sqrt())


def draw_scenes(model: VisionLanguageModel, count: int, seed: int) -> Drawn:
    """Seeded scenes at the model's picture size with what their patches show."""
    random = Random(f"tower/{seed}")
    side, patch = model.pixels.side, int(model.model.config.vision_config.patch_size)
    scenes = [random_scene(random, side, single_object=random.random() < ONE_OBJECT_SHARE) for _ in range(count)]
    labels = [patch_labels(scene, patch) for scene in scenes]
    single = [scene.objects[0] if len(scene.objects) == 1 else None for scene in scenes]
    return Drawn(
        to_pixels([draw(scene) for scene in scenes], model.pixels),
        torch.from_numpy(np.stack([shapes for shapes, _ in labels])),
        torch.from_numpy(np.stack([colours for _, colours in labels])),
        torch.stack([_centres(scene, patch) for scene in scenes]),
        torch.tensor([SHAPES.index(item.shape) if item else -1 for item in single]),
        torch.tensor([COLOUR_NAMES.index(item.colour) if item else -1 for item in single]),
    )


def _centres(scene: Scene, patch: int) -> torch.Tensor:
    side = scene.size_pixels // patch
    marks_P = torch.zeros(side * side)
    for item in scene.objects:
        x, y = item.centre
        marks_P[int(y // patch) * side + int(x // patch)] = 1.0
    return marks_P


def one_object(
    model: VisionLanguageModel, samples: Iterable[Sample], limits: DecodeLimits = DEFAULT_LIMITS
) -> OneObject:
    """Training pictures whose answers name the one object in them (easy-VQA); there may be none."""
    frames: dict[str, bytes] = {}
    named: dict[str, list[int]] = {}
    for sample in samples:
        if sample.source == ONE_OBJECT_SOURCE:
            frames[sample.content_hash] = sample.frames[0]
            label = named.setdefault(sample.content_hash, [-1, -1])
            for turn in sample.turns:
                if turn.answer in SHAPES:
                    label[0] = SHAPES.index(turn.answer)
                elif turn.answer in COLOUR_NAMES:
                    label[1] = COLOUR_NAMES.index(turn.answer)
    pixels = to_pixels([decode(frame, *limits) for frame in frames.values()], model.pixels)
    labels_N2 = torch.tensor(list(named.values()), dtype=torch.long).view(-1, 2)
    return OneObject(pixels, labels_N2[:, 0], labels_N2[:, 1])


@dataclass
class _Reading:
    """Scores per patch [B, P, 4 + 9 + 1], per pooled cell [B, cells, 3 + 8 + 1] and per picture [B, 3 + 8]."""

    patches: torch.Tensor
    cells: torch.Tensor
    picture: torch.Tensor


class _Heads(nn.Module):
    """Read-outs of shapes, colours and object centres, at the three scales that a text model will need."""

    def __init__(self, width: int) -> None:
        super().__init__()
        kinds = len(SHAPES) + len(COLOUR_NAMES)
        self.patches = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, kinds + 3))
        self.cells = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, kinds + 1))
        self.picture = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, kinds))

    def forward(self, features_BPD: torch.Tensor) -> _Reading:
        return _Reading(
            self.patches(features_BPD), self.cells(_cells(features_BPD)), self.picture(features_BPD.mean(dim=1))
        )


class _TowerTrainer:
    """Tower, heads and optimiser over the two kinds of pictures."""

    def __init__(self, model: VisionLanguageModel, settings: TowerStageConfig, drawn: Drawn, real: OneObject) -> None:
        self.model, self.settings, self.drawn, self.real = model, settings, drawn, real
        self.heads = _Heads(int(model.model.config.vision_config.hidden_size))
        self.parameters = [*model.model.model.vision_tower.parameters(), *self.heads.parameters()]
        for parameter in self.parameters:
            parameter.requires_grad_()
        groups: list[dict[str, Any]] = [
            {"params": [value for value in self.parameters if value.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [value for value in self.parameters if value.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)

    def train_step(self, step: int, picks: np.random.Generator) -> dict[str, float]:
        batch = self.settings.batch_pictures
        real_count = int(batch * TRAINING_PICTURE_SHARE) if len(self.real.pixels) else 0
        drawn = Drawn(*_pick(self.drawn, picks, batch - real_count))
        real = OneObject(*_pick(self.real, picks, real_count))
        mirrored = torch.from_numpy(picks.random(real_count) < 0.5)[:, None, None, None]
        real_pixels = torch.where(mirrored, real.pixels.flip(-1), real.pixels)
        features = self.model.features(torch.cat([drawn.pixels, real_pixels]), gradient=True)
        losses = tower_losses(self.heads(features), drawn, real)
        loss = losses["patches"] + losses["cells"] + 0.5 * losses["centres"] + 0.5 * losses["picture"]
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self._scale(step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, error_if_nonfinite=True)
        self.optimizer.step()
        return {"loss": float(loss.detach()), **{name: float(value.detach()) for name, value in losses.items()}}

    def _scale(self, step: int) -> float:
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / self.settings.steps))
        return min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * cosine)

    @torch.no_grad()
    def check(self, drawn: Drawn) -> dict[str, float]:
        """Accuracy of shape and colour on the patches that show objects."""
        read = self.heads(self.model.features(drawn.pixels)).patches
        shapes, colours, _ = read.split([len(SHAPES) + 1, len(COLOUR_NAMES) + 1, 1], dim=-1)
        shown = drawn.shapes_NP > 0
        right = {"tower_shape": (shapes, drawn.shapes_NP), "tower_colour": (colours, drawn.colours_NP)}
        return {
            name: float((scores.argmax(dim=-1) == truth)[shown].float().mean())
            for name, (scores, truth) in right.items()
        }


def _pick(pictures: Drawn | OneObject, picks: np.random.Generator, count: int) -> list[torch.Tensor]:
    """Random pictures with all that is known of them."""
    if count == 0:
        return [values[:0] for values in pictures]
    chosen = torch.from_numpy(picks.integers(len(pictures.pixels), size=count))
    return [values[chosen] for values in pictures]


def tower_losses(read: _Reading, drawn: Drawn, real: OneObject) -> dict[str, torch.Tensor]:
    """The four losses of a batch that holds the drawn pictures first, then the training pictures."""
    count = len(drawn.pixels)
    shapes, colours, centres = read.patches[:count].split([len(SHAPES) + 1, len(COLOUR_NAMES) + 1, 1], dim=-1)
    shape_truth = functional.one_hot(drawn.shapes_NP, len(SHAPES) + 1)[..., 1:]
    colour_truth = functional.one_hot(drawn.colours_NP, len(COLOUR_NAMES) + 1)[..., 1:]
    seen = torch.cat([shape_truth.float(), colour_truth.float(), drawn.centres_NP[..., None]], dim=-1)
    shape_N, colour_N = torch.cat([drawn.shape_N, real.shape_N]), torch.cat([drawn.colour_N, real.colour_N])
    picture_shape, picture_colour = read.picture.split([len(SHAPES), len(COLOUR_NAMES)], dim=-1)
    return {
        "patches": _patch_loss(shapes, drawn.shapes_NP) + _patch_loss(colours, drawn.colours_NP),
        "cells": _presence_loss(read.cells[:count], _cells(seen, largest=True), 4.0),
        "centres": _presence_loss(centres[..., 0], drawn.centres_NP, 8.0),
        "picture": _known_loss(picture_shape, shape_N) + _known_loss(picture_colour, colour_N),
    }


def _patch_loss(scores_BPE: torch.Tensor, truth_BP: torch.Tensor) -> torch.Tensor:
    weights_E = torch.ones(scores_BPE.shape[-1])
    weights_E[0] = GROUND_WEIGHT
    return functional.cross_entropy(scores_BPE.flatten(0, 1), truth_BP.flatten(), weights_E)


def _presence_loss(scores: torch.Tensor, truth: torch.Tensor, weight: float) -> torch.Tensor:
    return functional.binary_cross_entropy_with_logits(scores, truth, pos_weight=torch.tensor(weight))


def _known_loss(scores_NE: torch.Tensor, truth_N: torch.Tensor) -> torch.Tensor:
    """Mean over the pictures whose truth is known; 0 where none is."""
    total = functional.cross_entropy(scores_NE, truth_N, ignore_index=-1, reduction="sum")
    return total / (truth_N >= 0).sum().clamp(min=1)


def _cells(values_BPD: torch.Tensor, largest: bool = False) -> torch.Tensor:
    """Mean (or maximum) over 2 × 2 patches, as the projector's output is pooled: [B, P, D] → [B, cells, D]."""
    side = math.isqrt(values_BPD.shape[1])
    grid_BDHW = values_BPD.transpose(1, 2).unflatten(2, (side, side))
    pool = functional.max_pool2d if largest else functional.avg_pool2d
    return pool(grid_BDHW, 2, ceil_mode=True).flatten(2).transpose(1, 2)
