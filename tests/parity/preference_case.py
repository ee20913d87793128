"""The training problem of `training_case`, with preference pairs: importable in spawned processes."""

from random import Random

import numpy as np

from sparsight.config import StageConfig
from sparsight.distill.loop import StageTrainer
from sparsight.distill.pair_rows import PairRow, PairRowMaker
from sparsight.distill.pictures import PixelPictures
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.records import PreferencePair, hash_answers
from tests.parity.training_case import WORDS, samples, sparse_student

QUESTION = "what is in the image?"
PAIRS = 20


def stage(loss: str = "kto_pair", reference: str = "teacher", cross_entropy: float = 0.5) -> StageConfig:
    return StageConfig.model_validate(
        {
            "name": "preference",
            "rows": "pairs",
            "trainable": ["projector", "experts", "routers"],
            "terms": {"preference": 2.0, "cross_entropy": cross_entropy, "balance": 0.1},
            "preference": {"loss": loss, "beta": 0.3, "reference": reference},
            "steps": 6,
            "batch_samples": 6,
            "learning_rate": 3e-3,
        }
    )


def preference_pairs(student: VisionLanguageModel) -> list[PreferencePair]:
    """Random pairs of answers about the pictures; the teacher's log-probs are a little off the student's own scale."""
    random = Random(1)
    pairs: list[PreferencePair] = []
    for index, sample in enumerate(samples(PAIRS)):
        chosen, rejected = random.sample(WORDS, 2)
        encoded = student.chat.encode_answers(QUESTION, [chosen, rejected], student.visual_tokens())
        lengths = [len(encoded.answer_ids(answer)) for answer in (0, 1)]
        logprobs = [-length * random.uniform(4.0, 7.0) for length in lengths]
        hashed = hash_answers([encoded.answer_ids(0), encoded.answer_ids(1)])
        visual_tokens = encoded.visual_tokens
        pairs.append(
            PreferencePair(
                f"pair/{index}",
                "test",
                sample.content_hash,
                QUESTION,
                chosen,
                rejected,
                "open",
                (),
                "truth",
                1.0,
                *logprobs,
                visual_tokens,
                hashed,
            )
        )
    return pairs


def pair_rows(student: VisionLanguageModel) -> list[PairRow]:
    frames = {sample.content_hash: len(sample.frames) for sample in samples(PAIRS)}
    maker = PairRowMaker(student.chat, student.visual_tokens, student.head_VD.shape[0], frames)
    return maker.rows(preference_pairs(student))


def pair_trainer(settings: StageConfig) -> StageTrainer:
    student = sparse_student()
    pictures = PixelPictures(samples(PAIRS), student.pixels, 10**6, 10**6)
    return StageTrainer(student, settings, pair_rows(student), pictures, seed=5)


def ratios(seed: int = 0, pairs: int = 5) -> np.ndarray:
    """Log-ratios of chosen and rejected answers [2, pairs], the chosen ones positive on average."""
    return np.random.default_rng(seed).normal([[3.0], [-1.0]], 2.0, size=(2, pairs))
