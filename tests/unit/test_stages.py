"""Stages and presets: what contradicts itself is refused by name, what is laid over a preset lands where it should."""

from typing import Any

import pytest
from pydantic import ValidationError

from sparsight.artifacts import digest
from sparsight.presets import PRESETS
from sparsight.stages import StageConfig, StudentRun, visual_ask

PAIRS: dict[str, Any] = {
    "name": "preference",
    "rows": "pairs",
    "terms": {"preference": 1.0},
    "preference": {},
    "steps": 3,
}
MIMIC: dict[str, Any] = {"name": "mimic", "terms": {"forward_kl": 1.0}, "steps": 3}


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({**PAIRS, "rows": "all"}, r"terms\.preference learns from pairs of answers: set rows: pairs"),
        ({**PAIRS, "preference": None}, r"give preference: \{loss: kto_pair\}"),
        ({**PAIRS, "terms": {"preference": 1.0, "forward_kl": 1.0}}, "no teacher targets"),
        ({**PAIRS, "terms": {"preference": 1.0, "retrieval": 1.0}}, r"pairs do not say .* leave terms\.retrieval out"),
        ({**MIMIC, "preference": {}}, "preference settings are for rows: pairs"),
        ({**PAIRS, "preference": {"label_smoothing": 0.1}}, "label_smoothing is a setting of the loss 'dpo'"),
        ({**PAIRS, "preference": {"beta": 0.0}}, "greater than 0"),
        ({**PAIRS, "preference": {"loss": "dpo", "label_smoothing": 0.5}}, "less than 0.5"),
    ],
)
def test_contradicting_preference_settings_are_named(stage: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StageConfig.model_validate(stage)


def test_settings_of_preference_count_only_where_they_are_used() -> None:
    written = StageConfig.model_validate(MIMIC).model_dump(mode="json")
    assert "preference" not in written
    assert "preference" not in written["terms"]
    stage = StageConfig.model_validate(PAIRS)
    assert stage.model_dump(mode="json")["preference"]["loss"] == "kto_pair"
    assert StageConfig.model_validate(stage.model_dump()) == stage
    assert digest(stage) != digest(stage.model_copy(update={"terms": stage.terms.model_copy(update={"preference": 2})}))


def test_pairs_may_be_for_their_chosen_answers_alone() -> None:
    stage = StageConfig.model_validate({**PAIRS, "terms": {"cross_entropy": 1.0}})
    assert (stage.terms.preference, stage.terms.cross_entropy) == (0.0, 1.0)


@pytest.mark.parametrize("stages", [[PAIRS], [MIMIC, PAIRS, {**PAIRS, "name": "again"}]])
def test_pairs_need_a_student_that_answers_and_are_made_once(stages: list[dict[str, Any]]) -> None:
    with pytest.raises(ValidationError, match="one stage with rows: pairs, and not the first"):
        StudentRun.model_validate({"name": "student", "stages": stages})


def test_two_stages_of_one_name_are_refused() -> None:
    with pytest.raises(ValidationError, match="stage names are not unique"):
        StudentRun.model_validate({"name": "student", "stages": [MIMIC, MIMIC]})


def test_llava_mod_is_the_papers_four_stages() -> None:
    stages = StudentRun.model_validate({"name": "student", "preset": "llava_mod"}).stages
    adaptor, d2d, d2s, preference = stages
    assert [stage.name for stage in stages] == ["adaptor", "d2d", "d2s", "preference"]
    assert [stage.learning_rate for stage in stages] == [1e-3, 2e-5, 2e-5, 2e-6]
    assert [stage.batch_samples for stage in stages] == [512, 256, 256, 256]
    assert {stage.epochs for stage in stages} == {1.0}
    assert {(stage.warmup_fraction, stage.weight_decay, stage.betas) for stage in stages} == {(0.03, 0.0, (0.9, 0.98))}
    assert (adaptor.trainable, adaptor.terms.cross_entropy, adaptor.terms.forward_kl) == (["projector"], 1.0, 0.0)
    assert (set(d2d.trainable), d2d.terms.cross_entropy, d2d.terms.forward_kl) == ({"projector", "text"}, 0.0, 1.0)
    assert d2d.upcycle is None
    assert d2s.upcycle is not None
    assert (d2s.upcycle.experts, d2s.upcycle.active_experts, d2s.upcycle.layers) == (4, 2, "every_second")
    assert set(d2s.trainable) == set(preference.trainable) == {"projector", "experts", "routers"}
    assert (d2s.terms.forward_kl, d2s.terms.cross_entropy, d2s.terms.balance) == (1.0, 1.0, 0.01)
    assert preference.rows == "pairs"
    assert (preference.terms.preference, preference.terms.cross_entropy, preference.terms.balance) == (1.0, 0.0, 0.01)
    assert preference.preference is not None
    assert (preference.preference.loss, preference.preference.reference) == ("kto_pair", "teacher")


WHOLE_LOSS = {"cross_entropy": 1.0, "forward_kl": 1.0, "visual_kl": 1.0, "relation": 0.5}


def weights_of(stage: StageConfig) -> dict[str, float]:
    return {name: weight for name, weight in stage.terms.model_dump().items() if weight}


def test_llava_kd_is_the_papers_three_stages() -> None:
    dpt, sft, dft = StudentRun.model_validate({"name": "student", "preset": "llava_kd"}).stages
    assert [stage.name for stage in (dpt, sft, dft)] == ["dpt", "sft", "dft"]
    assert [stage.learning_rate for stage in (dpt, sft, dft)] == [1e-3, 2e-5, 2e-5]
    assert [stage.batch_samples for stage in (dpt, sft, dft)] == [256, 128, 128]
    assert {stage.epochs for stage in (dpt, sft, dft)} == {1.0}
    assert dpt.trainable == ["projector"]
    assert set(sft.trainable) == set(dft.trainable) == {"projector", "text"}
    assert weights_of(dpt) == weights_of(dft) == WHOLE_LOSS
    assert weights_of(sft) == {"cross_entropy": 1.0}
    assert {(stage.teacher, stage.relation_centred, stage.upcycle) for stage in (dpt, sft, dft)} == {
        ("stored", False, None)
    }


def test_sparsight_is_llava_kds_stages_on_llava_mods_student() -> None:
    mod, kd, both = (
        StudentRun.model_validate({"name": "student", "preset": preset}).stages
        for preset in ("llava_mod", "llava_kd", "sparsight")
    )
    assert [stage.name for stage in both] == ["dpt", "sft", "d2s", "preference"]
    assert both[0] == kd[0]
    assert both[3] == mod[3]
    assert weights_of(both[1]) == weights_of(kd[1]) | {"forward_kl": 1.0}
    assert both[1].trainable == kd[1].trainable
    assert both[2].upcycle == mod[2].upcycle
    assert both[2].trainable == kd[2].trainable
    assert weights_of(both[2]) == weights_of(mod[2]) | {"relation": 0.5}


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({**PAIRS, "terms": {"preference": 1.0, "relation": 0.5}}, "no teacher targets for forward_kl and visual"),
        ({**MIMIC, "relation_centred": True}, r"relation_centred is a setting of terms\.relation"),
        ({**MIMIC, "teacher": "live", "terms": {"cross_entropy": 1.0}}, "teacher: live is for terms that compare"),
        ({**MIMIC, "live_head": 4}, "live_head and live_tail_samples are settings of teacher: live"),
        ({**MIMIC, "terms": {"balance": 0.1}}, "a stage needs a term to learn from"),
    ],
)
def test_contradicting_settings_of_the_teachers_side_are_named(stage: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StageConfig.model_validate(stage)


def test_stages_without_visual_terms_keep_their_fingerprints() -> None:
    written = StageConfig.model_validate(MIMIC).model_dump(mode="json")
    assert not {"teacher", "live_head", "live_tail_samples", "relation_centred"} & written.keys()
    assert not {"visual_kl", "relation", "attention"} & written["terms"].keys()


def test_what_is_asked_about_pictures_is_what_some_stage_compares() -> None:
    stages = [StageConfig.model_validate({**MIMIC, "terms": {term: 1.0}}) for term in ("forward_kl", "relation")]
    assert visual_ask(stages[:1]) == (False, False, False)
    assert visual_ask(stages) == (False, True, False)
    attention = StageConfig.model_validate({**MIMIC, "terms": {"attention": 1.0, "visual_kl": 1.0}})
    assert visual_ask([*stages, attention]) == (True, True, True)


def test_settings_are_laid_over_the_stages_they_name() -> None:
    overlays = [
        {"name": "preference", "preference": {"loss": "dpo"}, "terms": {"cross_entropy": 0.1}},
        {"name": "d2s", "steps": 7, "batch_samples": 8, "upcycle": {"experts": 8}, "trainable": ["text"]},
    ]
    stages = StudentRun.model_validate({"name": "student", "preset": "llava_mod", "stages": overlays}).stages
    plain = StudentRun.model_validate({"name": "student", "preset": "llava_mod"}).stages
    assert stages[:2] == plain[:2]
    d2s, preference = stages[2:]
    assert (d2s.epochs, d2s.steps, d2s.batch_samples, d2s.trainable) == (None, 7, 8, ["text"])
    assert d2s.upcycle is not None
    assert (d2s.upcycle.experts, d2s.upcycle.active_experts) == (8, 2)
    assert d2s.learning_rate == plain[2].learning_rate
    assert preference.preference is not None
    assert (preference.preference.loss, preference.preference.beta) == ("dpo", 0.1)
    assert (preference.terms.preference, preference.terms.cross_entropy) == (1.0, 0.1)


def test_a_preset_that_was_written_out_reads_back_as_it_was() -> None:
    overlays = [{"name": "adaptor", "steps": 7}, {"name": "preference", "preference": {"reference": "student"}}]
    student = StudentRun.model_validate({"name": "student", "preset": "llava_mod", "stages": overlays})
    assert StudentRun.model_validate(student.model_dump(mode="json")) == student


@pytest.mark.parametrize(
    ("overlays", "message"),
    [
        ([{"name": "warmup"}], "has the stages adaptor, d2d, d2s, preference, but the settings are for 'warmup'"),
        ([{"steps": 3}], "are for 'None'"),
        (["d2s"], "are for 'None'"),
        ([{"name": "d2s"}, {"name": "d2s"}], "stage 'd2s' of preset 'llava_mod' is given twice"),
        ([{"name": "d2s", "surprise": 1}], "Extra inputs"),
    ],
)
def test_settings_for_no_stage_of_the_preset_are_refused(overlays: list[Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StudentRun.model_validate({"name": "student", "preset": "llava_mod", "stages": overlays})


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValidationError, match="'llava_mod'"):
        StudentRun.model_validate({"name": "student", "preset": "llava_dom", "stages": [MIMIC]})


def test_presets_are_not_changed_by_use() -> None:
    before = digest(PRESETS)
    StudentRun.model_validate(
        {"name": "student", "preset": "llava_mod", "stages": [{"name": "d2s", "terms": {"balance": 0.5}}]}
    )
    assert digest(PRESETS) == before
