"""A tiny random vision-language model with a tokenizer of StreamQA's words, and where its clips come from."""

from random import Random

from PIL import Image

from sparsight.config import ArchitectureConfig, StreamsSource
from sparsight.data.stream_questions import retrieval_clips
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.vision_language import VisionLanguageModel

SOURCE = StreamsSource(kind="streams", clips=6, clip_frames=[8], size_pixels=32, streams=1, lengths_s=[60.0])
TEXT_WIDTH = 32


def tiny_host(seed: int = 0) -> VisionLanguageModel:
    architecture = ArchitectureConfig(
        picture_pixels=32,
        tower_layers=1,
        tower_width=32,
        tower_heads=1,
        text_layers=1,
        text_width=TEXT_WIDTH,
        text_heads=1,
        text_key_value_heads=1,
        text_intermediate=48,
    )
    questions = [question.question for clip in retrieval_clips(SOURCE, 0) for question in clip.questions]
    return make_dense(architecture, make_tokenizer(questions, 400), seed)


def noise_pictures(count: int) -> list[Image.Image]:
    """Different pictures of 20 x 20 random pixels."""
    random = Random(2)
    return [Image.frombytes("RGB", (20, 20), random.randbytes(1200)) for _ in range(count)]
