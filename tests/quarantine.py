"""Reads the rows that a stage could not use, as tests compare them; the program itself only counts them."""

from io import BytesIO

import pyarrow.parquet as pq

from sparsight.data.samples import QUARANTINE
from sparsight.records import QUARANTINE_SCHEMA, Quarantined
from sparsight.storage import Storage


def read_quarantine(storage: Storage) -> list[Quarantined]:
    """The quarantined rows of a sample or signal store, in order."""
    table = pq.read_table(BytesIO(storage.read_bytes(QUARANTINE)))
    assert table.schema.equals(QUARANTINE_SCHEMA, check_metadata=True)
    return [Quarantined(row["id"], row["source"], row["reason"]) for row in table.to_pylist()]
