"""Several independent questions about one picture in one sequence, each computed as if it were asked alone.

The tokens up to the end of the picture are shared; every question attends to them and to itself, and its positions
go on from theirs. So a picture's tokens are paid for once, and no answer leaks into the next question. Used by
labelling and training; a conversation, whose turns do build on each other, needs none of this.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Packing(NamedTuple):
    """Which positions see which (`mask_B1TT`, True = sees), and rotary positions `positions_BT`."""

    mask_B1TT: torch.Tensor
    positions_BT: torch.Tensor


def pack(starts: Sequence[Sequence[int]], length: int) -> Packing | None:
    """The packing of right-padded rows of `length` tokens; None if no row holds independent questions.

    `starts[row]` are the first tokens of the row's questions, as in `EncodedChat.starts`; an empty row is a plain
    causal sequence. Padding counts as part of the last question, which nobody reads.
    """
    if not any(starts):
        return None
    index_T = torch.arange(length)
    question_BT = torch.stack([(index_T[:, None] >= torch.tensor(row)).sum(dim=1) for row in map(list, starts)])
    firsts = [torch.tensor([0, *row]) for row in starts]
    shared_B = torch.tensor([row[0] if row else 0 for row in starts])
    begins_BT = torch.stack([first[question_T] for first, question_T in zip(firsts, question_BT, strict=True)])
    offset_BT = torch.where(question_BT > 0, shared_B[:, None], 0)
    same_BTT = question_BT[:, :, None] == question_BT[:, None, :]
    sees_BTT = (index_T[:, None] >= index_T[None, :]) & (same_BTT | (question_BT[:, None, :] == 0))
    return Packing(sees_BTT[:, None], index_T - begins_BT + offset_BT)
