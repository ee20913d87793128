"""LLaVA-KD's comparisons (arXiv 2410.16236): which students of `configs/kd.yaml` are held against which, and what the
paper reports. Data for `pipelines.reproduce`; nothing is computed here."""

from sparsight.evaluate.reproduction import ACCURACY, SIGNAL_BYTES, Comparison, Headline, Study


def _accuracy(key: str, title: str, one: str, other: str, published: str = "not reported") -> Comparison:
    return Comparison(key, title, one, other, ACCURACY, published)


COMPARISONS = (
    # Stages.
    _accuracy(
        "dpt_sft_dft_minus_pt_sft", "DPT-SFT-DFT than PT-SFT", "dpt_sft_dft", "pt_sft", "better, 57.9 to 54.7 (Avg10)"
    ),
    _accuracy(
        "dpt_sft_dft_minus_pt_sft_sft",
        "DPT-SFT-DFT than PT-SFT of as many steps",
        "dpt_sft_dft",
        "pt_sft_sft",
    ),
    _accuracy(
        "few_minus_pt_sft_sft",
        "DPT-SFT-DFT on the answered tenth than PT-SFT of as many steps",
        "few",
        "pt_sft_sft",
    ),
    _accuracy("dpt_sft_minus_pt_sft", "DPT-SFT than PT-SFT", "dpt_sft", "pt_sft", "better, 55.6 to 54.7"),
    _accuracy("pt_sft_dft_minus_pt_sft", "PT-SFT-DFT than PT-SFT", "pt_sft_dft", "pt_sft", "better, 56.6 to 54.7"),
    _accuracy(
        "dpt_sft_dft_minus_pt_sft_dft",
        "DPT-SFT-DFT than PT-SFT-DFT",
        "dpt_sft_dft",
        "pt_sft_dft",
        "better, 57.9 to 56.6",
    ),
    _accuracy(
        "dpt_sft_dft_minus_dpt_dft",
        "DPT-SFT-DFT than DPT-DFT of as many steps",
        "dpt_sft_dft",
        "dpt_dft",
        "better, 57.9 to 55.9",
    ),
    # What is distilled.
    _accuracy(
        "dpt_visual_minus_response",
        "response and visual than response in DPT",
        "dpt_visual_sft",
        "dpt_response_sft",
        "better, 55.1 to 54.9",
    ),
    _accuracy(
        "dpt_relation_minus_visual",
        "all terms than response and visual in DPT",
        "dpt_sft",
        "dpt_visual_sft",
        "better, 55.6 to 55.1",
    ),
    _accuracy(
        "dft_visual_minus_response",
        "response and visual than response in DFT",
        "dft_visual",
        "dft_response",
        "better, 57.7 to 57.2",
    ),
    _accuracy(
        "dft_relation_minus_visual",
        "all terms than response and visual in DFT",
        "dpt_sft_dft",
        "dft_visual",
        "better, 57.9 to 57.7",
    ),
    _accuracy("dft_centred_minus_raw", "centred relations than raw ones", "dft_centred", "dpt_sft_dft"),
    _accuracy("dft_attention_minus_none", "attention term than none", "dft_attention", "dpt_sft_dft"),
    # How the teacher's side is kept.
    _accuracy("unbiased_accuracy_drop", "all logits than unbiased targets", "dft_full", "dpt_sft_dft"),
    _accuracy("unbiased_minus_top_k", "unbiased targets than top-k of equal bytes", "dpt_sft_dft", "dft_top_k"),
    _accuracy("stored_minus_live", "stored signals than the live teacher", "dpt_sft_dft", "dft_live"),
    # Methods.
    _accuracy("combined_minus_mod", "sparsight than LLaVA-MoD", "sparsight", "llava_mod"),
    _accuracy("combined_minus_kd", "sparsight than LLaVA-KD", "sparsight", "dpt_sft_dft"),
    _accuracy(
        "sparsight_minus_experts_alone", "all of the text model than experts alone", "sparsight", "experts_alone"
    ),
    _accuracy(
        "sparsight_minus_mimic_first", "answers first than mimicry of all pictures first", "sparsight", "mimic_first"
    ),
    _accuracy("all_terms_minus_sparsight", "distributions at pictures than none", "all_terms", "sparsight"),
    _accuracy("kd_minus_mod", "LLaVA-KD than LLaVA-MoD", "dpt_sft_dft", "llava_mod", "better, 60.3 to 59.9 (Avg7)"),
)

INTRODUCTION = """\
LLaVA-KD's comparisons at the size of one machine: every seed draws its own pictures, makes its own teacher and labels,
and trains every student of `configs/kd.yaml` from them. PT trains the projector on answers, DPT on the whole loss (CE,
KL at answers, KL at pictures, relations); SFT trains projector and text model on answers, DFT on the whole loss.
Answers are known for one picture in ten: PT and SFT learn from that tenth, DPT and DFT from all pictures but for `few`,
whose stages all stay with the tenth. A text model of a few hundred thousand weights knows no language before, so
every student starts from one that has learned to answer beside a projector that is still random. Students are dense
but for `llava_mod`, `sparsight` and its variants, whose two active experts of four have the dense students'
activated parameters; the methods are compared after as many steps, without preference. Made by `make reproduce-kd`;
the protocol is in docs/protocol.md."""

LLAVA_KD = Study(
    name="llava-kd",
    title="LLaVA-KD, reproduced in kind",
    introduction=INTRODUCTION,
    comparisons=COMPARISONS,
    columns=(
        (ACCURACY, "accuracy", ".3f"),
        ("top1_agreement", "first token as the teacher's", ".3f"),
        ("kl_nats", "KL to teacher, nats", ".3f"),
        ("activated_parameters", "activated", ",.0f"),
        ("total_parameters", "total", ",.0f"),
    ),
    headlines=(
        Headline("accuracy_teacher", "teacher", ACCURACY),
        Headline("unbiased_bytes_per_token", "teacher", SIGNAL_BYTES),
    ),
    plane=("kl_nats", ACCURACY),
    best_of=("combined_minus_best_preset", "sparsight", ("llava_mod", "dpt_sft_dft")),
)
