"""The retrieval term scores frames as retrieval from a stream does, from the very queries and keys that it sees."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsight.config import UpcycleConfig
from sparsight.data.stream_questions import clip_samples
from sparsight.distill.retrieval_loss import TEMPERATURE, AskedClip, question_losses, stretches
from sparsight.distill.step import forward_student, visual_embeds
from sparsight.kv.attention import KvTextModel, attend
from sparsight.kv.retrieve import score_blocks
from sparsight.model.projections import trace_projections
from sparsight.model.tiny import make_tokenizer
from sparsight.model.upcycle import upcycle
from sparsight.records import Turn
from tests.parity.families import FAMILIES, LAYERS, dense_model
from tests.parity.streams_case import SOURCE, STAGE, clips_trainer

SPANS = [(20, 24), (25, 26), (22, 29)]
FRAMES, FRAME_TOKENS = 5, 3
CLIP = AskedClip(
    row=0,
    first=2,
    spans=SPANS,
    evidence_QF=torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 1, 0], [1, 1, 1, 1, 1]]).bool(),
)


class FullAttention:
    """A `KvContext` that attends to all that came before, at the stock positions, and keeps what it was given."""

    def __init__(self, model: KvTextModel) -> None:
        self.rotary = model.rotary
        self.queries: list[Tensor] = []
        self.keys: list[Tensor] = []

    def attend(self, layer: int, queries_HTC: Tensor, keys_GTC: Tensor, values_GTC: Tensor, scale: float) -> Tensor:
        self.queries.append(queries_HTC)
        self.keys.append(keys_GTC)
        T = queries_HTC.shape[1]
        causal_TT = torch.ones(T, T, dtype=torch.bool).tril()
        turned = self.rotary.rotate(queries_HTC, 0), self.rotary.rotate(keys_GTC, 0)
        return attend(*turned, values_GTC, causal_TT, scale)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_training_sees_the_queries_and_keys_that_streams_see(family: str, sparse: bool) -> None:
    tokenizer: Any = make_tokenizer(["what is in the image?", "a red circle"] * 20, 300)
    student = dense_model(family, tokenizer)
    if sparse:
        student = upcycle(student, UpcycleConfig(experts=4, layers=LAYERS[family]), seed=3)
    ids_1T, mask_1T = student.pad([student.chat.encode([Turn("what is in the image?", "a red circle")], 5).input_ids])
    visual_ND = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), trace_projections(student) as trace:
        student.hidden(ids_1T, mask_1T, visual_ND)
        embeds_TD = student.embed(ids_1T, visual_ND)[0]
    model = KvTextModel(student.model.model.language_model)
    seen = FullAttention(model)
    model.run(embeds_TD, seen)
    assert sorted(trace.queries) == sorted(trace.keys) == list(range(4))
    for layer in range(4):
        torch.testing.assert_close(trace.queries[layer][0].transpose(0, 1), seen.queries[layer], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(trace.keys[layer][0].transpose(0, 1), seen.keys[layer], atol=1e-4, rtol=1e-4)


def projections(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    queries_THC, keys_TGC = torch.randn(30, 4, 8, generator=random), torch.randn(30, 2, 8, generator=random)
    return queries_THC.to(dtype).requires_grad_(), keys_TGC.to(dtype).requires_grad_()


def runs_of(evidence_F: Tensor) -> list[list[int]]:
    """The evidence's frames, those in a row together."""
    runs: list[list[int]] = []
    for frame in evidence_F.nonzero().flatten().tolist():
        if runs and runs[-1][-1] == frame - 1:
            runs[-1].append(frame)
        else:
            runs.append([frame])
    return runs


def slow_loss(weights: Tensor, evidence_F: Tensor) -> Tensor:
    """One stretch of evidence at a time, among the frames that are none; `weights` [F] are what a softmax adds up."""
    runs, others = runs_of(evidence_F), weights[~evidence_F].sum()
    losses = [-torch.log(weights[run].sum() / (weights[run].sum() + others)) for run in runs]
    return sum(losses, start=weights.new_zeros(())) / len(losses)


