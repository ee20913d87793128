"""CLIP and SigLIP checkpoints as embedders of frames and questions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from sparsight.errors import CheckpointError, StreamError
from sparsight.kv.embedding import CLIP_KINDS, ClipEmbedder
from tests.unit.kv.tiny_clip import MOST_TOKENS, make_checkpoint
from tests.unit.kv.tiny_host import noise_pictures

QUESTION = "was there ever a red circle?"


@pytest.fixture(params=CLIP_KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_checkpoint(request.param, tmp_path / "model")


def test_vectors_are_those_of_the_stock_forward(checkpoint: Path) -> None:
    embedder = ClipEmbedder.load(checkpoint)
    model: Any = AutoModel.from_pretrained(checkpoint).eval()
    processor: Any = AutoProcessor.from_pretrained(checkpoint)
    images = processor.image_processor(noise_pictures(3), return_tensors="pt")
    texts = processor.tokenizer([QUESTION], padding="max_length", max_length=MOST_TOKENS, return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**images, **texts)
    torch.testing.assert_close(embedder.embed_frames(noise_pictures(3)), outputs.image_embeds)
    torch.testing.assert_close(embedder.embed_question(QUESTION), outputs.text_embeds[0])


def test_vectors_have_one_length_and_do_not_depend_on_the_batch(checkpoint: Path) -> None:
    whole_FD = ClipEmbedder.load(checkpoint).embed_frames(noise_pictures(5))
    parts_FD = ClipEmbedder.load(checkpoint, batch_frames=2).embed_frames(noise_pictures(5))
    torch.testing.assert_close(parts_FD, whole_FD)
    question_D = ClipEmbedder.load(checkpoint).embed_question(QUESTION)
    assert question_D.shape == whole_FD.shape[1:]
    torch.testing.assert_close(torch.cat([whole_FD, question_D[None]]).norm(dim=1), torch.ones(6))
    assert float((whole_FD[0] - whole_FD[1]).norm()) > 1e-3
    assert float((question_D - ClipEmbedder.load(checkpoint).embed_question("a blue triangle?")).norm()) > 1e-3


def test_clip_does_not_see_padding(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("clip", tmp_path)
    model: Any = AutoModel.from_pretrained(checkpoint).eval()
    tokens = AutoProcessor.from_pretrained(checkpoint).tokenizer([QUESTION], return_tensors="pt")
    assert tokens["input_ids"].shape[1] < MOST_TOKENS
    with torch.inference_mode():
        alone_D = torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output[0], dim=0)
    torch.testing.assert_close(ClipEmbedder.load(checkpoint).embed_question(QUESTION), alone_D)


def test_other_types_of_numbers_give_nearly_the_same(checkpoint: Path) -> None:
    embedder, rounded = ClipEmbedder.load(checkpoint), ClipEmbedder.load(checkpoint, dtype=torch.bfloat16)
    assert rounded.embed_question(QUESTION).dtype == torch.float32
    torch.testing.assert_close(
        rounded.embed_frames(noise_pictures(2)), embedder.embed_frames(noise_pictures(2)), rtol=0.0, atol=0.05
    )


def test_a_question_is_never_cut(checkpoint: Path) -> None:
    embedder = ClipEmbedder.load(checkpoint)
    longest = " ".join(["red"] * (MOST_TOKENS - 2))  # and a token at either end
    assert embedder.embed_question(longest).norm() == pytest.approx(1.0)
    with pytest.raises(StreamError, match=f"takes {MOST_TOKENS + 1} tokens.*reads {MOST_TOKENS}"):
        embedder.embed_question(f"{longest} red")


def test_other_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        ClipEmbedder.load(tmp_path / "nothing")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(CheckpointError, match=r"holds a 'qwen3' model: give one of clip, siglip, siglip2"):
        ClipEmbedder.load(other)
    (other / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read what model"):
        ClipEmbedder.load(other)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "processor_config.json"])
def test_missing_files_are_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=str(checkpoint)):
        ClipEmbedder.load(checkpoint)


def test_missing_weights_are_named(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights = {key: value for key, value in weights.items() if not key.endswith("final_layer_norm.weight")}
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks weights"):
        ClipEmbedder.load(checkpoint)
