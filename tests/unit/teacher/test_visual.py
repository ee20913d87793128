"""What a teacher says about pictures, against the whole logits and attention of the stock forward."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsight.config import HuggingFaceTeacherConfig, LabelConfig, StageConfig, TermsConfig
from sparsight.data.signals import labelled_table
from sparsight.data.visual_signals import VisualStore, encode_visual, visual_rows
from sparsight.distill.loop import StageTrainer
from sparsight.distill.pictures import PixelPictures
from sparsight.distill.rows import RowMaker
from sparsight.distill.taught import LiveSide, StoredSide, TaughtRow
from sparsight.errors import AlignmentError, CheckpointError
from sparsight.media.images import decode
from sparsight.media.pixels import to_pixels
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.model.visual_attention import text_positions
from sparsight.records import Sample, TeacherSignal, VisualSignal
from sparsight.stages import VisualAsk
from sparsight.storage import LocalStorage
from sparsight.teacher.load import TeacherSource, identify, load_teacher
from sparsight.teacher.protocol import SignalSettings, Teacher

SETTINGS = SignalSettings(
    LabelConfig(head=6, tail_samples=4, batch_samples=3, max_answer_tokens=5),
    seed=7,
    visual=VisualAsk(True, True, True),
)


@pytest.fixture(scope="module")
def source(teacher_directory: Path) -> TeacherSource:
    return TeacherSource("tiny", str(teacher_directory))


@pytest.fixture(scope="module")
def teacher(source: TeacherSource) -> Teacher:
    return load_teacher(source.asked_about(SETTINGS.visual), identify(source), SETTINGS)


@pytest.fixture(scope="module")
def model(teacher_directory: Path) -> VisionLanguageModel:
    return VisionLanguageModel.load(teacher_directory, attention="eager")


def label(teacher: Teacher, samples: list[Sample]) -> list[TeacherSignal]:
    signals = [signal for signal in teacher.label(samples) if isinstance(signal, TeacherSignal)]
    assert len(signals) == len(samples)
    return signals


def visual_of(signal: TeacherSignal) -> VisualSignal:
    assert signal.visual is not None
    return signal.visual


@pytest.mark.parametrize("frames", [1, 40])
def test_positions_relations_and_attention_are_those_of_the_stock_forward(
    teacher: Teacher, model: VisionLanguageModel, new_sample: Callable[..., Sample], frames: int
) -> None:
    samples = [new_sample(number, turns=1 + number % 3, frames=frames) for number in range(5)]
    for sample, signal in zip(samples, label(teacher, samples), strict=True):
        chat = model.chat.encode(sample.turns, model.visual_tokens(frames))
        pixels = to_pixels([decode(frame) for frame in sample.frames], model.pixels)[None]
        with torch.inference_mode():
            outputs = model.model(
                input_ids=torch.tensor([chat.input_ids]), pixel_values_videos=pixels, output_attentions=True
            )
        places = [place for place, token in enumerate(chat.input_ids) if token == model.chat.visual_id]
        text = [place for place in range(places[0], len(chat.input_ids)) if place not in places]
        logits_NV, visual = outputs.logits[0][places], visual_of(signal)
        assert visual.targets is not None
        np.testing.assert_allclose(visual.targets.head_logprobs_nK, logits_NV.log_softmax(-1).topk(6).values, atol=1e-4)
        assert visual.relation is not None
        assert (visual.relation.matrix_NN is not None) == (frames == 1)  # 161 positions of width 64 are many
        np.testing.assert_allclose(visual.relation.to_matrix(), logits_NV @ logits_NV.T, rtol=1e-3, atol=1e-2)
        attended = torch.stack([layer[0][:, text][:, :, places].mean(dim=(0, 1)) for layer in outputs.attentions])
        np.testing.assert_allclose(visual.attention_LN, attended, atol=1e-5)


def test_independent_questions_have_one_picture_and_attend_to_it_together(
    teacher: Teacher, model: VisionLanguageModel, new_sample: Callable[..., Sample]
) -> None:
    sample = replace(new_sample(1, turns=3), independent=True)
    alone = [replace(sample, turns=(turn,)) for turn in sample.turns]
    packed, *apart = (visual_of(signal) for signal in label(teacher, [sample, *alone]))
    assert packed.relation is not None
    assert apart[0].relation is not None
    np.testing.assert_allclose(packed.relation.to_matrix(), apart[0].relation.to_matrix(), rtol=1e-4, atol=1e-3)
    encoded = [model.chat.encode(one.turns, model.visual_tokens(1)).input_ids for one in alone]
    weights = [len(text_positions(np.asarray(ids), model.chat.visual_id)) for ids in encoded]
    attention = sum(weight * part.attention_LN for weight, part in zip(weights, apart, strict=True)) / sum(weights)
    np.testing.assert_allclose(packed.attention_LN, attention, atol=1e-5)


def sides(
    teacher: Teacher, model: VisionLanguageModel, samples: list[Sample], folder: Path
) -> tuple[list[TaughtRow], list[TaughtRow]]:
    """The same rows with the stored and with the live teacher's side."""
    signals = label(teacher, samples)
    LocalStorage(folder).write_bytes("visual-one.arrow", encode_visual(visual_rows(labelled_table(signals))))
    rows = RowMaker(model.chat, model.visual_tokens, model.head_VD.shape[0]).labelled(samples, signals)
    stored = StoredSide(VisualStore(LocalStorage(folder))).of(rows)
    by_id = {sample.id: sample for sample in samples}
    bare = [replace(row, targets=None) for row in rows]
    return stored, LiveSide(teacher.label, by_id, model.chat, model.head_VD.shape[0]).of(bare)


