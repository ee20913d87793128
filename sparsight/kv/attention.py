"""Stock text models whose attention is decided from outside.

A transformers text model that is called with `position_ids` of zeros rotates nothing, so its attention function sees
queries and keys before rotation. `KvTextModel` registers such a function with transformers' `AttentionInterface`; the
function hands each layer's tensors to a `KvContext`, which chooses what they attend to and at which positions. No class
of transformers is patched, and the model that was given keeps its own attention: `KvTextModel` works on a twin of its
modules that shares every weight and has a config of its own.
Several passes may go through the model side by side, each with its own context. It knows nothing of frames, blocks or
questions. Used by `encoder` and `answerer`, each with contexts of its own.
"""

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from sparsight.errors import StreamError

ATTENTION_NAME = "sparsight_kv"
ARCHITECTURES = frozenset({"llama", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"})
STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})


class KvContext(Protocol):
    """What one pass through the text model attends to."""

    def attend(self, layer: int, queries_HTC: Tensor, keys_GTC: Tensor, values_GTC: Tensor, scale: float) -> Tensor:
        """Attention output [H, T, C] of the pass's T tokens; called once a layer, in order. Nothing is rotated yet."""
        ...


class KvTextModel:
    """A stock text model, ready for streams; made once in a process and shared by all of its streams.

    `text_model` is the model without its head (`LlavaOnevisionForConditionalGeneration.model.language_model`), already
    on its device. Its weights are shared, not copied; it can be used as before, also at the same time.
    Raises `StreamError` for an architecture that does not keep full attention with rotary positions in every layer.
    """

    def __init__(self, text_model: PreTrainedModel) -> None:
        _check_architecture(text_model)
        AttentionInterface.register(ATTENTION_NAME, kv_attention)
        self._twin = twin_of(text_model)
        self._twin.set_attn_implementation(ATTENTION_NAME)
        config = text_model.config
        self.layers: int = config.num_hidden_layers
        self.kv_heads: int = config.num_key_value_heads
        self.head_width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.width: int = config.hidden_size
        self.max_tokens: int = config.max_position_embeddings
        self.device: torch.device = text_model.device
        self.dtype: torch.dtype = text_model.dtype
        self.rotary = Rotary(self._twin.get_submodule("rotary_emb"), self.device, self.dtype)

    def empty_page(self, tokens: int) -> Tensor:
        """Room for keys and values of `tokens` tokens in all layers: [L, 2, G, tokens, C], on the model's device."""
        shape = (self.layers, 2, self.kv_heads, tokens, self.head_width)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def embed(self, ids_T: Tensor) -> Tensor:
        """Embeddings [T, D] of token ids [T]."""
        with torch.no_grad():
            return self._twin.get_input_embeddings()(ids_T.to(self.device))

    def run(self, embeds_TD: Tensor, context: KvContext) -> Tensor:
        """Last hidden states [T, D] of T tokens that attend to what `context` decides."""
        positions_BT = torch.zeros(1, embeds_TD.shape[0], dtype=torch.long, device=self.device)
        with torch.no_grad():
            output = self._twin(
                inputs_embeds=embeds_TD.to(self.device, self.dtype)[None],
                position_ids=positions_BT,
                use_cache=False,
                kv_context=context,
            )
        return output.last_hidden_state[0]

    def run_all(self, embeds: Sequence[Tensor], contexts: Sequence[KvContext]) -> tuple[Tensor, ...]:
        """`run` for several passes, of any lengths, as one: each attends by its own context, and everything else is
        computed for the tokens of all of them together."""
        if not embeds:
            return ()
        tokens = [embeds_TD.shape[0] for embeds_TD in embeds]
        rows_TD = torch.cat([embeds_TD.to(self.device, self.dtype) for embeds_TD in embeds])
        return self.run(rows_TD, _SideBySide(contexts, tokens)).split(tokens)


