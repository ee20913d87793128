"""How much a sample's text attends to each position of its picture, layer by layer (CompoDistill, arXiv 2510.12184).

A [layers, N] table from a forward pass that returned its attention; teacher and student make it in the same way, so
heads and depth may differ as long as the N positions agree. Which layers are compared with which is `middle_layers`
and `layer_groups`. Called by labelling and by the training step; needs attention of kind `eager`, the only one that
returns its weights.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


def text_positions(input_ids_T: npt.NDArray[np.integer], visual_id: int) -> npt.NDArray[np.int64]:
    """The positions after a picture's first that are not its own: those that can see it. None without a picture."""
    visual_N = np.flatnonzero(input_ids_T == visual_id)
    if not len(visual_N):
        return np.zeros(0, np.int64)
    return np.flatnonzero((input_ids_T != visual_id) & (np.arange(len(input_ids_T)) > visual_N[0]))


def visual_attention(
    attentions_L: Sequence[torch.Tensor],
    row: int,
    text_n: npt.NDArray[np.int64],
    visual_N: npt.NDArray[np.int64],
) -> torch.Tensor:
    """Attention [L, N] to each visual position of one row, a mean over heads and text positions.

    `attentions_L` are [B, H, T, T] by layer. Empty, [L, 0], without a picture.
    """
    device = attentions_L[0].device
    text, visual = torch.from_numpy(text_n).to(device), torch.from_numpy(visual_N).to(device)
    if not len(visual_N):
        return attentions_L[0].new_zeros(len(attentions_L), 0)
    return torch.stack([layer_BHTT[row][:, text][:, :, visual].mean(dim=(0, 1)) for layer_BHTT in attentions_L])


def middle_layers(layers: int) -> list[int]:
    """The layers between 30 % and 70 % of the depth, at least one."""
    first = int(layers * 0.3)
    return list(range(first, max(first + 1, -(-layers * 7 // 10))))


def layer_groups(student_layers: int, teacher_layers: int) -> list[tuple[int, list[int]]]:
    """Which teacher layers each student layer of the middle is compared with, as (student layer, teacher layers).

    With k student and m teacher layers in the middle, student layer i goes with m - k + 1 neighbouring ones, from the
    i-th on. A student with more layers in the middle than its teacher goes along the teacher's in proportion.
    """
    ours, theirs = middle_layers(student_layers), middle_layers(teacher_layers)
    k, m = len(ours), len(theirs)
    if k > m:
        return [(layer, [theirs[index * m // k]]) for index, layer in enumerate(ours)]
    return [(layer, theirs[index : index + m - k + 1]) for index, layer in enumerate(ours)]
