"""What a teacher says about pictures, against the whole logits and attention of the stock forward."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsight.config import LabelConfig
from sparsight.data.signals import labelled_table
from sparsight.data.visual_signals import VisualStore, encode_visual, visual_rows
from sparsight.distill.rows import RowMaker
from sparsight.distill.taught import LiveSide, StoredSide, TaughtRow
from sparsight.errors import AlignmentError
from sparsight.media.images import decode
from sparsight.media.pixels import to_pixels
from sparsight.model.vision_language import VisionLanguageModel
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
    return load_teacher(source, identify(source), SETTINGS)


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
    teacher: Teacher, new_sample: Callable[..., Sample]
) -> None:
    sample = replace(new_sample(1, turns=3), independent=True)
    alone = [replace(sample, turns=(turn,)) for turn in sample.turns]
    packed, *apart = (visual_of(signal) for signal in label(teacher, [sample, *alone]))
    assert packed.relation is not None
    assert apart[0].relation is not None
    np.testing.assert_allclose(packed.relation.to_matrix(), apart[0].relation.to_matrix(), rtol=1e-4, atol=1e-3)
    weights = [part.text_positions for part in apart]
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
    return stored, LiveSide(teacher.label, by_id, model.chat).of(bare)


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
    side = LiveSide(teacher.label, {row.id: samples[0]}, model.chat)
    with pytest.raises(AlignmentError, match=rf"row '{row.id}' .* cuts its answers into other tokens"):
        side.of([other])
    broken = LiveSide(teacher.label, {row.id: replace(samples[0], frames=(b"no picture",))}, model.chat)
    with pytest.raises(AlignmentError, match=rf"row '{row.id}' .* the teacher cannot read it"):
        broken.of([row])
