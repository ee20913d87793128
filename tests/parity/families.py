"""Tiny dense models of every text family that has a stock sparse twin, and layers that the twin can make sparse."""

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from sparsight.media.chat import ChatEncoder
from sparsight.media.pixels import PixelSettings
from sparsight.model.tiny import IMAGE_TOKEN
from sparsight.model.vision_language import VIDEO_TOKEN, VisionLanguageModel

FAMILIES: dict[str, Any] = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig}
LAYERS = {"qwen3": "every_second", "qwen2": [1, 3], "llama": "all"}


def dense_model(family: str, tokenizer: Any) -> VisionLanguageModel:
    sizes: dict[str, Any] = {"head_dim": 32} if family != "qwen2" else {}
    text = FAMILIES[family](
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=1, image_size=32, patch_size=8,
        vision_use_head=False,
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
        image_grid_pinpoints=[[32, 32]],
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name and parameter.ndim == 1:  # biases and norms that are not the neutral start
                parameter += 0.1 * torch.randn_like(parameter)
    return VisionLanguageModel(model, ChatEncoder(tokenizer, VIDEO_TOKEN), PixelSettings(32))
