"""What every training step does around its loss: pictures to embeddings, one forward pass, the routers' balance.

An `Objective` is what a stage learns: it makes batches of its rows, and a module that turns a batch into a loss.
`response_objective` and `pair_objective` are the two; the loop drives either.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sparsight.distill.balance import balance_loss
from sparsight.distill.pictures import Clips
from sparsight.distill.telemetry import pair_counts
from sparsight.errors import ConfigError
from sparsight.model.packing import Packing
from sparsight.model.routing import RouterTrace, trace_routers
from sparsight.model.vision_language import VisionLanguageModel

Numbers = npt.NDArray[np.int64]


class StepOutput(NamedTuple):
    """`loss` to differentiate; local `sums` that the objective can name, number of input tokens last; the balance value
    (0-d) of the global batch and the local `pair_counts` of experts [L, E, E], None for a dense student."""

    loss: torch.Tensor
    sums: torch.Tensor
    balance: torch.Tensor | None
    pairs_LEE: torch.Tensor | None


class Objective(Protocol):
    """What a stage learns from its rows. `module` maps a batch to a `StepOutput`: what data-parallel training wraps."""

    @property
    def module(self) -> nn.Module: ...

    def batch(self, everything: Numbers, share: Numbers) -> Any:
        """The rows `share` of a global batch that consists of the rows `everything`, on the student's device.

        Weighted so that the mean of the workers' losses is the loss of the global batch.
        """
        ...

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Metrics of a step from its `StepOutput.sums`, added over all workers, without the last."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep beside weights and optimiser."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class StudentForward(NamedTuple):
    """Last hidden states [B, T, D] of a batch, what its routers said, and, where asked for, every layer's attention
    [B, H, T, T]."""

    hidden_BTD: torch.Tensor
    trace: RouterTrace
    attentions_L: Sequence[torch.Tensor]


def forward_student(
    student: VisionLanguageModel,
    input_ids_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    clips: Clips,
    packing: Packing | None,
    attention: bool = False,
) -> StudentForward:
    """One forward pass of a batch, pictures included."""
    visual_ND = visual_embeds(student, clips)
    with trace_routers(student) as trace:
        hidden_BTD, attentions = student.forward_text(input_ids_BT, mask_BT, visual_ND, packing, attention)
    return StudentForward(hidden_BTD, trace, attentions)


def visual_embeds(student: VisionLanguageModel, clips: Clips) -> torch.Tensor:
    """Embeddings of all clips' visual tokens in reading order [N, D]; the tower runs only on pixels.

    A clip without frames has none. Where no clip has any, the result [0, D] still is a function of all weights that
    pictures go through: their gradients are then zero, not missing, which data-parallel training waits for.
    """
    trains = any(parameter.requires_grad for parameter in student.model.model.vision_tower.parameters())
    if trains and clips.are_features:
        raise ConfigError("a stage that trains the tower cannot use precomputed features")
    frames = [count for count in clips.frames if count]
    if not frames:
        stock = student.model.model
        weights = [*stock.vision_tower.parameters(), *stock.multi_modal_projector.parameters()]
        nothing = [weight.flatten()[:0].sum() for weight in weights if weight.requires_grad]
        return student.newline_D[None][:0] + sum(nothing)
    values = clips.values.to(student.device)
    features_NPD = values if clips.are_features else student.features(values, gradient=trains)
    if len(set(frames)) == 1:
        return student.clip_embeds(features_NPD.unflatten(0, (-1, frames[0]))).flatten(0, 1)
    split = features_NPD.split(frames)
    return torch.cat([student.clip_embeds(clip_FPD[None])[0] for clip_FPD in split])


def with_balance(
    loss: torch.Tensor, sums: torch.Tensor, trace: RouterTrace, mask_BT: torch.Tensor, weight: float
) -> StepOutput:
    """The step's output: `weight` times the balance of a sparse student's routers is added to the loss."""
    if not trace.logits:
        return StepOutput(loss, sums, None, None)
    mask_T = mask_BT.flatten()
    with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
        balance = balance_loss(trace.logits, trace.chosen, mask_T)
    if weight > 0:
        loss = loss + weight * balance.loss
    experts = next(iter(trace.logits.values())).shape[1]
    return StepOutput(loss, sums, balance.value.detach(), pair_counts(trace.chosen, experts, mask_T))
