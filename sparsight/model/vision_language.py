"""A stock LLaVA-OneVision checkpoint and its tokenizer as one thing: pictures and text in, hidden states out.

A picture is a clip of one frame: tower, projector, 2x2 pooling, and one newline token after the last frame, as
the stock video path computes it. Everything goes through the model's public parts, so that tower features may be
computed once and reused, and the head may be evaluated on chosen positions only. Used by teacher training,
distillation, evaluation, streams and serving.
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

from sparsight.errors import CheckpointError
from sparsight.media.chat import ChatEncoder
from sparsight.media.pixels import PixelSettings
from sparsight.model.experts import use_experts
from sparsight.model.packing import Packing
from sparsight.model.processor import write_processor

VIDEO_TOKEN = "<video>"


class VisionLanguageModel:
    """Wraps `LlavaOnevisionForConditionalGeneration` (dense or sparse text model) without changing it."""

    def __init__(self, model: Any, chat: ChatEncoder, pixels: PixelSettings) -> None:
        self.model = model
        self.chat = chat
        self.pixels = pixels
        vision = model.config.vision_config
        self.frame_tokens = math.ceil(vision.image_size // vision.patch_size / 2) ** 2

    @classmethod
    def load(
        cls,
        directory: str | Path,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
        experts: str | None = None,
        device: str = "cpu",
    ) -> "VisionLanguageModel":
        """Read a checkpoint directory. Raises `CheckpointError` if it is not a complete LLaVA-OneVision model.

        `experts` is transformers' `experts_implementation`; None takes `sorted_experts` (module `experts`), which on
        other devices than a CPU is transformers' own `grouped_mm`.
        """
        directory = Path(directory)
        if not (directory / "config.json").exists():
            raise CheckpointError(f"'{directory}' holds no model (config.json is missing)")
        try:
            with warnings.catch_warnings():
                # Qwen2-MoE's shared expert of width 0
                warnings.filterwarnings("ignore", "Initializing zero-element tensors")
                loaded: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(
                    directory, dtype=dtype, attn_implementation=attention, output_loading_info=True
                )
            use_experts(loaded[0], experts)
            tokenizer = AutoTokenizer.from_pretrained(directory)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"cannot load a LLaVA-OneVision model from '{directory}': {error}") from error
        model, info = loaded
        missing = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
        if missing:
            raise CheckpointError(f"'{directory}' does not fit its own config: missing or unexpected {missing[:5]}")
        return cls(model.to(device).eval(), ChatEncoder(tokenizer, VIDEO_TOKEN), PixelSettings.read(directory))

    def save(self, directory: str | Path) -> None:
        """Write a stock checkpoint directory: weights, configs, tokenizer and processor files."""
        self.model.save_pretrained(directory)
        self.chat.tokenizer.save_pretrained(directory)
        vision = self.model.config.vision_config
        write_processor(Path(directory), self.pixels, (vision.image_size // vision.patch_size) ** 2)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def text_model(self) -> nn.Module:
        """The stock text model under the head: takes `inputs_embeds`, returns last hidden states."""
        return self.model.model.language_model

    @property
    def head_VD(self) -> torch.Tensor:
        return self.model.get_output_embeddings().weight

    def visual_tokens(self, frames: int = 1) -> int:
        """Tokens that a clip of so many frames takes in the text model; text alone, with 0 frames, takes none."""
        return frames * self.frame_tokens + 1 if frames else 0

    def features(self, pixels_NCHW: torch.Tensor, gradient: bool = False) -> torch.Tensor:
        """The tower's patch features [N, P, D of the tower] of N frames; no gradient unless asked for."""
        layer = self.model.config.vision_feature_layer
        with torch.set_grad_enabled(gradient and torch.is_grad_enabled()):
            outputs = self.model.model.vision_tower(
                pixels_NCHW.to(self.device, self.model.dtype), output_hidden_states=True
            )
        return outputs.hidden_states[layer]

    def frame_embeds(self, features_FPD: torch.Tensor) -> torch.Tensor:
        """Projected and pooled frames [F, S, D of the text model], without the newline that ends a clip."""
        inner = self.model.model
        return inner.apply_pooling(inner.multi_modal_projector(features_FPD))

    @property
    def newline_D(self) -> torch.Tensor:
        """The embedding that ends a clip."""
        return self.model.model.image_newline

    def clip_embeds(self, features_BFPD: torch.Tensor) -> torch.Tensor:
        """Visual tokens of B clips of F frames each: [B, F * S + 1, D]."""
        B, F = features_BFPD.shape[:2]
        frames_BTD = self.frame_embeds(features_BFPD.flatten(0, 1)).reshape(B, F * self.frame_tokens, -1)
        return torch.cat([frames_BTD, self.newline_D.expand(B, 1, -1)], dim=1)

    def embed(self, input_ids_BT: torch.Tensor, visual_ND: torch.Tensor | None) -> torch.Tensor:
        """Input embeddings with the visual tokens, in reading order, at the placeholders."""
        embeds_BTD = self.model.get_input_embeddings()(input_ids_BT)
        mask_BT = input_ids_BT == self.chat.visual_id
        wanted, given = int(mask_BT.sum()), 0 if visual_ND is None else visual_ND.shape[0]
        if wanted != given:
            raise ValueError(f"{wanted} visual placeholders but {given} visual tokens")
        if visual_ND is None:
            return embeds_BTD
        return embeds_BTD.masked_scatter(mask_BT[..., None], visual_ND.to(embeds_BTD.dtype))

    def hidden(
        self,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor,
        visual_ND: torch.Tensor | None,
        packing: Packing | None = None,
    ) -> torch.Tensor:
        """Last hidden states [B, T, D] of right-padded sequences: what the head would read.

        With a `packing`, independent questions of a row do not see each other.
        """
        return self.forward_text(input_ids_BT, attention_mask_BT, visual_ND, packing)[0]

    def forward_text(
        self,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor,
        visual_ND: torch.Tensor | None,
        packing: Packing | None = None,
        attention: bool = False,
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """`hidden`, and with `attention` what every layer attends to [B, H, T, T], else nothing.

        The model's attention must then be of kind `eager` (`use_eager_attention`): others do not return it.
        """
        assert not attention or self._attention == "eager", "only eager attention tells its weights"
        embeds_BTD = self.embed(input_ids_BT, visual_ND)
        mask, positions_BT = (attention_mask_BT, None) if packing is None else packing
        if packing is not None and self._attention == "eager":  # which adds its mask
            mask = torch.zeros(mask.shape, dtype=embeds_BTD.dtype).masked_fill_(
                ~mask, torch.finfo(embeds_BTD.dtype).min
            )
        outputs = self.text_model(
            inputs_embeds=embeds_BTD,
            attention_mask=mask.to(self.device),
            position_ids=None if positions_BT is None else positions_BT.to(self.device),
            use_cache=False,
            output_attentions=attention,
        )
        return outputs.last_hidden_state, outputs.attentions if attention else ()

    def use_eager_attention(self) -> None:
        """Attention that can be asked for its weights; slower, and of the same values up to rounding."""
        text: Any = self.text_model
        text.set_attn_implementation("eager")

    @property
    def _attention(self) -> str:
        text: Any = self.text_model
        return text.config._attn_implementation

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-padded ids and their attention mask, both [B, T]."""
        length = max(len(row) for row in rows)
        input_ids_BT = torch.full((len(rows), length), self.chat.pad_id, dtype=torch.long)
        mask_BT = torch.zeros((len(rows), length), dtype=torch.long)
        for index, row in enumerate(rows):
            input_ids_BT[index, : len(row)] = torch.tensor(list(row))
            mask_BT[index, : len(row)] = 1
        return input_ids_BT.to(self.device), mask_BT.to(self.device)
