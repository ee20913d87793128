"""How probable whole answers are to a model: sums of their tokens' log-probs, for many answers to one prompt at once.

The answers of a row share its picture and its question, which are computed once (`model.packing`); the head reads the
positions that predict answer tokens only, in chunks. Called by pair making with the teacher and, where a student is
its own reference, by preference distillation.
"""

from collections.abc import Sequence

import numpy as np
import torch

from sparsight.media.chat import EncodedAnswers
from sparsight.model.label_logprobs import label_logprobs
from sparsight.model.packing import pack
from sparsight.model.vision_language import VisionLanguageModel


@torch.no_grad()
def score_answers(
    model: VisionLanguageModel,
    rows: Sequence[EncodedAnswers],
    visual_ND: torch.Tensor,
    vocabulary: int | None = None,
) -> list[torch.Tensor]:
    """log π(answer | picture, question) = Σ_t log π(y_t | …), in nats, one float32 tensor [answers] a row.

    The end-of-turn token counts as a token of its answer, and nothing is divided by the length (LLaVA-MoD, preference
    distillation). `visual_ND` are the rows' visual tokens in order. `vocabulary` cuts the head to its first ids, where
    the other model of a comparison knows no more.
    """
    ids_BT, mask_BT = model.pad([row.input_ids for row in rows])
    T = ids_BT.shape[1]
    hidden_BTD = model.hidden(ids_BT, mask_BT, visual_ND, pack([row.starts for row in rows], T))
    before_N = np.concatenate([index * T + row.before_n for index, row in enumerate(rows)])
    positions_N = np.concatenate([index * T + row.positions_n for index, row in enumerate(rows)])
    hidden_ND = hidden_BTD.flatten(0, 1)[torch.from_numpy(before_N).to(hidden_BTD.device)]
    labels_N = ids_BT.flatten()[torch.from_numpy(positions_N).to(ids_BT.device)]
    logprobs_N = label_logprobs(hidden_ND, model.head_VD[:vocabulary], labels_N)
    sums = answer_sums(logprobs_N, [end - start for row in rows for start, end in row.answer_spans])
    return list(sums.split([len(row.answer_spans) for row in rows]))


def answer_sums(logprobs_N: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """The log-prob of every answer [answers] from those of all answers' tokens, one answer after the other."""
    return torch.stack([part_n.sum() for part_n in logprobs_N.split(list(lengths))])
