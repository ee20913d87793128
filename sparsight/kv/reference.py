"""The slow oracle: what the unmodified model says when nothing is forgotten.

Plain full attention over [sink, every frame, prompt], computed from scratch for each token, with no cache, no window,
no retrieval and no code shared with the rest of this package. Called by tests and benchmarks only.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def full_attention_logits(
    text_model: PreTrainedModel, head: nn.Module, sink_ids_T: Tensor, frames_FSD: Tensor, prompt_ids_T: Tensor
) -> Tensor:
    """Next-token logits [T, V] at every token of the prompt."""
    embed = text_model.get_input_embeddings()
    with torch.no_grad():
        embeds_TD = torch.cat((embed(sink_ids_T), frames_FSD.flatten(0, 1), embed(prompt_ids_T)))
        output = text_model(inputs_embeds=embeds_TD[None], use_cache=False)
        return head(output.last_hidden_state[0, -prompt_ids_T.shape[0] :])


def full_attention_answer(
    text_model: PreTrainedModel,
    head: nn.Module,
    sink_ids_T: Tensor,
    frames_FSD: Tensor,
    prompt_ids_T: Tensor,
    new_tokens: int,
) -> tuple[int, ...]:
    """The greedy continuation of the prompt, each token from a full forward pass."""
    ids_T = prompt_ids_T
    for _ in range(new_tokens):
        logits_TV = full_attention_logits(text_model, head, sink_ids_T, frames_FSD, ids_T)
        ids_T = torch.cat((ids_T, logits_TV[-1:].argmax(dim=1)))
    return tuple(ids_T[prompt_ids_T.shape[0] :].tolist())
