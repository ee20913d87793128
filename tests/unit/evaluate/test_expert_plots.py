"""Pictures of expert telemetry: readable sizes for few and many layers, and nothing that fails at the edges."""

from collections.abc import Callable
from io import BytesIO

import pytest
from PIL import Image

from sparsight.evaluate.plots import LoadCurves, co_activation, expert_load, load_history

EVEN = LoadCurves([1, 2, 3], [[0.25] * 4] * 3, [1.0] * 3)
COLLAPSED = LoadCurves([1, 2, 3], [[1.0, 0.0, 0.0, 0.0]] * 3, [0.0] * 3)
PAIRS = [[0.0 if i == j else 1 / 6 for j in range(4)] for i in range(4)]
MANY = [[0.0 if i == j else 2 / (16 * 15) for j in range(16)] for i in range(16)]
GROUPS = {"text tokens": [0.4, 0.3, 0.2, 0.1], "answers: yes_no": [1.0, 0.0, 0.0, 0.0]}


@pytest.mark.parametrize(
    ("draw", "least_width", "least_height"),
    [
        (lambda: load_history({1: EVEN}, {"sparse": 0}, "one"), 800, 250),
        (lambda: load_history({0: EVEN, 2: COLLAPSED}, {"sparse": 0, "preference": 2}, "two"), 800, 400),
        (lambda: co_activation({1: PAIRS}, "one"), 800, 300),
        (lambda: co_activation(dict.fromkeys(range(0, 10, 2), MANY), "five"), 800, 500),
        (lambda: expert_load({1: GROUPS}, "one"), 800, 150),
        (lambda: expert_load(dict.fromkeys(range(4), GROUPS), "four"), 800, 300),
    ],
)
def test_pictures_are_large_enough_to_read(draw: Callable[[], bytes], least_width: int, least_height: int) -> None:
    with Image.open(BytesIO(draw())) as picture:
        assert picture.format == "PNG"
        assert picture.width > least_width
        assert picture.height > least_height
        assert len(picture.convert("RGB").getcolors(2**24) or []) > 20