class _SideBySide:
    """The `KvContext` of several passes whose tokens stand one behind the other: each part attends by its own."""

    def __init__(self, contexts: Sequence[KvContext], tokens: list[int]) -> None:
        self._contexts = contexts
        self._tokens = tokens

    def attend(self, layer: int, queries_HTC: Tensor, keys_GTC: Tensor, values_GTC: Tensor, scale: float) -> Tensor:
        queries, keys, values = (x_HTC.split(self._tokens, dim=1) for x_HTC in (queries_HTC, keys_GTC, values_GTC))
        parts = zip(self._contexts, queries, keys, values, strict=True)
        outputs = [context.attend(layer, q_HTC, k_GTC, v_GTC, scale) for context, q_HTC, k_GTC, v_GTC in parts]
        return torch.cat(outputs, dim=1)


class Rotary:
    """The model's own rotary embedding, at positions that the caller chooses."""

    def __init__(self, rotary_emb: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self._rotary_emb = rotary_emb
        self._device = device
        self._dtype = dtype
        self._cos_sin_2PC = self._table(256)

    def rotate(self, x_HTC: Tensor, start: int) -> Tensor:
        """Rotate T consecutive tokens to positions start, start + 1, …"""
        return self._apply(x_HTC, start, start + x_HTC.shape[1])

    def rotate_all_to(self, x_HTC: Tensor, position: int) -> Tensor:
        """Rotate every token to one and the same position."""
        return self._apply(x_HTC, position, position + 1)

    def _apply(self, x_HTC: Tensor, start: int, end: int) -> Tensor:
        cos_sin_2PC = self._cos_sin_2PC  # another thread may put a table of another length in its place
        if end > cos_sin_2PC.shape[1]:
            cos_sin_2PC = self._cos_sin_2PC = self._table(2 * end)
        cos_TC, sin_TC = cos_sin_2PC[:, start:end]
        first, second = x_HTC.chunk(2, dim=-1)
        return x_HTC * cos_TC + torch.cat((-second, first), dim=-1) * sin_TC

    def _table(self, positions: int) -> Tensor:
        positions_BP = torch.arange(positions, device=self._device)[None]
        cos_BPC, sin_BPC = self._rotary_emb(torch.empty(0, dtype=torch.float32, device=self._device), positions_BP)
        # At position 0 the model has already multiplied by its attention scaling (YaRN); it must not come in twice.
        scaling: Any = self._rotary_emb.attention_scaling
        return (torch.cat((cos_BPC, sin_BPC)) / scaling).to(self._dtype)


def attend(
    queries_HTC: Tensor, keys_GKC: Tensor, values_GKC: Tensor, allowed_TK: Tensor | None, scale: float
) -> Tensor:
    """Softmax attention [H, T, C] with grouped heads; `allowed_TK` says which query sees which key (None: all).

    The queries of a group are laid along the token axis, so keys and values are never repeated.
    """
    H, T, C = queries_HTC.shape
    G = keys_GKC.shape[0]
    group = H // G
    queries = queries_HTC.reshape(1, G, group * T, C)
    mask = None if allowed_TK is None else allowed_TK.repeat(group, 1)
    output = functional.scaled_dot_product_attention(
        queries, keys_GKC[None], values_GKC[None], attn_mask=mask, scale=scale
    )
    return output.reshape(H, T, -1)


def kv_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    kv_context: KvContext,
    **_: object,
) -> tuple[Tensor, None]:
    """The function behind `ATTENTION_NAME`: shapes [1, heads, T, C] in, [1, T, H, C] out, as transformers asks."""
    assert attention_mask is None, "a pass has no padding"
    assert query.shape[0] == 1, "passes stand behind each other in one row"
    layer: Any = module.layer_idx
    return kv_context.attend(layer, query[0], key[0], value[0], scaling).transpose(0, 1)[None], None


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules over the same weights, with a config of their own; in evaluation mode."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).eval()


def _check_architecture(text_model: PreTrainedModel) -> None:
    config = text_model.config
    if config.model_type not in ARCHITECTURES:
        raise StreamError(
            f"a stream needs a text model of {sorted(ARCHITECTURES)}, not {config.model_type!r}: "
            "pass the text model itself, and choose a student of one of these."
        )
    other_layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if getattr(config, "sliding_window", None) or other_layers:
        raise StreamError("a stream needs full attention in every layer: this text model has sliding-window layers.")
    rope_type: Any = text_model.get_submodule("rotary_emb").rope_type
    if rope_type not in STATIC_ROPE:
        raise StreamError(f"a stream needs rotary frequencies that do not change with length, not {rope_type!r}.")
