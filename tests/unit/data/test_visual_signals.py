"""Visual signals come back from their files as they went in, to float16, and take the bytes that were announced."""

from pathlib import Path

import numpy as np
import pytest

from sparsight.data.signals import labelled_table
from sparsight.data.visual_signals import VisualStore, encode_visual, is_matrix_smaller, visual_bytes, visual_rows
from sparsight.errors import DataError
from sparsight.records import Quarantined, Relation, SparseTargets, TeacherSignal, VisualSignal
from sparsight.stages import VisualAsk
from sparsight.storage import LocalStorage, open_storage

EVERYTHING = VisualAsk(True, True, True)
K, S, LAYERS = 5, 3, 4


def random_visual(N: int, width: int, seed: int, ask: VisualAsk = EVERYTHING) -> VisualSignal:
    random = np.random.default_rng(seed)
    targets = SparseTargets(
        random.integers(0, 70_000, (N, K), dtype=np.int32),
        np.sort(-random.random((N, K), dtype=np.float32))[:, ::-1],
        random.random(N, dtype=np.float32),
        random.integers(-1, 70_000, (N, S), dtype=np.int32),
        -random.random((N, S), dtype=np.float32),
    )
    logits_NJ = random.normal(3.0, 1.0, (N, width)).astype(np.float32) * 1e3  # larger than float16 holds, once squared
    if is_matrix_smaller(N, width):
        relation = Relation(matrix_NN=logits_NJ @ logits_NJ.T)
    else:
        relation = Relation(factors_NJ=logits_NJ)
    attention_LN = random.random((LAYERS, N), dtype=np.float32)
    return VisualSignal(
        targets if ask.targets else None,
        relation if ask.relation else None,
        attention_LN if ask.attention else None,
    )


def signal(row: str, visual: VisualSignal, N: int) -> TeacherSignal:
    ids = np.arange(2, dtype=np.int32)
    head = np.zeros((2, 1), np.float32)
    targets = SparseTargets(ids[:, None], head, np.zeros(2, np.float32), ids[:, None], head)
    return TeacherSignal(row, "hash", ids, (2,), (False,), head[:, 0], targets, N, visual=visual)


def store(uri: str, results: list[TeacherSignal | Quarantined]) -> VisualStore:
    storage = open_storage(uri)
    storage.write_bytes("visual-one.arrow", encode_visual(visual_rows(labelled_table(results))))
    return VisualStore(storage)


@pytest.mark.parametrize(("N", "width"), [(17, 64), (17, 8), (1, 64), (0, 64)])
def test_a_row_comes_back_to_half_precision(storage_uri: str, N: int, width: int) -> None:
    visual = random_visual(N, width, seed=N)
    other = signal("a", random_visual(9, 64, 5), 9)
    found = store(storage_uri, [signal("b", visual, N), other, Quarantined("c", "s", "why")])
    assert len(found) == 2
    back = found.load("b")
    assert visual.targets is not None
    assert back.targets is not None
    for name in ("head_ids_nK", "tail_ids_nS"):
        if N:
            np.testing.assert_array_equal(getattr(back.targets, name), getattr(visual.targets, name))
    np.testing.assert_allclose(back.targets.tail_mass_n, visual.targets.tail_mass_n, atol=1e-3)
    assert back.attention_LN is not None
    assert visual.attention_LN is not None
    if N:
        np.testing.assert_allclose(back.attention_LN, visual.attention_LN, atol=1e-3)
    assert back.relation is not None
    assert visual.relation is not None
    ours, theirs = back.relation.to_matrix(), visual.relation.to_matrix()
    assert ours.shape == (N, N)
    for change in (lambda matrix: matrix, centre):
        scaled = [change(matrix) / (np.linalg.norm(change(matrix)) or 1.0) for matrix in (ours, theirs)]
        np.testing.assert_allclose(*scaled, atol=2e-3 / max(1, N))


def centre(matrix_NN: np.ndarray) -> np.ndarray:
    N = len(matrix_NN)
    C = np.eye(N) - 1 / max(1, N)
    return C @ matrix_NN.astype(np.float64) @ C


def test_what_nobody_asked_for_is_none(tmp_path: Path) -> None:
    visual = random_visual(6, 64, seed=1, ask=VisualAsk(targets=True))
    back = store(str(tmp_path), [signal("a", visual, 6)]).load("a")
    assert back.targets is not None
    assert back.relation is None
    assert back.attention_LN is None


@pytest.mark.parametrize(("N", "width"), [(17, 128), (100, 32)])
@pytest.mark.parametrize("ask", [EVERYTHING, VisualAsk(targets=True), VisualAsk(relation=True)])
def test_files_take_the_bytes_that_were_announced(N: int, width: int, ask: VisualAsk) -> None:
    rows = [signal(f"row-{index}", random_visual(N, width, index, ask), N) for index in range(200)]
    measured = len(encode_visual(visual_rows(labelled_table(rows)))) / len(rows)
    announced = visual_bytes(ask, N, (K, S), width, LAYERS)
    assert announced <= measured < announced + 150


def test_an_unknown_row_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    found = store(str(tmp_path), [signal("a", random_visual(4, 64, 0), 4)])
    with pytest.raises(DataError, match=r"no visual signal of row 'b': label again"):
        found.load("b")
    path = tmp_path / "visual-one.arrow"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"visual-one\.arrow' is damaged"):
        VisualStore(LocalStorage(tmp_path))
