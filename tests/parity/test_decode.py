"""Batched decoding and the wrapper's partial forwards against plain full forwards of the stock model."""

import pytest
import torch

from sparsight.config import ArchitectureConfig, UpcycleConfig
from sparsight.model.decode import BatchDecoder
from sparsight.model.parameters import activated_parameters, group_of, set_trainable, total_parameters
from sparsight.model.routing import expert_load, routers, trace_routers
from sparsight.model.sampling import SamplingSettings
from sparsight.model.tiny import make_dense, make_tokenizer
from sparsight.model.upcycle import upcycle
from sparsight.model.vision_language import VisionLanguageModel

SMALL = ArchitectureConfig(
    tower_layers=1,
    tower_width=32,
    tower_heads=1,
    text_layers=2,
    text_width=64,
    text_heads=2,
    text_key_value_heads=1,
    text_intermediate=96,
)
ROWS = [[3, 50, 60, 70, 80], [3, 90, 70], [3, 44, 45, 46]]


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    tokenizer = make_tokenizer(["what shape is in the image?", "is there a red circle?"] * 20, 400)
    return make_dense(SMALL, tokenizer, seed=0)


def next_logits(model: VisionLanguageModel, row: list[int]) -> torch.Tensor:
    """What the unmodified stock model says follows one row alone."""
    with torch.no_grad():
        return model.model(input_ids=torch.tensor([row])).logits[0, -1]


def test_hidden_and_head_equal_the_stock_forward_with_pictures(model: VisionLanguageModel) -> None:
    pixels_NCHW = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    visual = [model.chat.visual_id] * model.visual_tokens()
    input_ids_BT, mask_BT = model.pad([[3, *visual, 50, 60], [3, *visual, 70]])
    with torch.no_grad():
        features_NPD = model.features(pixels_NCHW)
        visual_ND = model.clip_embeds(features_NPD[:, None]).flatten(0, 1)
        ours_BTV = model.hidden(input_ids_BT, mask_BT, visual_ND) @ model.head_VD.T
        stock_BTV = model.model(
            input_ids=input_ids_BT, attention_mask=mask_BT, pixel_values_videos=pixels_NCHW[:, None]
        ).logits
    torch.testing.assert_close(ours_BTV[mask_BT.bool()], stock_BTV[mask_BT.bool()], atol=1e-5, rtol=1e-5)


def test_fed_rows_of_different_lengths_equal_single_forwards(model: VisionLanguageModel) -> None:
    decoder = BatchDecoder(model, len(ROWS))
    decoder.feed(ROWS)
    expected_BV = torch.stack([next_logits(model, row) for row in ROWS])
    expected_BV[:, model.chat.visual_id] = -torch.inf
    torch.testing.assert_close(decoder.logits_BV, expected_BV, atol=1e-5, rtol=1e-5)


def test_greedy_decoding_over_two_turns_equals_repeated_full_forwards(model: VisionLanguageModel) -> None:
    decoder = BatchDecoder(model, len(ROWS))
    decoder.feed(ROWS)
    first = decoder.decode([3, 1, 2], feed_end=True)
    decoder.feed([[51], [52, 53, 54], []])
    second = decoder.decode([2, 3, 0])
    for row, one, more, two in zip(ROWS, first, [[51], [52, 53, 54], []], second, strict=True):
        assert one == greedy(model, row, len(one))
        assert two == greedy(model, row + one + more, len(two))
    assert [len(ids) for ids in first] == [3, 1, 2]
    assert [len(ids) for ids in second] == [2, 3, 0]


def greedy(model: VisionLanguageModel, row: list[int], count: int) -> list[int]:
    written: list[int] = []
    for _ in range(count):
        written.append(int(next_logits(model, row + written).argmax()))
    return written


