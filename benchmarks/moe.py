"""What a sparse layer's step costs: beside a dense layer of equal activated FLOPs, and beside loops over its experts.

The layers are those of an up-cycled student: a stock sparse block whose experts run through
`sparsight/model/experts.py`, and a stock dense FFN, width 576; a step is forward and backward, with gradients of
weights and input. An expert is 1536 wide, SmolLM2-135M's FFN. `loop` is transformers' `eager`: expert by expert, the
tokens of its mask are gathered. `masked_loop` lets every expert compute all tokens and masks what it was not given,
experts / active times the FLOPs. `stock` is transformers' `grouped_mm`, `small` the sizes of the tiny configuration.

The limit is arithmetic. A step does 18 · tokens · active experts · width · expert width FLOPs; `gemms_…` is the time of
the bare matrix products over that of a layer, and all that any implementation could reach. What is left is moved bytes:
two gathers and two scatters of [tokens · active, width], the activations, and the gradients of more weights. On a CPU
a call costs nothing beside a product of hundreds of rows, so a loop that gathers is within a tenth of the limit, too:
what grouping saves is the launches of a GPU. No implementation can take less than `gemms_vs_loop` of that loop's time.

All steps take turns, in an order that rotates; figures are medians of the rounds' ratios. On one thread time is CPU
time, which leaves out what other programs take; figures with `two_threads` are wall time, and so are those of a GPU,
where every step waits for its end. Run as
`python -m benchmarks.moe --json FILE [--device cuda] [--dtype bfloat16]`.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.result import write_result
from sparsight.config import ArchitectureConfig, UpcycleConfig
from sparsight.model.experts import use_experts
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.upcycle import upcycle

TOKENS, WIDTH, EXPERT_WIDTH, ACTIVE = 4096, 576, 1536, 2
SMALL_WIDTH, SMALL_EXPERT_WIDTH = 128, 256
FEW, MANY = 4, 8
"""Experts beside the dense layer, and beside the loops."""

Step = Callable[[], object]
Clock = Callable[[], float]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--expert-width", type=int, default=EXPERT_WIDTH)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args(argv)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    steps = contenders(arguments.tokens, arguments.expert_width, device, dtype)
    clock = time.process_time if device.type == "cpu" else time_of(device)
    times = time_steps(steps, arguments.rounds, 1, clock)
    found = ratios(times)
    found["sparse_step_ms"] = 1e3 * statistics.median(times["sparse"])
    found["dense_step_ms"] = 1e3 * statistics.median(times["dense"])
    flops = 18 * arguments.tokens * ACTIVE * WIDTH * arguments.expert_width
    found["gemms_gflop_per_s"] = 1e-9 * flops / statistics.median(times["gemms_many"])
    if device.type == "cpu" and len(os.sched_getaffinity(0)) > 1:
        both = ratios(time_steps(steps, arguments.rounds, 2, time.perf_counter))
        found |= {f"{name}_two_threads": ratio for name, ratio in both.items()}
    sizes = {"tokens": arguments.tokens, "width": WIDTH, "expert_width": arguments.expert_width}
    found |= {"element_bytes": dtype.itemsize, "on_gpu": float(device.type != "cpu")}
    write_result(arguments.json, found | sizes)
    return 0


def ratios(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Medians over rounds of one step's time over another's."""
    pairs = {
        "sparse_vs_dense_step": ("sparse", "dense"),
        "grouped_vs_loop": ("grouped", "loop"),
        "grouped_vs_masked_loop": ("grouped", "masked_loop"),
        "grouped_vs_stock": ("grouped", "stock"),
        "grouped_vs_stock_small": ("small", "small_stock"),
        "gemms_vs_dense_step": ("gemms_few", "dense"),
        "gemms_vs_loop": ("gemms_many", "loop"),
        "gemms_vs_grouped": ("gemms_many", "grouped"),
    }
    return {
        name: statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))
        for name, (one, other) in pairs.items()
    }


def contenders(tokens: int, expert_width: int, device: torch.device, dtype: torch.dtype) -> dict[str, Step]:
    """Every step that is timed, on the same input."""
    x_BTD = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    few, many, loop, stock = (
        sparse_layer(experts, expert_width, implementation).to(device, dtype)
        for experts, implementation in ((FEW, None), (MANY, None), (MANY, "eager"), (MANY, "grouped_mm"))
    )
    small, small_stock = (
        sparse_layer(FEW, SMALL_EXPERT_WIDTH, implementation, SMALL_WIDTH).to(device, dtype)
        for implementation in (None, "grouped_mm")
    )
    small_x_BTD = x_BTD[..., :SMALL_WIDTH].contiguous()
    return {
        "sparse": step_of(few, x_BTD),
        "dense": step_of(dense_layer(expert_width * ACTIVE).to(device, dtype), x_BTD),
        "grouped": step_of(many, x_BTD),
        "loop": step_of(loop, x_BTD),
        "masked_loop": step_of(MaskedLoop(many), x_BTD),
        "stock": step_of(stock, x_BTD),
        "small": step_of(small, small_x_BTD),
        "small_stock": step_of(small_stock, small_x_BTD),
        "gemms_few": bare_products(few, x_BTD),
        "gemms_many": bare_products(many, x_BTD),
    }


