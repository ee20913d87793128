"""Training of the retrieval head: which frames hold what a question asks for.

A head learns which frames of a clip hold what a question about it asks for, from drawn clips whose evidence is known
(`stream_questions.retrieval_clips`). The host stays as it is, and no long stream is learned from. Only questions about
what was before teach: what is on now is in the newest frames, whatever they show. Plain torch on a CPU, a minute at
most. Called by `pipelines.stream_trials`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsight.data.stream_scenes import frames_of
from sparsight.data.streams import QuestionedStream, StreamQuestion, StreamRecipe
from sparsight.errors import DataError
from sparsight.kv.retrieval_head import RetrievalHead, host_fingerprint, projected_frames, question_words
from sparsight.model.vision_language import VisionLanguageModel

BATCH_FRAMES = 64
"""Frames of a stream that are drawn and projected at a time."""
WARMUP_STEPS = 20


@dataclass(frozen=True)
class HeadSchedule:
    """How a head learns: AdamW, a short warm-up, then a rate that falls along a cosine to 0."""

    steps: int = 300
    batch_clips: int = 32
    learning_rate: float = 1e-2
    weight_decay: float = 0.01


DEFAULT_SCHEDULE = HeadSchedule()


@dataclass(frozen=True)
class ClipExample:
    """A clip's projected frames, the mean word embeddings of questions about it, and of each question the frames that
    its answer follows from and the frames that there were when it was asked (both boolean)."""

    embeds_FSD: Tensor
    words_QD: Tensor
    evidence_QF: Tensor
    seen_QF: Tensor


def train_head(
    model: VisionLanguageModel, clips: Iterable[QuestionedStream], seed: int, schedule: HeadSchedule = DEFAULT_SCHEDULE
) -> RetrievalHead:
    """A head for this model. Equal arguments give equal weights on one machine.

    The clips' projected frames are kept in main memory meanwhile. Raises `DataError` where no clip has a question about
    what was before that follows from some frame.
    """
    examples = [example for clip in clips if (example := clip_example(model, clip)) is not None]
    return fit_head(examples, seed, schedule, host_fingerprint(model))


def clip_example(model: VisionLanguageModel, clip: QuestionedStream) -> ClipExample | None:
    """What a head learns from a clip; None where no question of it teaches."""
    questions = [question for question in clip.questions if question.kind == "past" and question.evidence_s]
    if not questions:
        return None
    return ClipExample(
        projected_stream(model, clip.recipe),
        torch.stack([question_words(model, question.question) for question in questions]),
        torch.stack([evidence_frames(question, clip.recipe) for question in questions]),
        torch.stack([seen_frames(question, clip.recipe) for question in questions]),
    )


def fit_head(
    examples: Sequence[ClipExample], seed: int, schedule: HeadSchedule = DEFAULT_SCHEDULE, host: str = ""
) -> RetrievalHead:
    """Train a new head on examples of any origin; `host` names the model that they come from."""
    if not examples:
        raise DataError("no clip has a question about what was before: draw more clips, or longer ones")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = RetrievalHead(examples[0].embeds_FSD.shape[-1], host=host)
    objective = SigmoidLoss(head)
    optimizer = torch.optim.AdamW(objective.parameters(), schedule.learning_rate, weight_decay=schedule.weight_decay)
    picks = torch.Generator().manual_seed(seed)
    for step in range(schedule.steps):
        chosen = torch.randint(len(examples), (schedule.batch_clips,), generator=picks).tolist()
        loss = objective([examples[index] for index in chosen])
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * _rate_scale(step, schedule.steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return head.eval()


class SigmoidLoss(nn.Module):
    """Every pair of a question and a frame is a yes-or-no question of its own (SigLIP, arXiv 2303.15343), so that a
    question may have several frames. Frames are compared inside a clip only: what other clips show may fit the
    question as well, and nobody says so."""

    def __init__(self, head: RetrievalHead) -> None:
        super().__init__()
        self.head = head
        self.log_scale = nn.Parameter(torch.tensor(2.5))
        self.bias = nn.Parameter(torch.tensor(-3.0))

    def forward(self, examples: Sequence[ClipExample]) -> Tensor:
        frames_FD = self.head.embed_frames(torch.cat([example.embeds_FSD for example in examples]))
        questions_QD = self.head.embed_questions(torch.cat([example.words_QD for example in examples]))
        logits_QF = self.log_scale.exp() * questions_QD @ frames_FD.T + self.bias
        evidence_QF = torch.block_diag(*[example.evidence_QF.float() for example in examples])
        seen_QF = torch.block_diag(*[example.seen_QF.float() for example in examples])
        losses_QF = functional.binary_cross_entropy_with_logits(logits_QF, evidence_QF, reduction="none")
        return (losses_QF * seen_QF).sum() / seen_QF.sum()


def _rate_scale(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def projected_stream(model: VisionLanguageModel, recipe: StreamRecipe) -> Tensor:
    """What the model's text part is shown of all frames of a drawn stream: [F, S, D]; frame n becomes block n."""
    frames = frames_of(recipe)
    parts: list[Tensor] = []
    while batch := [frame.picture for frame in islice(frames, BATCH_FRAMES)]:
        parts.append(projected_frames(model, batch))
    return torch.cat(parts)


def seen_frames(question: StreamQuestion, recipe: StreamRecipe) -> Tensor:
    """Which frames [F] there are when the question is asked (boolean)."""
    return _times_s(recipe) <= question.time_s


def evidence_frames(question: StreamQuestion, recipe: StreamRecipe) -> Tensor:
    """Which frames [F] the answer follows from (boolean)."""
    times_F1 = _times_s(recipe)[:, None]
    starts_s, ends_s = torch.tensor(question.evidence_s, dtype=torch.float64).view(-1, 2).T
    return ((starts_s <= times_F1) & (times_F1 < ends_s)).any(dim=1)


def _times_s(recipe: StreamRecipe) -> Tensor:
    return torch.tensor([recipe.time_s(frame) for frame in range(recipe.frames)], dtype=torch.float64)
