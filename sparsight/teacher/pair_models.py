"""Which models make pairs, and the pair maker built of them where it works. Plain data: it travels to the workers."""

from dataclasses import dataclass

from sparsight.config import PairsConfig
from sparsight.data.objects import ObjectVocabulary
from sparsight.teacher.answering import AnswerModel
from sparsight.teacher.judges import Judge, LikelihoodJudge, ModelJudge, TruthJudge
from sparsight.teacher.load import TeacherSource, load_answer_model
from sparsight.teacher.pair_maker import PairMaker, PairSettings


@dataclass(frozen=True)
class PairModels:
    """Where the models are. No student where pairs are ready-made; a `judge` of its own only where one is named."""

    teacher: TeacherSource
    student: TeacherSource | None = None
    judge: TeacherSource | None = None


def load_pair_maker(models: PairModels, settings: PairSettings, device: str = "cpu") -> PairMaker:
    """Load the models. Raises `CheckpointError` if one does not fit."""
    teacher = load_answer_model(models.teacher, device)
    if models.student is None:
        return PairMaker(teacher, settings)
    student = load_answer_model(models.student, device)
    marker = teacher if models.judge is None else load_answer_model(models.judge, device)
    return PairMaker(teacher, settings, student, _judge(settings.pairs, teacher, marker))


def _judge(config: PairsConfig, teacher: AnswerModel, marker: AnswerModel) -> Judge:
    if config.judge == "truth":
        return TruthJudge(ObjectVocabulary.scenes())
    if config.judge == "likelihood":
        return LikelihoodJudge(teacher)
    return ModelJudge(marker, config.batch_prompts)
