"""Which layers are compared, by hand, and what a row without a picture has."""

import numpy as np
import pytest
import torch

from sparsight.model.visual_attention import layer_groups, middle_layers, text_positions, visual_attention


@pytest.mark.parametrize(
    ("layers", "middle"), [(1, [0]), (2, [0, 1]), (4, [1, 2]), (10, [3, 4, 5, 6]), (24, list(range(7, 17)))]
)
def test_the_middle_is_30_to_70_percent_of_the_depth(layers: int, middle: list[int]) -> None:
    assert middle_layers(layers) == middle


@pytest.mark.parametrize(
    ("student", "teacher", "groups"),
    [
        (4, 4, [(1, [1]), (2, [2])]),
        (2, 4, [(0, [1]), (1, [2])]),
        (4, 10, [(1, [3, 4, 5]), (2, [4, 5, 6])]),
        (10, 4, [(3, [1]), (4, [1]), (5, [2]), (6, [2])]),
        (1, 1, [(0, [0])]),
    ],
)
def test_a_student_layer_slides_along_the_teachers(
    student: int, teacher: int, groups: list[tuple[int, list[int]]]
) -> None:
    assert layer_groups(student, teacher) == groups


def test_text_before_the_picture_cannot_see_it_and_is_left_out() -> None:
    ids_T = np.array([5, 9, 9, 6, 7, 9, 8])
    assert text_positions(ids_T, 9).tolist() == [3, 4, 6]
    assert text_positions(np.array([5, 6]), 9).tolist() == []


def test_attention_is_a_mean_over_heads_and_text() -> None:
    attention_BHTT = torch.arange(2 * 2 * 4 * 4, dtype=torch.float32).reshape(2, 2, 4, 4)
    found_LN = visual_attention([attention_BHTT, 2 * attention_BHTT], 1, np.array([2, 3]), np.array([0, 1]))
    wanted_N = sum(attention_BHTT[1, head, text, :2] for head in range(2) for text in (2, 3)) / 4
    torch.testing.assert_close(found_LN, torch.stack([wanted_N, 2 * wanted_N]))
    assert visual_attention([attention_BHTT], 0, np.zeros(0, int), np.zeros(0, int)).shape == (1, 0)