def slow_losses(queries_THC: Tensor, keys_TGC: Tensor, clip: AskedClip) -> Tensor:
    """One question and one frame at a time, every head's own key."""
    losses: list[Tensor] = []
    for (start, end), evidence_F in zip(clip.spans, clip.evidence_QF, strict=True):
        query_HC = sum(queries_THC[place] for place in range(start, end)) / (end - start)
        weights: list[Tensor] = []
        for frame in range(len(evidence_F)):
            first = clip.first + frame * FRAME_TOKENS
            key_GC = sum(keys_TGC[place] for place in range(first, first + FRAME_TOKENS)) / FRAME_TOKENS
            key_HC = torch.stack([key_GC[head // 2] for head in range(4)])
            cosine = (query_HC * key_HC).sum() / (query_HC.square().sum() * key_HC.square().sum()).sqrt()
            weights.append((cosine / TEMPERATURE).exp())
        losses.append(slow_loss(torch.stack(weights), evidence_F))
    return torch.stack(losses)


def test_the_loss_is_a_cross_entropy_over_frames_and_so_is_its_gradient() -> None:
    losses_Q = question_losses(*(fast := projections()), CLIP, FRAME_TOKENS)
    slow_Q = slow_losses(*(slow := projections(torch.float64)), CLIP)
    torch.testing.assert_close(losses_Q.double(), slow_Q, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(losses_Q.sum(), fast), torch.autograd.grad(slow_Q.sum(), slow), strict=True
    ):
        assert float(theirs.abs().max()) > 0.01
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-4)


def test_where_all_frames_are_evidence_nothing_is_to_be_learned() -> None:
    assert question_losses(*projections(), CLIP, FRAME_TOKENS)[2].item() == pytest.approx(0.0, abs=1e-6)


def test_stretches_are_frames_in_a_row() -> None:
    evidence_QF = torch.randint(0, 2, (30, 9), generator=torch.Generator().manual_seed(0)).bool()
    evidence_QF[:, 4] = True  # a question that has none is not asked
    question_P, stretch_PF = stretches(evidence_QF)
    found = [
        (question, row.nonzero().flatten().tolist())
        for question, row in zip(question_P.tolist(), stretch_PF, strict=True)
    ]
    assert found == [(question, run) for question in range(30) for run in runs_of(evidence_QF[question])]


def test_every_stretch_is_wanted_and_of_each_any_frame() -> None:
    """A question that finds one of its two scenes is as far from done as one that finds the other."""
    evidence_F = torch.tensor([1, 1, 0, 0, 1]).bool()
    key_FGC = torch.eye(5)[:, None]
    for wanted, costs_little in ([0, 4], True), ([1, 4], True), ([0], False), ([4], False), ([0, 1], False):
        query_1HC = torch.zeros(1, 1, 5)
        query_1HC[0, 0, wanted] = 1.0
        clip = AskedClip(0, 1, [(0, 1)], evidence_F[None])
        loss = float(question_losses(torch.cat([query_1HC, key_FGC]), torch.cat([query_1HC, key_FGC]), clip, 1))
        assert (loss < 1e-4) == costs_little


def test_frames_are_scored_as_blocks_are() -> None:
    """The frame that retrieval puts first is the one that costs least to call evidence."""
    queries_THC, keys_TGC = (value.detach() for value in projections())
    means_FGC = keys_TGC[2 : 2 + FRAMES * FRAME_TOKENS].view(FRAMES, FRAME_TOKENS, 2, 8).mean(dim=1)
    scores_F = score_blocks(queries_THC[20:24].transpose(0, 1), means_FGC)
    each = CLIP._replace(spans=[(20, 24)] * FRAMES, evidence_QF=torch.eye(FRAMES).bool())
    losses_F = question_losses(queries_THC, keys_TGC, each, FRAME_TOKENS)
    torch.testing.assert_close(losses_F, -(scores_F / TEMPERATURE).log_softmax(dim=0), atol=1e-5, rtol=1e-5)


def test_a_step_scores_a_clip_as_a_stream_of_its_frames_would_be() -> None:
    """From drawn clips, through rows that pack their questions, to losses: each question alone in a stream's prompt."""
    trained = clips_trainer()
    student, rows = trained.student, trained.rows
    model = KvTextModel(student.model.model.language_model)
    compared = 0
    for number, sample in enumerate(clip_samples(SOURCE, "train", 1, 20)):
        batch = trained.objective.batch(np.array([number]), np.array([number]))
        asked = [turn for turn in sample.turns if 0 < len(turn.evidence) < len(sample.frames)]
        assert [len(clip.spans) for clip in batch.asked] == ([len(asked)] if asked else [])
        with torch.no_grad(), trace_projections(student) as trace:
            answers = batch.answers
            forward_student(student, answers.input_ids_BT, answers.mask_BT, answers.clips, answers.packing)
            visual_TD = visual_embeds(student, answers.clips)
            for question, turn in enumerate(asked):
                prompt, seen = student.chat.frames_prompt(turn.question), FullAttention(model)
                before_TD, after_TD = (model.embed(torch.tensor(ids)) for ids in (prompt.before_ids, prompt.after_ids))
                model.run(torch.cat([before_TD, visual_TD, after_TD]), seen)
                first, words = len(before_TD), range(len(prompt.after_ids))[prompt.question]
                after = first + len(visual_TD)
                for layer, (queries_HTC, keys_GTC) in enumerate(zip(seen.queries, seen.keys, strict=True)):
                    frames_GFSC = keys_GTC[:, first : after - 1].unflatten(1, (-1, student.frame_tokens))
                    words_HTC = queries_HTC[:, after + words.start : after + words.stop]
                    scores_F = score_blocks(words_HTC, frames_GFSC.mean(dim=2).transpose(0, 1))
                    evidence_F = torch.zeros(len(scores_F), dtype=torch.bool)
                    evidence_F[list(turn.evidence)] = True
                    alone = slow_loss((scores_F / TEMPERATURE).exp(), evidence_F)
                    parts = trace.queries[layer][0], trace.keys[layer][0], batch.asked[0]
                    loss = question_losses(*parts, student.frame_tokens)[question]
                    torch.testing.assert_close(loss, alone, atol=1e-4, rtol=1e-4)
                    compared += 1
    assert compared > 20
    assert len(rows) == SOURCE.clips


def test_a_student_learns_to_find_what_it_is_asked_for() -> None:
    source = SOURCE.model_copy(update={"clips": 4, "clip_frames": [8]})
    terms = STAGE.terms.model_copy(update={"cross_entropy": 0.0})
    trained = clips_trainer(STAGE.model_copy(update={"steps": 60, "batch_samples": 4, "terms": terms}), source)
    losses = [trained.train_step()["retrieval"] for _ in range(trained.total_steps)]
    assert sum(losses[-12:]) < 0.8 * sum(losses[:12])
