"""Learning to be found: each layer's queries are to score the frames that hold a question's evidence above the others.

Retrieval from a stream compares the mean query of a question's words with the mean key of each frame, layer by layer
and before rotation (ReKV, arXiv 2503.00540, section 3.2). A large language model's heads do well at that untaught; a
small one learns it here, by the same score, from clips whose evidence is known: a cross-entropy over frames (InfoNCE,
arXiv 1807.03748) for each stretch of the evidence, against the frames that are none. Any frame of a stretch will do,
since retrieval brings its neighbours along. The score's other writing is `kv.retrieve.score_blocks`. Used by the
response step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from sparsight.distill.rows import TrainingRow
from sparsight.model.projections import ProjectionTrace

TEMPERATURE = 0.05
"""A cosine this much larger makes a frame e times as likely."""


class AskedClip(NamedTuple):
    """A row of a batch with Q questions about the F frames of its clip, which begin at position `first`.

    `spans` are the [start, end) of each question's words, `evidence_QF` (boolean) the frames that it follows from.
    """

    row: int
    first: int
    spans: Sequence[tuple[int, int]]
    evidence_QF: torch.Tensor


def asked_clips(
    rows: Sequence[TrainingRow], visual_id: int, frame_tokens: int, device: torch.device
) -> list[AskedClip]:
    """The rows that have questions whose evidence is known, with it on the device."""
    clips: list[AskedClip] = []
    for number, row in enumerate(rows):
        if not row.asked:
            continue
        visual_N = np.flatnonzero(row.input_ids == visual_id)
        evidence_QF = torch.zeros(len(row.asked), (len(visual_N) - 1) // frame_tokens, dtype=torch.bool)
        for question, asked in enumerate(row.asked):
            evidence_QF[question, list(asked.frames)] = True
        spans = [(asked.start, asked.end) for asked in row.asked]
        clips.append(AskedClip(number, int(visual_N[0]), spans, evidence_QF.to(device)))
    return clips


def retrieval_sum(trace: ProjectionTrace, clips: Sequence[AskedClip], frame_tokens: int) -> torch.Tensor:
    """The retrieval loss of all questions, added up; of one question the mean over layers. There is a clip at least."""
    losses = [
        question_losses(trace.queries[layer][clip.row], trace.keys[layer][clip.row], clip, frame_tokens).sum()
        for layer in trace.queries
        for clip in clips
    ]
    return torch.stack(losses).sum() / len(trace.queries)


def question_losses(
    queries_THC: torch.Tensor, keys_TGC: torch.Tensor, clip: AskedClip, frame_tokens: int
) -> torch.Tensor:
    """Of each question [Q] the mean over the stretches of its evidence, in one layer: minus the log of the share that a
    stretch's frames have among them and the frames that are no evidence."""
    means_QHC = torch.stack([queries_THC[start:end].float().mean(dim=0) for start, end in clip.spans])
    end = clip.first + clip.evidence_QF.shape[1] * frame_tokens
    mean_keys_FGC = keys_TGC[clip.first : end].float().unflatten(0, (-1, frame_tokens)).mean(dim=1)
    logits_QF = frame_scores(means_QHC, mean_keys_FGC) / TEMPERATURE
    others_Q = logits_QF.masked_fill(clip.evidence_QF, -torch.inf).logsumexp(dim=1)
    question_P, stretch_PF = stretches(clip.evidence_QF)
    found_P = logits_QF[question_P].masked_fill(~stretch_PF, -torch.inf).logsumexp(dim=1)
    losses_P = functional.softplus(others_Q[question_P] - found_P)
    return losses_P.new_zeros(len(logits_QF)).index_add(0, question_P, losses_P) / question_P.bincount()


def stretches(evidence_QF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The P stretches of frames in a row that are evidence: the question [P] of each, and its frames [P, F] (boolean).

    Every question has one at least.
    """
    before_QF = functional.pad(evidence_QF, (1, -1))
    numbers_QF = (evidence_QF & ~before_QF).cumsum(dim=1)
    most = int(numbers_QF.max())
    numbers_1S1 = torch.arange(1, most + 1, device=evidence_QF.device)[None, :, None]
    stretch_QSF = evidence_QF[:, None] & (numbers_QF[:, None] == numbers_1S1)
    question_P, number_P = stretch_QSF.any(dim=2).nonzero(as_tuple=True)
    return question_P, stretch_QSF[question_P, number_P]


def frame_scores(means_QHC: torch.Tensor, mean_keys_FGC: torch.Tensor) -> torch.Tensor:
    """Cosines [Q, F] of mean queries, heads laid end to end, and mean keys, repeated for the queries of a group."""
    group = means_QHC.shape[1] // mean_keys_FGC.shape[1]
    summed_QGC = means_QHC.unflatten(1, (-1, group)).sum(dim=2)
    norms_Q1 = means_QHC.flatten(1).norm(dim=1, keepdim=True) * group**0.5
    norms_F = mean_keys_FGC.flatten(1).norm(dim=1)
    tiniest = torch.finfo(norms_F.dtype).tiny
    return summed_QGC.flatten(1) @ mean_keys_FGC.flatten(1).T / (norms_Q1 * norms_F).clamp_min(tiniest)
