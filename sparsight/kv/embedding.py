"""Who makes the vectors of external retrieval: models that put frames and questions into one space.

`FrameEmbedder` is the role. `ClipEmbedder` is any CLIP, SigLIP or SigLIP2 checkpoint, as ReKV uses one (arXiv
2503.00540, section 3.2); `retrieval_head.HeadEmbedder` is the default, which needs no checkpoint beside the host's. It
keeps no vectors and chooses no blocks: that is `retrieve.ByEmbedding`. Called by whoever retrieves externally.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoProcessor

from sparsight.errors import CheckpointError, StreamError

CLIP_KINDS = ("clip", "siglip", "siglip2")
"""transformers' `model_type` of what `ClipEmbedder` reads."""


class FrameEmbedder(Protocol):
    """Puts frames and questions into one space, in which the frames that a question needs lie near it."""

    def embed_frames(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors [F, D] of one RGB frame or more; each depends on its own frame alone. In float32, on the CPU."""
        ...

    def embed_question(self, question: str) -> Tensor:
        """A unit vector [D], in float32, on the CPU. Raises `StreamError` for a question that is too long."""
        ...


class ClipEmbedder:
    """A CLIP, SigLIP or SigLIP2 checkpoint, with its own preparation of pictures and text."""

    def __init__(self, model: Any, processor: Any, batch_frames: int = 32) -> None:
        self._model = model
        self._processor = processor
        self._batch_frames = batch_frames
        self._max_tokens = int(model.config.text_config.max_position_embeddings)

    @classmethod
    def load(
        cls, directory: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu", batch_frames: int = 32
    ) -> "ClipEmbedder":
        """Read a checkpoint directory; `batch_frames` frames go through the tower at a time.

        Raises `CheckpointError` if it is incomplete, of another kind, or needs a package that is not installed, as the
        tokenizer of the first SigLIP needs sentencepiece.
        """
        directory = Path(directory)
        _check_kind(directory)
        try:
            processor: Any = AutoProcessor.from_pretrained(directory)
            loaded: Any = AutoModel.from_pretrained(directory, dtype=dtype, output_loading_info=True)
        except ImportError as error:
            raise CheckpointError(
                f"cannot read the processor of '{directory}': "
                f"{str(error).strip().splitlines()[0].partition('. ')[0]}: install it"
            ) from error
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"cannot load a CLIP or SigLIP model from '{directory}': {error}") from error
        model, info = loaded
        if info["missing_keys"]:
            raise CheckpointError(f"'{directory}' lacks weights: {sorted(info['missing_keys'])[:5]}")
        return cls(model.to(device).eval(), processor, batch_frames)

    @torch.inference_mode()
    def embed_frames(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors [F, D] of one RGB frame or more, of any size."""
        found: list[Tensor] = []
        for start in range(0, len(pictures), self._batch_frames):
            batch = list(pictures[start : start + self._batch_frames])
            pixels = self._processor.image_processor(images=batch, return_tensors="pt")
            output = self._model.get_image_features(**pixels.to(self._model.device, self._model.dtype))
            found.append(_unit(output.pooler_output))
        return torch.cat(found)

    @torch.inference_mode()
    def embed_question(self, question: str) -> Tensor:
        """A unit vector [D]. Raises `StreamError` for a text longer than the model reads; nothing is cut.

        Text is padded to the model's whole length: SigLIP has learned from such text only, and CLIP, being causal, does
        not see what comes after the end.
        """
        tokens = self._processor.tokenizer(
            [question], padding="max_length", max_length=self._max_tokens, return_tensors="pt"
        )
        length = int(tokens["input_ids"].shape[1])
        if length > self._max_tokens:
            raise StreamError(
                f"the question takes {length} tokens, the model that finds its frames reads {self._max_tokens}: "
                "ask a shorter one."
            )
        output = self._model.get_text_features(**tokens.to(self._model.device))
        return _unit(output.pooler_output)[0]


def _check_kind(directory: Path) -> None:
    if not (directory / "config.json").exists():
        raise CheckpointError(f"'{directory}' holds no model (config.json is missing)")
    try:
        kind = str(AutoConfig.from_pretrained(directory).model_type)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read what model '{directory}' holds: {error}") from error
    if kind not in CLIP_KINDS:
        raise CheckpointError(f"'{directory}' holds a '{kind}' model: give one of {', '.join(CLIP_KINDS)}")


def _unit(vectors_ND: Tensor) -> Tensor:
    return functional.normalize(vectors_ND.float(), dim=-1).cpu()
