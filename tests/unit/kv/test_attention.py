"""The twin with an attention of its own, and the rotary table."""

import threading

import pytest
import torch
from transformers import AutoModel, GPT2Config, MistralConfig, Qwen2Config

from sparsight.errors import StreamError
from sparsight.kv.attention import KvTextModel, attend
from sparsight.kv.block import KvBlock
from tests.unit.kv.tiny_stream import ARCHITECTURES, encode, frames_of, tiny_stream

TINY = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}


def test_the_given_model_keeps_its_own_attention() -> None:
    stream = tiny_stream()
    name = stream.text_model.config._attn_implementation
    ids_BT = torch.arange(12).reshape(2, 6)
    padded_BT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        before = stream.text_model(ids_BT, attention_mask=padded_BT).last_hidden_state
        encode(stream, frames_of(stream, 4), window_tokens=12)
        after = stream.text_model(ids_BT, attention_mask=padded_BT).last_hidden_state
    assert torch.equal(before, after)
    assert stream.text_model.config._attn_implementation == name != stream.kv_model._twin.config._attn_implementation


def test_weights_are_shared_not_copied() -> None:
    stream = tiny_stream("qwen3_moe")
    twin = dict(stream.kv_model._twin.named_parameters())
    for name, parameter in stream.text_model.named_parameters():
        assert twin[name] is parameter
    frames_FSD = frames_of(stream, 2)
    _, before = encode(stream, frames_FSD)
    with torch.no_grad():
        stream.text_model.get_input_embeddings().weight.mul_(2.0)
    sink, _ = encode(stream, frames_FSD)
    assert sink.digest != before[0].digest


def test_two_models_in_turns_and_in_threads_do_not_meet() -> None:
    streams = [tiny_stream("qwen2", seed=1), tiny_stream("mixtral", seed=2)]
    frames = [frames_of(stream, 6) for stream in streams]
    found: list[list[list[KvBlock]]] = [[], []]

    def work(which: int) -> None:
        for _ in range(5):
            found[which].append(encode(streams[which], frames[which], window_tokens=14)[1])

    expected = [encode(*pair, window_tokens=14)[1] for pair in zip(streams, frames, strict=True)]
    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in (0, 1):
        assert len(found[which]) == 5
        for blocks in found[which]:
            for block, other in zip(blocks, expected[which], strict=True):
                torch.testing.assert_close(block.page_L2GSC, other.page_L2GSC, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_rotating_after_storing_is_rotating_before(architecture: str) -> None:
    """The table gives what the model's own rotary embedding gives, also beyond its first length."""
    stream = tiny_stream(architecture)
    x_HTC = torch.randn(2, 700, 32)
    twin = stream.text_model.get_submodule("rotary_emb")
    cos_BTC, sin_BTC = twin(x_HTC, torch.arange(40, 740)[None])
    half = torch.cat((-x_HTC[..., 16:], x_HTC[..., :16]), dim=-1)
    rotated_HTC = stream.kv_model.rotary.rotate(x_HTC, 40)
    torch.testing.assert_close(rotated_HTC, x_HTC * cos_BTC + half * sin_BTC)
    stored_late = torch.cat(
        [stream.kv_model.rotary.rotate(x_HTC[:, t : t + 100], 40 + t) for t in range(0, 700, 100)], 1
    )
    assert torch.equal(stored_late, rotated_HTC)
    one_place = stream.kv_model.rotary.rotate_all_to(x_HTC, 40)
    torch.testing.assert_close(one_place[:, 0], rotated_HTC[:, 0])
    torch.testing.assert_close(one_place[:, 1], stream.kv_model.rotary.rotate(x_HTC[:, 1:2], 40)[:, 0])


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_grouped_attention_equals_repeated_heads(groups: int) -> None:
    queries_HTC, keys_GKC, values_GKC = torch.randn(6, 5, 8), torch.randn(groups, 9, 8), torch.randn(groups, 9, 8)
    allowed_TK = torch.rand(5, 9) < 0.6
    allowed_TK[:, 0] = True
    logits_HTK = queries_HTC @ keys_GKC.repeat_interleave(6 // groups, 0).mT * 0.3
    for mask in (allowed_TK, None):
        masked_HTK = logits_HTK if mask is None else logits_HTK.masked_fill(~mask, -torch.inf)
        expected_HTC = masked_HTK.softmax(-1) @ values_GKC.repeat_interleave(6 // groups, 0)
        torch.testing.assert_close(attend(queries_HTC, keys_GKC, values_GKC, mask, 0.3), expected_HTC)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=9), "not 'gpt2'"),
        (MistralConfig(**TINY, num_key_value_heads=2), "not 'mistral'"),
        (Qwen2Config(**TINY, use_sliding_window=True, sliding_window=8, max_window_layers=1), "sliding-window layers"),
        (Qwen2Config(**TINY, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "'dynamic'"),
    ],
)
def test_models_that_cannot_stream_are_refused(config: object, message: str) -> None:
    with pytest.raises(StreamError, match=message):
        KvTextModel(AutoModel.from_config(config))
