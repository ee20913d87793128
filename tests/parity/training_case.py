"""A small training problem with everything in it: pictures, ground truth, teacher targets, sparse layers.

Shared by the parity tests that train; importable in spawned processes.
"""

from random import Random

import numpy as np
import torch

from sparsight.config import ArchitectureConfig, StageConfig, TermsConfig, UpcycleConfig
from sparsight.data.scenes import draw, random_scene
from sparsight.distill.loop import StageTrainer
from sparsight.distill.pictures import PixelPictures
from sparsight.distill.rows import RowMaker, TrainingRow
from sparsight.media.images import encode_png
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import Relation, Sample, SparseTargets, Turn, VisualSignal

SMALL = ArchitectureConfig(
    picture_pixels=32,
    tower_layers=1,
    tower_width=32,
    tower_heads=1,
    text_layers=2,
    text_width=32,
    text_heads=1,
    text_key_value_heads=1,
    text_intermediate=48,
)
WORDS = ["yes", "no", "red", "circle", "two", "a blue triangle"]
STAGE = StageConfig(
    name="mimic",
    terms=TermsConfig(cross_entropy=0.5, forward_kl=1.0, balance=0.1),
    steps=6,
    batch_samples=6,
    learning_rate=3e-3,
)


def dense_student() -> VisionLanguageModel:
    return make_dense(SMALL, make_tokenizer([*WORDS, "what is in the image?"] * 20, 300), seed=0)


def sparse_student() -> VisionLanguageModel:
    return upcycle(dense_student(), UpcycleConfig(experts=4, active_experts=2), seed=1)


def samples(count: int = 20) -> list[Sample]:
    random = Random(0)
    made: list[Sample] = []
    for index in range(count):
        picture = encode_png(draw(random_scene(random, size_pixels=32)))
        turns = tuple(Turn("what is in the image?", random.choice(WORDS)) for _ in range(random.randint(1, 4)))
        made.append(Sample(f"row/{index}", (picture,), turns, "test"))
    return made


def training_rows(student: VisionLanguageModel, count: int = 20) -> list[TrainingRow]:
    """Rows whose targets are random distributions; every third row's answers count as the teacher's own."""
    maker = RowMaker(student.chat, student.visual_tokens, student.head_VD.shape[0])
    random = np.random.default_rng(0)
    rows: list[TrainingRow] = []
    for index, row in enumerate(maker.answered(samples(count))):
        truth_n = row.is_truth_n & (index % 3 > 0)
        targets = random_targets(random, len(truth_n), maker.vocabulary)
        rows.append(TrainingRow(row.id, row.content_hash, row.input_ids, row.positions_n, truth_n, targets))
    return rows


def random_targets(random: np.random.Generator, n: int, vocabulary: int, K: int = 5, S: int = 3) -> SparseTargets:
    logits_nV = random.normal(size=(n, vocabulary)) * 3
    logprobs_nV = logits_nV - np.log(np.exp(logits_nV).sum(axis=1, keepdims=True))
    order_nV = np.argsort(-logprobs_nV, axis=1).astype(np.int32)
    head_nK = np.take_along_axis(logprobs_nV, order_nV[:, :K], 1).astype(np.float32)
    tail_nS = np.take_along_axis(logprobs_nV, order_nV[:, K : K + S], 1).astype(np.float32)
    mass_n = (1 - np.exp(head_nK).sum(axis=1)).astype(np.float32)
    return SparseTargets(order_nV[:, :K], head_nK, mass_n, order_nV[:, K : K + S], tail_nS)


class Signals(dict[str, VisualSignal]):
    """Visual signals by row id."""

    def load(self, row: str) -> VisualSignal:
        return self[row]


def random_visual_signal(random: np.random.Generator, N: int, vocabulary: int, layers: int) -> VisualSignal:
    """What a random teacher of so many layers says of N visual positions."""
    factors_NJ = random.normal(2.0, 1.0, (N, 12)).astype(np.float32)
    attention_LN = random.random((layers, N), dtype=np.float32)
    targets = random_targets(random, N, vocabulary)
    return VisualSignal(targets, Relation(matrix_NN=factors_NJ @ factors_NJ.T), attention_LN)


def trainer() -> StageTrainer:
    student = sparse_student()
    pictures = PixelPictures(samples(), student.pixels, 10**6, 10**6)
    return StageTrainer(student, STAGE, training_rows(student), pictures, seed=5)


def weights(trained: StageTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trained.student.model.named_parameters()}
