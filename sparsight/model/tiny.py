"""Small models from nothing: a byte-level tokenizer trained on a corpus, and a random stock LLaVA-OneVision.

For runs on a laptop, where no pretrained checkpoint is at hand. Architectures stay stock; only sizes are chosen.
`assemble` is the one place that puts tower, projector and a text model together; `text_base.py` does it with real
language weights.
"""

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3Config,
    SiglipVisionConfig,
)

from sparsight.config import ArchitectureConfig
from sparsight.media.chat import ChatEncoder
from sparsight.media.pixels import PixelSettings
from sparsight.model.vision_language import VIDEO_TOKEN, VisionLanguageModel

PAD, SYSTEM, USER, ASSISTANT, END, IMAGE_TOKEN = (
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<image>",
)

CONTENT = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'video' -%}<video>{%- elif part.type == 'image' -%}<image>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
"""A template's macro for what a message says: text, pictures and videos by their tokens."""

CHAT_TEMPLATE = (
    CONTENT
    + """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}<|system|>{{ text(message.content) }}<|end|>
{%- elif message.role == 'user' -%}<|user|>{{ text(message.content) }}
{%- else -%}<|assistant|>{{ text(message.content) }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""
)


def make_tokenizer(corpus: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer (any text is representable) with the chat tokens and template above."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    special = [PAD, SYSTEM, USER, ASSISTANT, END, IMAGE_TOKEN, VIDEO_TOKEN]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT, IMAGE_TOKEN, VIDEO_TOKEN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_dense(architecture: ArchitectureConfig, tokenizer: Any, seed: int) -> VisionLanguageModel:
    """A randomly initialised dense model of the given sizes for a tokenizer; equal seeds give equal weights."""
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=architecture.text_width,
        intermediate_size=architecture.text_intermediate,
        num_hidden_layers=architecture.text_layers,
        num_attention_heads=architecture.text_heads,
        num_key_value_heads=architecture.text_key_value_heads,
        head_dim=architecture.head_width,
        max_position_embeddings=architecture.max_positions,
        initializer_range=architecture.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["Qwen3ForCausalLM"],
    )
    return assemble(architecture, text, tokenizer, seed)


def assemble(architecture: ArchitectureConfig, text: Any, tokenizer: Any, seed: int) -> VisionLanguageModel:
    """A randomly initialised model: the architecture's tower, a projector, and the text model of a stock config.

    The tokenizer must know the tokens for pictures and videos, and the text model must have rows for all its tokens.
    """
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(_config(architecture, text, tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    mean, std = architecture.pixel_mean, architecture.pixel_std
    pixels = PixelSettings(architecture.picture_pixels, (mean, mean, mean), (std, std, std))
    return VisionLanguageModel(model.eval(), ChatEncoder(tokenizer, VIDEO_TOKEN), pixels)


def _config(architecture: ArchitectureConfig, text: Any, tokenizer: Any) -> LlavaOnevisionConfig:
    without_pooling_head: dict[str, Any] = {"vision_use_head": False}
    vision = SiglipVisionConfig(
        hidden_size=architecture.tower_width,
        intermediate_size=architecture.tower_width * 2,
        num_hidden_layers=architecture.tower_layers,
        num_attention_heads=architecture.tower_heads,
        image_size=architecture.picture_pixels,
        patch_size=architecture.patch_pixels,
        **without_pooling_head,
    )
    side = architecture.picture_pixels
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
        image_grid_pinpoints=[[side, side]],
        vision_feature_layer=-1,
        tie_word_embeddings=text.tie_word_embeddings,
    )
