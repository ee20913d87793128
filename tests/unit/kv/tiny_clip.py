"""Tiny random CLIP, SigLIP and SigLIP2 checkpoints as directories, with processors and a tokenizer of words."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, CLIPConfig, PreTrainedTokenizerFast, Siglip2Config, SiglipConfig
from transformers.models.clip import CLIPImageProcessorPil, CLIPProcessor
from transformers.models.siglip import SiglipImageProcessorPil, SiglipProcessor
from transformers.models.siglip2 import Siglip2ImageProcessorPil, Siglip2Processor

WORDS = ("was", "there", "ever", "a", "red", "blue", "circle", "triangle", "?")
MOST_TOKENS = 12
SIDE, PATCH = 16, 8


def make_checkpoint(kind: str, directory: Path, seed: int = 0) -> Path:
    """Write a checkpoint of `kind` (clip, siglip, siglip2); equal seeds give equal weights."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    AutoModel.from_config(_config(kind, tokenizer)).save_pretrained(directory)
    _processor(kind, tokenizer).save_pretrained(directory)
    return directory


def word_tokenizer() -> PreTrainedTokenizerFast:
    names = ["<pad>", "<start>", "<end>", "<unknown>", *WORDS]
    ids = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<start>", ids["<start>"]), ("<end>", ids["<end>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unknown>",
        model_max_length=MOST_TOKENS,
    )


def _config(kind: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    text = {**sizes, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": MOST_TOKENS}
    vision = {**sizes, "image_size": SIDE, "patch_size": PATCH}
    if kind == "clip":
        return CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    if kind == "siglip":
        return SiglipConfig(text_config=text, vision_config=vision)
    return Siglip2Config(text_config=text, vision_config={**sizes, "patch_size": PATCH, "num_patches": 4})


def _processor(kind: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    if kind == "clip":
        crop = {"height": SIDE, "width": SIDE}
        return CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=crop), tokenizer)
    if kind == "siglip":
        return SiglipProcessor(SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}), tokenizer)
    return Siglip2Processor(Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=4), tokenizer)
