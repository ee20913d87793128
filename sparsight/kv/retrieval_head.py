"""The default of external retrieval: a small trained head over what the host model computes anyway.

A frame is the tokens that the projector gives to the text model, a question the text model's embeddings of its words:
nothing but the head is computed for retrieval. A head belongs to the model that it was trained on; `head_training`
makes it. It chooses no blocks: that is `retrieve.ByEmbedding`. Called by whoever retrieves externally.
"""

import json
from collections.abc import Sequence

import torch
import xxhash
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from sparsight.errors import ArtifactError, CheckpointError
from sparsight.media.pixels import to_pixels
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.storage import Storage

HEAD, WEIGHTS = "head.json", "head.safetensors"


class RetrievalHead(nn.Module):
    """Two networks of one hidden layer, from the host's `width` into one space of `space` dimensions.

    A frame's tokens pass the first layer one by one and the largest value of each unit goes on: a unit that finds a red
    circle in one place need not know what is elsewhere. A question's words are averaged first, because its meaning is
    in what stands together.
    """

    def __init__(self, width: int, hidden: int = 64, space: int = 64, host: str = "") -> None:
        super().__init__()
        self.sizes = {"width": width, "hidden": hidden, "space": space}
        self.host = host
        """Name of the model that it was trained on (`host_fingerprint`)."""
        self.frame_in = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU())
        self.frame_out = nn.Linear(hidden, space)
        self.question = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, space)
        )

    def embed_frames(self, embeds_FSD: Tensor) -> Tensor:
        """Unit vectors [F, D of the space], from frames' projected tokens."""
        return functional.normalize(self.frame_out(self.frame_in(embeds_FSD).amax(dim=1)), dim=-1)

    def embed_questions(self, words_QD: Tensor) -> Tensor:
        """Unit vectors [Q, D of the space], from the mean embedding of each question's words."""
        return functional.normalize(self.question(words_QD), dim=-1)

    def save(self, storage: Storage) -> None:
        """Write the head under a prefix, its description last."""
        storage.write_bytes(WEIGHTS, save({name: value.contiguous() for name, value in self.state_dict().items()}))
        storage.write_bytes(HEAD, json.dumps({**self.sizes, "host": self.host}, indent=2).encode())

    @classmethod
    def load(cls, storage: Storage) -> "RetrievalHead":
        """Read what `save` wrote. Raises `StorageError` where there is nothing, `ArtifactError` where it is damaged."""
        about, weights = storage.read_bytes(HEAD), storage.read_bytes(WEIGHTS)
        try:
            head = cls(**json.loads(about))
            head.load_state_dict(load(weights))
        except (TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ArtifactError(f"'{storage.uri}' holds no retrieval head: {error}; train it again") from error
        return head.eval()


class HeadEmbedder:
    """A `FrameEmbedder` out of a host model and the head that was trained on it.

    Raises `CheckpointError` for another model's head.
    """

    def __init__(self, model: VisionLanguageModel, head: RetrievalHead) -> None:
        if head.host != host_fingerprint(model):
            raise CheckpointError("the retrieval head was trained on another model's frames: train one on this model")
        self._model = model
        self._head = head.eval()

    def embed_frames(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors [F, D] of any frames, all in one batch."""
        return self.embed_projected(projected_frames(self._model, pictures))

    @torch.inference_mode()
    def embed_projected(self, embeds_FSD: Tensor) -> Tensor:
        """The same, of frames that the host has projected (`VisionLanguageModel.frame_embeds`), as its encoder has."""
        return self._head.embed_frames(embeds_FSD.float().cpu())

    @torch.inference_mode()
    def embed_question(self, question: str) -> Tensor:
        """A unit vector [D]; a question may be of any length."""
        return self._head.embed_questions(question_words(self._model, question)[None])[0]


@torch.inference_mode()
def projected_frames(model: VisionLanguageModel, pictures: Sequence[Image.Image]) -> Tensor:
    """What the text model is shown of some frames [F, S, D], in float32, on the CPU."""
    return model.frame_embeds(model.features(to_pixels(pictures, model.pixels))).float().cpu()


@torch.inference_mode()
def question_words(model: VisionLanguageModel, question: str) -> Tensor:
    """The mean [D] of the text model's embeddings of a question's own words, in float32, on the CPU."""
    prompt = model.chat.frames_prompt(question)
    ids_T = torch.tensor(prompt.after_ids[prompt.question], device=model.device)
    return model.embed(ids_T[None], None)[0].float().mean(dim=0).cpu()


def host_fingerprint(model: VisionLanguageModel) -> str:
    """A name for what a head reads of a model: equal where tower, projector and word embeddings are equal.

    Weights count as bfloat16, so that a model keeps its name when it is loaded in a smaller type.
    """
    inner = model.model.model
    digest = xxhash.xxh3_128(repr((model.pixels, model.model.config.vision_feature_layer)).encode())
    for part in (inner.vision_tower, inner.multi_modal_projector, model.model.get_input_embeddings()):
        for name, value in sorted(part.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.cpu().to(torch.bfloat16).contiguous().view(torch.int16).numpy().data)
    return digest.hexdigest()
