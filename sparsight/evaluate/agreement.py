"""How closely a student's next-token distributions follow the teacher's, over the whole vocabulary.

Hidden states and heads go in, chunk by chunk, so that no table of all positions and the vocabulary is ever built.
"""

import torch
from pydantic import BaseModel, ConfigDict

CHUNK_BYTES = 64_000_000


class Agreement(BaseModel):
    """Means over the positions that predict answer tokens."""

    model_config = ConfigDict(frozen=True)

    kl_nats: float
    """KL(teacher ‖ student)."""
    top1: float
    """Share of positions where both find the same token most probable."""
    positions: int


@torch.inference_mode()
def agreement(
    teacher_nD: torch.Tensor,
    teacher_head_VD: torch.Tensor,
    student_nD: torch.Tensor,
    student_head_VD: torch.Tensor,
    chunk_bytes: int = CHUNK_BYTES,
) -> Agreement | None:
    """Compare two models at n positions; the widths D may differ, heads may be padded beyond the shared vocabulary.

    Padding rows (ids that only one head has) are left out of both distributions. None where there are no positions.
    """
    n = len(teacher_nD)
    if n != len(student_nD):
        raise ValueError(f"{n} teacher positions but {len(student_nD)} student positions")
    if n == 0:
        return None
    V = min(len(teacher_head_VD), len(student_head_VD))
    rows = max(1, chunk_bytes // (4 * 4 * V))
    kl, same = 0.0, 0
    for start in range(0, n, rows):
        teacher_nV = (teacher_nD[start : start + rows] @ teacher_head_VD[:V].T).float().log_softmax(dim=-1)
        student_nV = (student_nD[start : start + rows] @ student_head_VD[:V].T).float().log_softmax(dim=-1)
        kl += float((teacher_nV.exp() * (teacher_nV - student_nV)).sum())
        same += int((teacher_nV.argmax(dim=-1) == student_nV.argmax(dim=-1)).sum())
    return Agreement(kl_nats=kl / n, top1=same / n, positions=n)
