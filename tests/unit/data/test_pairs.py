"""The pair store: pairs come back in one order however they were written; other files are refused."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from sparsight.data.pairs import encode_pairs, iter_pairs, judged_table, pair_rows, read_pairs
from sparsight.data.signals import quarantine_rows
from sparsight.errors import DataError
from sparsight.records import Candidate, PreferencePair, Quarantined
from sparsight.storage import LocalStorage

PAIR = PreferencePair(
    id="b",
    source="scenes",
    content_hash="0f",
    question="what is in the image?",
    chosen="a red circle",
    rejected="a blue square",
    answer_type="caption",
    candidates=(Candidate("a red circle", "teacher", 3, 1.0), Candidate("a blue square", "student", 4, 0.0)),
    judge="truth",
    margin=1.0,
    teacher_chosen_logprob=-2.5,
    teacher_rejected_logprob=-7.25,
    visual_tokens=17,
    answers_hash=bytes(16),
)


def test_pairs_and_refused_rows_part_ways(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    table = judged_table([PAIR, Quarantined("c", "scenes", "all answers alike"), replace(PAIR, id="a")])
    storage.write_bytes("part-1.parquet", encode_pairs(pair_rows(table)))
    assert read_pairs(storage) == [replace(PAIR, id="a"), PAIR]
    assert quarantine_rows(table).to_pylist() == [{"id": "c", "source": "scenes", "reason": "all answers alike"}]


def test_the_order_does_not_depend_on_the_files(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for name, row in (("part-1.parquet", "c"), ("part-2.parquet", "a"), ("quarantine.parquet", "x")):
        storage.write_bytes(name, encode_pairs(pair_rows(judged_table([replace(PAIR, id=row)]))))
    assert [pair.id for pair in read_pairs(storage)] == ["a", "c"]


def test_no_pairs_are_a_file_too(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write_bytes("part-1.parquet", encode_pairs(pair_rows(judged_table([]))))
    assert read_pairs(storage) == []


def test_damaged_files_and_other_versions_are_refused(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write_bytes("part-1.parquet", b"not parquet")
    with pytest.raises(DataError, match=r"part-1\.parquet' is damaged"):
        list(iter_pairs(storage))
    table = pair_rows(judged_table([PAIR])).replace_schema_metadata({"sparsight.pairs": "0"})
    assert isinstance(table, pa.Table)
    storage.write_bytes("part-1.parquet", encode_pairs(table))
    with pytest.raises(DataError, match="pairs version b'0'"):
        list(iter_pairs(storage))
