"""A small training problem over clips, with the retrieval term; importable in spawned processes."""

from sparsight.config import StageConfig, StreamsSource, TermsConfig
from sparsight.data.stream_questions import clip_samples
from sparsight.distill.loop import StageTrainer
from sparsight.distill.pictures import PixelPictures
from sparsight.distill.rows import RowMaker
from tests.parity.training_case import sparse_student

SOURCE = StreamsSource(kind="streams", clips=9, clip_frames=[1, 6, 8], size_pixels=32)
STAGE = StageConfig(
    name="host",
    terms=TermsConfig(cross_entropy=1.0, retrieval=0.7),
    steps=4,
    batch_samples=3,
    learning_rate=3e-3,
)


def clips_trainer(stage: StageConfig = STAGE, source: StreamsSource = SOURCE) -> StageTrainer:
    student, samples = sparse_student(), list(clip_samples(source, "train", 1, 20))
    rows = RowMaker(student.chat, student.visual_tokens, student.head_VD.shape[0]).answered(samples)
    return StageTrainer(student, stage, rows, PixelPictures(samples, student.pixels, 10**6, 10**6), seed=0)