def test_sampling_is_repeatable_by_seed_and_near_zero_temperature_is_greedy(model: VisionLanguageModel) -> None:
    def sample(setting: SamplingSettings) -> list[list[int]]:
        decoder = BatchDecoder(model, len(ROWS))
        decoder.feed(ROWS)
        return decoder.decode([6] * len(ROWS), [setting] * len(ROWS))

    hot = SamplingSettings(temperature=1.0, seed=7)
    assert sample(hot) == sample(hot)
    assert sample(hot) != sample(SamplingSettings(temperature=1.0, seed=8))
    assert sample(SamplingSettings(temperature=1e-4, seed=1)) == sample(SamplingSettings())
    assert sample(SamplingSettings(temperature=1.0, top_p=1e-6, seed=1)) == sample(SamplingSettings())


def test_repeated_rows_go_on_as_rows_fed_alone(model: VisionLanguageModel) -> None:
    settings = [SamplingSettings(1.0, 0.9, seed) for seed in range(len(ROWS) * 3)]
    decoder = BatchDecoder(model, len(ROWS))
    decoder.feed(ROWS)
    decoder.repeat(3)
    together = decoder.decode([6] * 9, settings)
    for place, setting in enumerate(settings):
        alone = BatchDecoder(model, 1)
        alone.feed([ROWS[place // 3]])
        assert alone.decode([6], [setting]) == [together[place]]
    assert len({tuple(ids) for ids in together}) > 3


def test_a_picture_is_never_written(model: VisionLanguageModel) -> None:
    """Even where the placeholder would be the most probable token by far."""
    with torch.no_grad():
        before_D = model.head_VD[model.chat.visual_id].clone()
        decoder = BatchDecoder(model, len(ROWS))
        decoder.feed(ROWS)
        usual = decoder.decode([4] * len(ROWS))
        model.head_VD[model.chat.visual_id] = 100.0 * model.head_VD[usual[0][0]]
        decoder = BatchDecoder(model, len(ROWS))
        decoder.feed(ROWS)
        assert decoder.decode([4] * len(ROWS)) == usual
        model.head_VD[model.chat.visual_id] = before_D


def test_activated_parameters_leave_out_idle_experts(model: VisionLanguageModel) -> None:
    sparse = upcycle(model, UpcycleConfig(experts=4, active_experts=2, layers="all"), seed=1)
    one_expert = 3 * SMALL.text_width * SMALL.text_intermediate
    assert activated_parameters(model) == total_parameters(model)
    assert total_parameters(sparse) - activated_parameters(sparse) == 2 * 2 * one_expert
    assert total_parameters(sparse) - total_parameters(model) == 2 * (3 * one_expert + 4 * SMALL.text_width)


def test_trainable_groups_cover_every_weight_that_can_learn_once(model: VisionLanguageModel) -> None:
    groups = ["tower", "projector", "embeddings", "attention", "experts", "routers"]
    counts = {group: sum(p.numel() for p in set_trainable(model, [group])) for group in groups}
    after_features = sum(p.numel() for p in model.model.model.vision_tower.post_layernorm.parameters())
    assert sum(counts.values()) == total_parameters(model) - after_features
    assert counts["experts"] == 2 * 3 * SMALL.text_width * SMALL.text_intermediate
    assert counts["routers"] == 0
    assert group_of("model.image_newline") == "projector"


def test_router_traces_and_load(model: VisionLanguageModel) -> None:
    sparse = upcycle(model, UpcycleConfig(layers=[1]), seed=1)
    assert list(routers(sparse)) == [1]
    input_ids_BT, mask_BT = sparse.pad(ROWS)
    with torch.no_grad(), trace_routers(sparse) as trace:
        sparse.hidden(input_ids_BT, mask_BT, None)
    assert trace.logits[1].shape == (input_ids_BT.numel(), 4)
    assert trace.chosen[1].shape == (input_ids_BT.numel(), 2)
    load_E = expert_load(torch.tensor([[0, 1], [0, 2], [3, 3]]), 4, torch.tensor([1, 1, 0]))
    assert load_E.tolist() == [0.5, 0.25, 0.25, 0.0]
