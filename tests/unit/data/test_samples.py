"""The sample store, in a folder and in a bucket; and cutting long conversations."""

from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsight.data.samples import (
    iter_samples,
    read_samples,
    sample_files,
    write_quarantine,
    write_samples,
)
from sparsight.data.turns import pieces, read_conversation
from sparsight.errors import DataError, StorageError
from sparsight.records import SAMPLE_SCHEMA, SAMPLES_VERSION, Quarantined, Sample, Turn
from sparsight.storage import open_storage
from tests.quarantine import read_quarantine


def some(number: int) -> list[Sample]:
    return [
        Sample(f"row/{index}", (bytes([index]),), (Turn("what?", "yes" if index % 2 else None, "kind"),), "made")
        for index in range(number)
    ]


@pytest.mark.parametrize("number", [0, 1, 4, 5, 8, 11])
def test_samples_come_back_in_order(storage_uri: str, number: int) -> None:
    storage = open_storage(storage_uri)
    assert write_samples(storage, iter(some(number)), rows_per_file=4) == number
    assert read_samples(storage) == some(number)
    assert sample_files(storage) == [f"part-{part:05d}.parquet" for part in range(max(1, -(-number // 4)))]


def test_writing_again_leaves_nothing_of_before(storage_uri: str) -> None:
    storage = open_storage(storage_uri)
    write_samples(storage, some(10), rows_per_file=2)
    write_samples(storage, some(3), rows_per_file=2)
    assert read_samples(storage) == some(3)


def test_equal_samples_give_equal_bytes(tmp_path_factory: pytest.TempPathFactory) -> None:
    files = []
    for name in ("a", "b"):
        storage = open_storage(str(tmp_path_factory.mktemp(name)))
        write_samples(storage, some(5))
        files.append(storage.read_bytes("part-00000.parquet"))
    assert files[0] == files[1]


def test_quarantine_comes_back_and_is_no_sample(storage_uri: str) -> None:
    storage = open_storage(storage_uri)
    rows = [Quarantined("a", "file", "broken"), Quarantined("b", "file", "cut short")]
    write_quarantine(storage, rows)
    assert read_quarantine(storage) == rows
    assert sample_files(storage) == []
    write_quarantine(storage, [])
    assert read_quarantine(storage) == []


def test_damaged_and_foreign_files_are_named(storage_uri: str) -> None:
    storage = open_storage(storage_uri)
    storage.write_bytes("part-00000.parquet", b"PAR1 this is no parquet PAR1")
    with pytest.raises(DataError, match=r"part-00000\.parquet' is damaged"):
        read_samples(storage)

    def write(schema: pa.Schema) -> None:
        buffer = BytesIO()
        pq.write_table(schema.empty_table(), buffer)
        storage.write_bytes("part-00000.parquet", buffer.getvalue())

    write(SAMPLE_SCHEMA.with_metadata({"sparsight.samples": "999"}))
    with pytest.raises(DataError, match=rf"says sparsight\.samples = 999, this version reads {SAMPLES_VERSION}"):
        read_samples(storage)
    write(SAMPLE_SCHEMA.remove_metadata())
    with pytest.raises(DataError, match=r"sparsight\.samples = nothing"):
        list(iter_samples(storage))
    with pytest.raises(StorageError, match="cannot read"):
        read_quarantine(storage)


@pytest.mark.parametrize(("number", "most"), [(0, 3), (1, 3), (3, 3), (4, 3), (9, 8), (17, 8), (7, 1)])
def test_pieces_are_few_bounded_even_and_complete(number: int, most: int) -> None:
    turns = [Turn(str(index), "yes") for index in range(number)]
    cut = pieces(turns, most)
    assert [turn for piece in cut for turn in piece] == turns
    assert len(cut) == -(-number // most)
    lengths = [len(piece) for piece in cut]
    assert all(1 <= length <= most for length in lengths)
    assert not lengths or max(lengths) - min(lengths) <= 1


def test_llava_conversations_are_read() -> None:
    messages = [
        {"from": "human", "value": "<image>\nWhat is it? "},
        {"from": "gpt", "value": " A cat."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    assert read_conversation(messages) == (Turn("What is it?", "A cat."), Turn("Sure?", "Yes."))
    messages[0]["value"] = "What is it?\n<image>"
    assert read_conversation(messages)[0].question == "What is it?"


HUMAN, GPT = {"from": "human", "value": "what?"}, {"from": "gpt", "value": "this"}


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        (None, "not a list of messages"),
        ("text", "not a list of messages"),
        ([], "not a list of messages"),
        ([HUMAN], "1 messages: every question needs an answer"),
        ([GPT, HUMAN], "message 0 of the conversation is not from 'human'"),
        ([HUMAN, HUMAN], "message 1 of the conversation is not from 'gpt'"),
        ([HUMAN, "this"], "message 1"),
        ([HUMAN, {"from": "gpt", "value": 3}], "message 1 of the conversation has no text"),
        ([HUMAN, {"from": "gpt", "value": "  "}], "answer 0 is empty"),
        ([{"from": "human", "value": "<image>"}, GPT], "question 0 is empty"),
        ([{"from": "human", "value": "<image> and <image>?"}, GPT], "more than one <image>"),
    ],
)
def test_other_conversations_are_refused(messages: object, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        read_conversation(messages)
