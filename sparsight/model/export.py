"""A trained student leaves the house: a model directory in the hub's canonical layout, and the proof that it reloads.

transformers writes everything as the hub has it but two things that vLLM wants: the tower's keys under
`vision_tower.vision_model.`, and no empty tensors. What is written is loaded again by plain transformers, through the
stock forward with pictures, and compared; `export_vllm.py` asks vLLM the same. Called by `pipelines.export`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

from sparsight.errors import ExportError
from sparsight.media.pixels import to_pixels
from sparsight.model.vision_language import VisionLanguageModel

TOLERANCE = 1e-5
"""Largest difference of a log-prob, in float32, between a model and its export."""

_TOWER, _CANONICAL_TOWER = "vision_tower.", "vision_tower.vision_model."
QUESTIONS = ("what shape is in the image?", "is there a red circle?", "how many shapes are there?")


@dataclass(frozen=True)
class Probe:
    """A fixed prompt with its picture, and the text that its answer is taken to be."""

    question: str
    answer: str
    picture: Image.Image


def probes(side: int) -> list[Probe]:
    """Three prompts with drawn pictures; equal for every export of a picture size."""
    found: list[Probe] = []
    for index, question in enumerate(QUESTIONS):
        picture = Image.new("RGB", (side, side), ("white", "gray", "black")[index])
        corner = side * (index + 1) // 8
        box = (corner, corner, corner + side // 3, corner + side // 3)
        ImageDraw.Draw(picture).ellipse(box, fill=("red", "blue", "yellow")[index])
        found.append(Probe(question, ("circle", "yes", "one")[index], picture))
    return found


def write_export(model: VisionLanguageModel, directory: Path) -> None:
    """Write the canonical directory: weights, configs, generation settings, tokenizer, chat template, processor."""
    if not model.model.config.text_config.architectures:
        raise ExportError("the text model's config names no architecture: vLLM could not choose its class; set it")
    model.save(directory)
    shards = sorted(directory.glob("*.safetensors"))
    names: dict[str, str] = {}
    for shard in shards:
        weights = {canonical_key(key): value for key, value in load_file(shard).items() if value.numel()}
        save_file(weights, shard, metadata={"format": "pt"})
        names |= dict.fromkeys(weights, shard.name)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        values = json.loads(index.read_text()) | {"weight_map": dict(sorted(names.items()))}
        index.write_text(json.dumps(values, indent=2) + "\n")


def canonical_key(key: str) -> str:
    """A weight's name in the layout of the hub's LLaVA-OneVision checkpoints."""
    if key.startswith(_TOWER) and not key.startswith(_CANONICAL_TOWER):
        return _CANONICAL_TOWER + key.removeprefix(_TOWER)
    return key


def probe_ids(model: VisionLanguageModel, probe: Probe) -> tuple[list[int], int]:
    """Token ids of prompt and answer, picture placeholders expanded, and where the answer starts."""
    content = [{"type": "video"}, {"type": "text", "text": model.chat.plain(probe.question)}]
    prompt = model.chat.prompt([{"role": "user", "content": content}], [model.visual_tokens()])
    answer: list[int] = model.chat.tokenizer(probe.answer, add_special_tokens=False)["input_ids"]
    return [*prompt, *answer, model.chat.end_id], len(prompt)


@torch.inference_mode()
def probe_logprobs(model: VisionLanguageModel) -> list[torch.Tensor]:
    """Log-probs of every token after the picture given those before, by our own partial forwards; one row a probe."""
    rows: list[torch.Tensor] = []
    for probe in probes(model.pixels.side):
        ids, _ = probe_ids(model, probe)
        features_NPD = model.features(to_pixels([probe.picture], model.pixels))
        input_ids_BT, mask_BT = model.pad([ids])
        hidden_BTD = model.hidden(input_ids_BT, mask_BT, model.clip_embeds(features_NPD[None])[0])
        rows.append(_of_tokens(hidden_BTD[0] @ model.head_VD.T, ids, model.chat.visual_id))
    return rows


@torch.inference_mode()
def stock_logprobs(directory: Path, like: VisionLanguageModel) -> list[torch.Tensor]:
    """The same by plain transformers from a directory: its own classes, one forward, no code of ours between.

    Raises `ExportError` where keys are missing or unexpected, or the tokenizer cuts the prompts otherwise.
    """
    loaded: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    wrong = {name: sorted(info[name])[:3] for name in ("missing_keys", "unexpected_keys") if info[name]}
    if wrong:
        raise ExportError(f"'{directory}' does not reload in transformers: {wrong}")
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    rows: list[torch.Tensor] = []
    for probe in probes(like.pixels.side):
        ids, _ = probe_ids(like, probe)
        _check_tokens(tokenizer, ids, like)
        pixels_BFCHW = to_pixels([probe.picture], like.pixels)[None]
        outputs = model(input_ids=torch.tensor([ids]), pixel_values_videos=pixels_BFCHW)
        rows.append(_of_tokens(outputs.logits[0], ids, like.chat.visual_id))
    return rows


def _check_tokens(tokenizer: Any, ids: Sequence[int], like: VisionLanguageModel) -> None:
    text = like.chat.tokenizer.decode(ids)
    again = tokenizer(text, add_special_tokens=False)["input_ids"]
    ours = like.chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    if again != ours or tokenizer.chat_template != like.chat.tokenizer.chat_template:
        raise ExportError("the exported tokenizer or chat template differs from the student's: export again")


def _of_tokens(logits_TV: torch.Tensor, ids: Sequence[int], visual_id: int) -> torch.Tensor:
    """Log-prob of each text token after the picture, given everything before it."""
    start = max(position for position, token in enumerate(ids) if token == visual_id) + 1
    logprobs_TV = logits_TV.float().log_softmax(dim=-1)
    return logprobs_TV[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None])[:, 0]


def largest_difference(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Largest absolute difference of two lists of log-prob rows."""
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def verify_transformers(model: VisionLanguageModel, directory: Path, tolerance: float = TOLERANCE) -> float:
    """Compare a float32 model with its export in plain transformers; the largest log-prob difference.

    Raises `ExportError` where it is above `tolerance`.
    """
    gap = largest_difference(probe_logprobs(model), stock_logprobs(directory, model))
    if not gap <= tolerance:
        raise ExportError(
            f"'{directory}' does not reload to the same numbers in transformers: log-probs differ by {gap:.2e}, "
            f"allowed are {tolerance:.0e}"
        )
    return gap
