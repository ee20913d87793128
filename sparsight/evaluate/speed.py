"""Tokens per second of decoding, models in turns in one process, so that their ratios mean something."""

import statistics
import time
from collections.abc import Mapping, Sequence

import torch

from sparsight.model.decode import BatchDecoder
from sparsight.model.vision_language import VisionLanguageModel

PROMPT_TEXT = "what is in the image?"


def decode_speeds(
    models: Mapping[str, VisionLanguageModel], batches: Sequence[int] = (1, 32), steps: int = 32, rounds: int = 5
) -> dict[str, dict[int, float]]:
    """Median tokens per second by model and batch size.

    Each round decodes `steps` greedy tokens a row after a prompt with one picture; reading the prompt is not timed. A
    first round of every model is left out.
    """
    seconds: dict[str, dict[int, list[float]]] = {name: {batch: [] for batch in batches} for name in models}
    for batch in batches:
        for turn in range(rounds + 1):
            for name, model in models.items():
                took_s = _decode_s(model, batch, steps)
                if turn:
                    seconds[name][batch].append(took_s)
    return {
        name: {batch: batch * steps / statistics.median(times) for batch, times in by_batch.items()}
        for name, by_batch in seconds.items()
    }


@torch.inference_mode()
def _decode_s(model: VisionLanguageModel, batch: int, steps: int) -> float:
    content = [{"type": "video"}, {"type": "text", "text": PROMPT_TEXT}]
    prompt = model.chat.prompt([{"role": "user", "content": content}], [model.visual_tokens()])
    side = model.pixels.side
    features_NPD = model.features(torch.zeros(1, 3, side, side))
    visual_TD = model.clip_embeds(features_NPD[None])[0]
    decoder = BatchDecoder(model, batch)
    decoder.feed([prompt] * batch, visual_TD.repeat(batch, 1))
    _wait(model)
    start_s = time.perf_counter()
    for _ in range(steps):
        chosen: list[int] = decoder.logits_BV.argmax(dim=-1).tolist()
        decoder.feed([[token if token != model.chat.visual_id else model.chat.end_id] for token in chosen])
    _wait(model)
    return time.perf_counter() - start_s


def _wait(model: VisionLanguageModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