def test_the_live_teacher_says_what_the_store_says(
    teacher: Teacher, model: VisionLanguageModel, new_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    """Answers that the teacher wrote are read, not written again; draws are the same; the store rounds to float16."""
    samples = [new_sample(number, turns=1 + number % 3, answered=number % 2 == 0) for number in range(6)]
    for (row, stored), (live_row, live) in zip(*sides(teacher, model, samples, tmp_path), strict=True):
        assert row.targets is not None
        assert live_row.targets is not None
        np.testing.assert_array_equal(row.targets.tail_ids_nS, live_row.targets.tail_ids_nS)
        np.testing.assert_allclose(row.targets.head_logprobs_nK, live_row.targets.head_logprobs_nK, atol=1e-4)
        assert stored is not None
        assert live is not None
        assert stored.targets is not None
        assert live.targets is not None
        np.testing.assert_array_equal(stored.targets.tail_ids_nS, live.targets.tail_ids_nS)
        np.testing.assert_allclose(stored.targets.head_logprobs_nK, live.targets.head_logprobs_nK, atol=1e-2)
        assert stored.relation is not None
        assert live.relation is not None
        ours, theirs = stored.relation.to_matrix(), live.relation.to_matrix()
        np.testing.assert_allclose(ours / np.linalg.norm(ours), theirs / np.linalg.norm(theirs), atol=1e-4)
        np.testing.assert_allclose(stored.attention_LN, live.attention_LN, atol=1e-3)


def test_a_row_that_the_live_teacher_reads_otherwise_is_refused(
    teacher: Teacher, model: VisionLanguageModel, new_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    samples = [new_sample(1, turns=2)]
    ((row, _),), _ = sides(teacher, model, samples, tmp_path)
    other = replace(row, input_ids=np.where(row.input_ids == row.label_ids_n[0], 9, row.input_ids))
    side = LiveSide(teacher.label, {row.id: samples[0]}, model.chat, model.head_VD.shape[0])
    with pytest.raises(AlignmentError, match=rf"row '{row.id}' .* cuts its answers into other tokens"):
        side.of([other])
    unreadable = {row.id: replace(samples[0], frames=(b"no picture",))}
    broken = LiveSide(teacher.label, unreadable, model.chat, model.head_VD.shape[0])
    with pytest.raises(AlignmentError, match=rf"row '{row.id}' .* the teacher cannot read it"):
        broken.of([row])
    short = LiveSide(teacher.label, {row.id: samples[0]}, model.chat, 3)
    with pytest.raises(AlignmentError, match=rf"row '{row.id}' .*the student's head ends at 3"):
        short.of([row])


@pytest.mark.parametrize("frames", [1, 3])
def test_an_equal_student_has_nothing_to_learn_from_pictures(
    source: TeacherSource, model: VisionLanguageModel, new_sample: Callable[..., Sample], frames: int
) -> None:
    """Through labelling and a whole step; with all of the vocabulary kept there are no draws."""
    vocabulary = model.head_VD.shape[0]
    settings = replace(SETTINGS, label=LabelConfig(head=vocabulary, tail_samples=0))
    labels = load_teacher(source.asked_about(settings.visual), identify(source), settings)
    samples = [new_sample(number, turns=2, frames=frames) for number in range(4)]
    rows = RowMaker(model.chat, model.visual_tokens, vocabulary).labelled(samples, label(labels, samples))
    side = LiveSide(labels.label, {sample.id: sample for sample in samples}, model.chat, vocabulary)
    terms = TermsConfig(forward_kl=1.0, visual_kl=1.0, relation=1.0, attention=1.0)
    stage = StageConfig(name="equal", terms=terms, tail="bucket", steps=1, batch_samples=4)
    pictures = PixelPictures(samples, model.pixels, 10**6, 10**6)
    student = VisionLanguageModel.load(source.uri)
    metrics = StageTrainer(student, stage, rows, pictures, seed=0, side=side).train_step()
    for term in ("forward_kl", "visual_kl", "relation", "attention"):
        assert metrics[term] == pytest.approx(0.0, abs=2e-5)
    assert metrics["gradient_norm"] < 1e-3


def test_a_teacher_that_reads_images_cannot_speak_of_a_students_positions(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    source = TeacherSource.hugging_face(HuggingFaceTeacherConfig(kind="hugging_face", path=str(tmp_path)))
    assert source.asked_about(VisualAsk()) == source
    with pytest.raises(CheckpointError, match=r"a llava_onevision model, and '.*' is a llava: use another teacher"):
        source.asked_about(VisualAsk(relation=True))


def test_a_llava_onevision_from_the_hub_is_asked_as_students_are(
    teacher_directory: Path, teacher: Teacher, new_sample: Callable[..., Sample]
) -> None:
    config = HuggingFaceTeacherConfig(kind="hugging_face", path=str(teacher_directory), dtype="float32")
    source = TeacherSource.hugging_face(config).asked_about(SETTINGS.visual)
    assert source.opened_as == "dtype float32, attention eager, pictures clips"
    samples = [new_sample(number, turns=2) for number in range(2)]
    hub = label(load_teacher(source, identify(source), SETTINGS), samples)
    for ours, theirs in zip(hub, label(teacher, samples), strict=True):
        np.testing.assert_array_equal(ours.response_ids_n, theirs.response_ids_n)
        np.testing.assert_allclose(visual_of(ours).attention_LN, visual_of(theirs).attention_LN, atol=1e-5)
