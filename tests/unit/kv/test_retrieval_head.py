"""The retrieval head: its vectors, its files, and the one model that it belongs to."""

import json
from pathlib import Path

import pytest
import torch

from sparsight.errors import ArtifactError, CheckpointError, StorageError
from sparsight.kv.retrieval_head import HeadEmbedder, RetrievalHead, host_fingerprint, projected_frames, question_words
from sparsight.storage import open_storage
from tests.unit.kv.tiny_host import TEXT_WIDTH, noise_pictures, tiny_host

QUESTION = "was there ever a red circle?"


def test_vectors_have_one_length_and_do_not_depend_on_the_batch() -> None:
    host = tiny_host()
    embedder = HeadEmbedder(host, RetrievalHead(TEXT_WIDTH, host=host_fingerprint(host)))
    whole_FD = embedder.embed_frames(noise_pictures(5))
    torch.testing.assert_close(torch.cat([embedder.embed_frames([one]) for one in noise_pictures(5)]), whole_FD)
    torch.testing.assert_close(embedder.embed_projected(projected_frames(host, noise_pictures(5))), whole_FD)
    question_D = embedder.embed_question(QUESTION)
    assert question_D.shape == whole_FD.shape[1:] == (64,)
    torch.testing.assert_close(torch.cat([whole_FD, question_D[None]]).norm(dim=1), torch.ones(6))


def test_words_of_a_question_are_its_own_alone() -> None:
    host = tiny_host()
    ids = host.chat.tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    table_VD = host.model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(question_words(host, f"  {QUESTION}\n"), table_VD[ids].mean(dim=0))


def test_a_head_comes_back_from_where_it_was_kept(storage_uri: str) -> None:
    host = tiny_host()
    head = RetrievalHead(TEXT_WIDTH, host=host_fingerprint(host))
    storage = open_storage(storage_uri)
    head.save(storage)
    loaded = RetrievalHead.load(storage)
    assert loaded.sizes == head.sizes
    before, after = HeadEmbedder(host, head), HeadEmbedder(host, loaded)
    assert torch.equal(after.embed_question(QUESTION), before.embed_question(QUESTION))
    assert torch.equal(after.embed_frames(noise_pictures(2)), before.embed_frames(noise_pictures(2)))


def test_what_is_no_head_is_refused(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    with pytest.raises(StorageError, match=r"head\.json"):
        RetrievalHead.load(storage)
    RetrievalHead(TEXT_WIDTH).save(storage)
    about = json.loads(storage.read_bytes("head.json"))
    for damaged in (b"{", json.dumps({**about, "width": 48}).encode(), json.dumps({**about, "depth": 2}).encode()):
        storage.write_bytes("head.json", damaged)
        with pytest.raises(ArtifactError, match="holds no retrieval head"):
            RetrievalHead.load(storage)
    RetrievalHead(TEXT_WIDTH).save(storage)
    storage.write_bytes("head.safetensors", b"nothing")
    with pytest.raises(ArtifactError, match="holds no retrieval head"):
        RetrievalHead.load(storage)


def test_another_model_s_head_is_refused() -> None:
    host = tiny_host()
    head = RetrievalHead(TEXT_WIDTH, host=host_fingerprint(host))
    host.model.to(torch.bfloat16)
    HeadEmbedder(host, head)
    with pytest.raises(CheckpointError, match="another model's frames"):
        HeadEmbedder(tiny_host(seed=1), head)
    with torch.no_grad():
        host.model.model.multi_modal_projector.linear_1.bias += 1.0
    with pytest.raises(CheckpointError, match="train one on this model"):
        HeadEmbedder(host, head)
