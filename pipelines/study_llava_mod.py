"""LLaVA-MoD's comparisons (arXiv 2408.15881): which students of `configs/mod.yaml` are held against which, and what the
paper reports. Data for `pipelines.reproduce`; nothing is computed here."""

from sparsight.evaluate.reproduction import (
    ACCURACY,
    CHAIR_OBJECT,
    CHAIR_RECALL,
    CHAIR_RESPONSE,
    Comparison,
    Headline,
    Study,
)

COMPARISONS = (
    Comparison(
        "mimic_minus_sft",
        "mimic on all pictures than SFT on the answered tenth",
        "mimic",
        "sft",
        ACCURACY,
        "not reported",
    ),
    Comparison(
        "mimic_minus_sft_same_pictures",
        "mimic than SFT on the same answered pictures",
        "mimic_few",
        "sft",
        ACCURACY,
        "better, +8.1 % (relative)",
    ),
    Comparison("d2d_d2s_minus_d2s", "D2D then D2S than D2S only", "mimic", "d2s_only", ACCURACY, "better, +4.0 %"),
    Comparison(
        "sparse_minus_dense_activated",
        "sparse than dense of equal activated parameters",
        "mimic",
        "dense_activated",
        ACCURACY,
        "better, +3.7 % (than dense, size not said)",
    ),
    Comparison(
        "sparse_minus_dense_total",
        "sparse than dense of equal total parameters",
        "mimic",
        "dense_total",
        ACCURACY,
        "not reported",
    ),
    Comparison("experts_4_minus_2", "4 experts than 2", "mimic", "experts_2", ACCURACY, "not reported"),
    Comparison("experts_8_minus_4", "8 experts than 4", "experts_8", "mimic", ACCURACY, "worse, 64.6 to 65.1 on MMB"),
    Comparison(
        "chair_response_after_minus_before",
        "after preference than before",
        "preference",
        "mimic",
        CHAIR_RESPONSE,
        "better",
    ),
    Comparison(
        "chair_response_after_minus_teacher",
        "after preference than the teacher",
        "preference",
        "teacher",
        CHAIR_RESPONSE,
        "better, 11.2 to 29.7 on Object HalBench",
    ),
    Comparison(
        "chair_object_after_minus_before",
        "after preference than before",
        "preference",
        "mimic",
        CHAIR_OBJECT,
        "better",
    ),
    Comparison(
        "chair_object_after_minus_teacher",
        "after preference than the teacher",
        "preference",
        "teacher",
        CHAIR_OBJECT,
        "better",
    ),
    Comparison(
        "chair_response_kto_minus_dpo", "KTO-pair than DPO", "preference", "dpo", CHAIR_RESPONSE, "better, 11.4 to 20.0"
    ),
    Comparison(
        "chair_response_teacher_minus_self_reference",
        "teacher as reference than the student's snapshot",
        "preference",
        "self_reference",
        CHAIR_RESPONSE,
        "not reported",
    ),
    Comparison(
        "chair_response_preference_minus_chosen_sft",
        "preference than SFT on the chosen answers",
        "preference",
        "chosen_sft",
        CHAIR_RESPONSE,
        "not reported",
    ),
    Comparison(
        "accuracy_after_minus_before", "after preference than before", "preference", "mimic", ACCURACY, "slightly worse"
    ),
)

_BEFORE_AND_AFTER = {"teacher": "teacher", "before": "mimic", "after": "preference"}

INTRODUCTION = """\
LLaVA-MoD's comparisons at the size of one machine: every seed draws its own pictures, makes its own teacher and labels,
and trains every student of `configs/mod.yaml` from them. Accuracy is over the closed questions of all test sets,
CHAIR over the descriptions of held-out scenes. The column "published" says what the paper reports for its models of
billions of parameters. Four training descriptions in five end with a shape that does not show, as people's do who know
more than the picture; preference pairs are about further pictures, judged by what shows (docs/decisions/0010). `mimic`
learns from the teacher's signals on all training pictures and the answers of one in ten, `sft` and `mimic_few` from
that tenth alone. Made by `make reproduce-mod`; the protocol is in docs/protocol.md."""

LLAVA_MOD = Study(
    name="llava-mod",
    title="LLaVA-MoD, reproduced in kind",
    introduction=INTRODUCTION,
    comparisons=COMPARISONS,
    columns=(
        (ACCURACY, "accuracy", ".3f"),
        (CHAIR_RESPONSE, "CHAIR, responses", ".3f"),
        (CHAIR_OBJECT, "CHAIR, objects", ".3f"),
        (CHAIR_RECALL, "objects named", ".3f"),
        ("pope_adversarial_f1", "POPE adversarial F1", ".3f"),
        ("kl_nats", "KL to teacher, nats", ".3f"),
        ("activated_parameters", "activated", ",.0f"),
        ("total_parameters", "total", ",.0f"),
    ),
    headlines=tuple(
        Headline(f"{metric}_{when}", model, metric)
        for when, model in _BEFORE_AND_AFTER.items()
        for metric in (CHAIR_RESPONSE, CHAIR_OBJECT, CHAIR_RECALL, ACCURACY)
    ),
    plane=(CHAIR_RESPONSE, ACCURACY),
)
