"""The experts of sparse layers on a CPU: tokens sorted by expert once, one matrix product an expert, added back once.

Stock sparse layers compute their experts by a function that the config names (`experts_implementation`), and
transformers lets functions be registered under new names: no class is patched, and no checkpoint holds the name. On a
CPU this function is as fast as the best stock choice for wide layers and faster for narrow ones
(`benchmarks/moe.py`); on any other device, and for layouts of weights that it does not know, it hands over to
transformers' `grouped_mm`. Used by `vision_language` and `upcycle`.
"""

from typing import Any

import torch
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

SORTED_EXPERTS = "sorted_experts"


def use_experts(model: Any, name: str | None = None) -> None:
    """Let the text layers of a LLaVA-OneVision model compute their experts by one of transformers' implementations.

    None takes `sorted_experts`. A dense model has no experts, and stays as it is. Raises `ValueError` for a name that
    transformers does not know.
    """
    ExpertsInterface.register(SORTED_EXPERTS, sorted_experts)
    model.set_experts_implementation({"text_config": name or SORTED_EXPERTS})


def sorted_experts(
    experts: Any, hidden_TD: torch.Tensor, chosen_TA: torch.Tensor, weights_TA: torch.Tensor
) -> torch.Tensor:
    """What a stock experts module returns [T, D] for tokens, their chosen experts and the weights of these.

    Sums run in a fixed order, so equal inputs give equal bits.
    """
    if hidden_TD.device.type != "cpu" or experts.is_transposed or experts.has_bias or not experts.has_gate:
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_TD, chosen_TA, weights_TA)
    chosen_S = chosen_TA.flatten()
    order_S = chosen_S.argsort(stable=True)
    tokens_S = order_S // chosen_TA.shape[1]
    rows_E = torch.bincount(chosen_S, minlength=experts.num_experts).tolist()
    inputs = hidden_TD.index_select(0, tokens_S).split(rows_E)
    # Unbound, the weights' gradients are stacked once; indexed, every expert would add a whole tensor of zeros.
    weights = zip(inputs, experts.gate_up_proj.unbind(), experts.down_proj.unbind(), strict=True)
    outputs = [
        functional.linear(experts._apply_gate(functional.linear(input_nD, gate_up_HD)), down_DI)
        for input_nD, gate_up_HD, down_DI in weights
        if len(input_nD)
    ]
    outputs_SD = torch.cat(outputs) * weights_TA.flatten().index_select(0, order_S)[:, None]
    return torch.zeros_like(hidden_TD).index_add_(0, tokens_S, outputs_SD.to(hidden_TD.dtype))
