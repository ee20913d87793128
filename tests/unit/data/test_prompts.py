"""Single questions: which stand on their own, and that tables and stores tell the same."""

from pathlib import Path

import pyarrow as pa
import pytest

from sparsight.data.prompts import Prompt, apart, iter_prompts, prompt_table
from sparsight.data.samples import write_samples
from sparsight.errors import DataError
from sparsight.records import SAMPLE_SCHEMA, Sample, Turn
from sparsight.storage import LocalStorage

TURNS = (Turn("what is it?", "a circle", "shape"), Turn("what colour?", None, "colour"))
INDEPENDENT = Sample("a", (b"one",), TURNS, "scenes", independent=True)
CONVERSATION = Sample("b", (b"two", b"three"), TURNS, "llava", (0.0, 1.0))
TEXT = Sample("d", (), TURNS, "llava", ())
SILENT = Sample("c", (b"four",), (), "llava")


def test_only_questions_that_stand_on_their_own_are_asked() -> None:
    assert apart(INDEPENDENT) == [
        Sample("a#0", (b"one",), TURNS[:1], "scenes"),
        Sample("a#1", (b"one",), TURNS[1:], "scenes"),
    ]
    assert apart(CONVERSATION) == [Sample("b#0", (b"two", b"three"), TURNS[:1], "llava", (0.0, 1.0))]
    assert apart(TEXT) == [Sample("d#0", (), TURNS[:1], "llava", ())]
    assert apart(SILENT) == []


def test_tables_and_stores_tell_the_same(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    samples = [INDEPENDENT, CONVERSATION, SILENT, TEXT]
    write_samples(storage, samples, rows_per_file=2)
    table = prompt_table(pa.Table.from_pylist([sample.to_row() for sample in samples], schema=SAMPLE_SCHEMA))
    prompts = [Sample.from_row(row) for row in table.to_pylist()]
    assert prompts == [prompt for sample in samples for prompt in apart(sample)]
    assert list(iter_prompts(storage)) == [
        Prompt(prompt.id, prompt.content_hash, prompt.turns[0].answer_type, prompt.has_ground_truth)
        for prompt in prompts
    ]


def test_an_id_that_comes_twice_is_refused(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    write_samples(storage, [INDEPENDENT, INDEPENDENT])
    with pytest.raises(DataError, match="'a' comes twice"):
        list(iter_prompts(storage))