def dense_layer(ffn_width: int) -> nn.Module:
    return text_layer(model(ffn_width))


def sparse_layer(experts: int, expert_width: int, implementation: str | None, width: int = WIDTH) -> nn.Module:
    """As students have it, or by another of transformers' implementations."""
    settings = UpcycleConfig(experts=experts, active_experts=ACTIVE, layers=[0])
    student = upcycle(model(expert_width, width), settings, seed=0)
    use_experts(student.model, implementation)
    return text_layer(student)


def model(ffn_width: int, width: int = WIDTH) -> Any:
    tokenizer = make_tokenizer(["is there a circle in the picture?"], 300)
    architecture = ArchitectureConfig(tower_layers=1, text_layers=1, text_width=width, text_intermediate=ffn_width)
    return make_dense(architecture, tokenizer, seed=0)


def text_layer(student: Any) -> nn.Module:
    return student.text_model.layers[0].mlp


class MaskedLoop(nn.Module):
    """The naive loop over a sparse block's experts: each computes all tokens."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_TD = x_BTD.flatten(0, 1)
        _, weights_TA, chosen_TA = self.block.gate(x_TD)
        experts = self.block.experts
        out_TD = torch.zeros_like(x_TD)
        for expert in range(experts.num_experts):
            gate_TI, up_TI = functional.linear(x_TD, experts.gate_up_proj[expert]).chunk(2, dim=-1)
            answer_TD = functional.linear(experts.act_fn(gate_TI) * up_TI, experts.down_proj[expert])
            mask_TA = chosen_TA == expert
            out_TD = out_TD + answer_TD * (weights_TA * mask_TA).sum(dim=-1, keepdim=True)
        return out_TD.view_as(x_BTD)


def step_of(layer: nn.Module, x_BTD: torch.Tensor) -> Step:
    """Forward and backward; gradients are made anew, as an optimiser that sets them to None leaves it."""
    x_BTD = x_BTD.clone().requires_grad_()
    grad_BTD = torch.ones_like(x_BTD)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x_BTD.grad = None
        layer(x_BTD).backward(grad_BTD)

    return step


def bare_products(layer: Any, x_BTD: torch.Tensor) -> Step:
    """The six matrix products of each expert's step on tokens that lie ready, into tensors that lie ready."""
    experts = layer.experts
    _, _, chosen_TA = layer.gate(x_BTD.flatten(0, 1))
    rows_E = torch.bincount(chosen_TA.flatten(), minlength=experts.num_experts).tolist()
    first_EHD, second_EDI = experts.gate_up_proj.detach(), experts.down_proj.detach()
    H, D = first_EHD.shape[1:]
    n = max(rows_E)
    x_nD, inner_nH, hidden_nI = (torch.randn(n, width).to(first_EHD) for width in (D, H, H // 2))
    out_nD, out_nH, out_nI = (torch.empty(n, width).to(first_EHD) for width in (D, H, H // 2))
    grad_HD, grad_DI = torch.empty(H, D).to(first_EHD), torch.empty(D, H // 2).to(first_EHD)

    def step() -> None:
        for expert, rows in enumerate(rows_E):
            x, inner, hidden = x_nD[:rows], inner_nH[:rows], hidden_nI[:rows]
            torch.mm(x, first_EHD[expert].T, out=out_nH[:rows])
            torch.mm(hidden, second_EDI[expert].T, out=out_nD[:rows])
            torch.mm(x, second_EDI[expert], out=out_nI[:rows])
            torch.mm(x.T, hidden, out=grad_DI)
            torch.mm(inner.T, x, out=grad_HD)
            torch.mm(inner, first_EHD[expert], out=out_nD[:rows])

    return step


def time_of(device: torch.device) -> Clock:
    """Wall time once a GPU has done all that it was given."""

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def time_steps(steps: Mapping[str, Step], rounds: int, threads: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of every step in every round; one round before does not count."""
    torch.set_num_threads(threads)
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start_s = clock()
            steps[name]()
            if number:
                times[name].append(clock() - start_s)
    return times


if __name__ == "__main__":
    sys.exit(main())
