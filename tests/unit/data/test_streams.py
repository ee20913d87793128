"""The streams' store: what is written is read again, and a damaged file is refused."""

import pytest

from sparsight.config import StreamsSource
from sparsight.data.stream_questions import long_streams
from sparsight.data.streams import STREAMS, iter_streams, write_streams
from sparsight.errors import DataError
from sparsight.storage import open_storage

SOURCE = StreamsSource(kind="streams", streams=3, lengths_s=[30.0, 60.0])


def test_streams_come_back_as_they_were(storage_uri: str) -> None:
    storage = open_storage(storage_uri)
    streams = list(long_streams(SOURCE, "test", 0))
    write_streams(storage, streams)
    assert list(iter_streams(storage)) == streams
    write_streams(storage, [])
    assert list(iter_streams(storage)) == []


def test_a_damaged_file_is_refused(storage_uri: str) -> None:
    storage = open_storage(storage_uri)
    write_streams(storage, long_streams(SOURCE, "test", 0))
    storage.write_bytes(STREAMS, storage.read_bytes(STREAMS)[:-20])
    with pytest.raises(DataError, match=r"streams\.parquet' is damaged"):
        list(iter_streams(storage))
