"""The visual half of the signal store: what a teacher said at each sample's picture, beside its answers.

Files are `visual-<hash>.arrow` in the folder of the signals, one for each of their `part-<hash>.parquet` and with the
same rows, uncompressed, so that training maps them into memory and reads the samples of a step alone (a worker that
reads from a bucket fetches the files once). Numbers are
float16. A relation is stored as the upper triangle of its centred matrix or, where that is smaller, as centred factors
(`records.Relation`); the means that centring takes away stand beside it in float32, so both the raw and the centred
relation come back to float16's precision of the part that varies. Written by labelling, read by distillation.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sparsight.errors import DataError
from sparsight.records import Relation, SparseTargets, TeacherSignal, VisualSignal
from sparsight.stages import VisualAsk
from sparsight.storage import Storage

VISUAL_VERSION = 1
SUFFIX = ".arrow"

_HALVES, _IDS = pa.list_(pa.float16()), pa.list_(pa.int32())
VISUAL_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("visual_tokens", pa.int32()),
        pa.field("visual_head_ids", _IDS),
        pa.field("visual_head_logprobs", _HALVES),
        pa.field("visual_tail_mass", _HALVES),
        pa.field("visual_tail_ids", _IDS),
        pa.field("visual_tail_logprobs", _HALVES),
        pa.field("relation", _HALVES),
        pa.field("relation_width", pa.int32()),
        pa.field("relation_scale", pa.float32()),
        pa.field("relation_means", pa.list_(pa.float32())),
        pa.field("attention", _HALVES),
    ],
    metadata={"sparsight.visual": str(VISUAL_VERSION)},
)
"""`relation_width` is 0 for a triangle, else the width J of factors; `relation_means` are N row means, or J of them."""

VISUAL_FIELDS = [field for field in VISUAL_SCHEMA if field.name not in ("id", "visual_tokens")]


def visual_bytes(ask: VisualAsk, visual_tokens: int, kept: tuple[int, int], width: int, layers: int) -> int:
    """Bytes that one sample's visual signal takes in the store, but for some for its id and for lengths.

    `kept` are exact and drawn tokens a position; `width` and `layers` are the teacher's text model's.
    """
    N, (K, S) = visual_tokens, kept
    targets = N * (6 * (K + S) + 2) if ask.targets else 0
    matrix = is_matrix_smaller(N, width)
    relation = (N * (N + 1) + 4 * N if matrix else 2 * N * width + 4 * width) + 8 if ask.relation else 0
    return targets + relation + (2 * layers * N if ask.attention else 0)


def is_matrix_smaller(N: int, width: int) -> bool:
    """Whether the relation of N positions has fewer numbers as half a matrix than as N vectors of this width."""
    return 2 * width > N


def visual_columns(signals: Sequence[TeacherSignal]) -> dict[str, pa.Array]:
    """The visual columns of signals, null where a signal has none of a kind."""
    rows = [_to_row(signal.visual) for signal in signals]
    return {field.name: pa.array([row.get(field.name) for row in rows], field.type) for field in VISUAL_FIELDS}


def _to_row(visual: VisualSignal | None) -> dict[str, Any]:
    if visual is None:
        return {}
    row: dict[str, Any] = {}
    if visual.targets is not None:
        targets = visual.targets
        row["visual_head_ids"] = targets.head_ids_nK.reshape(-1).astype(np.int32)
        row["visual_head_logprobs"] = targets.head_logprobs_nK.reshape(-1).astype(np.float16)
        row["visual_tail_mass"] = targets.tail_mass_n.astype(np.float16)
        row["visual_tail_ids"] = targets.tail_ids_nS.reshape(-1).astype(np.int32)
        row["visual_tail_logprobs"] = targets.tail_logprobs_nS.reshape(-1).astype(np.float16)
    if visual.relation is not None:
        row |= _relation_row(visual.relation)
    if visual.attention_LN is not None:
        row["attention"] = visual.attention_LN.reshape(-1).astype(np.float16)
    return row


def _relation_row(relation: Relation) -> dict[str, Any]:
    """The values over their largest, so that float16 holds them: a relation's scale has no meaning."""
    if relation.matrix_NN is not None:
        matrix_NN = _unit(relation.matrix_NN)
        means = matrix_NN.sum(axis=1) / max(1, len(matrix_NN))
        centred = _add_means(matrix_NN, -means)[np.triu_indices(len(matrix_NN))]
        width = 0
    else:
        assert relation.factors_NJ is not None
        factors_NJ = _unit(relation.factors_NJ)
        means = factors_NJ.sum(axis=0) / max(1, len(factors_NJ))
        centred, width = (factors_NJ - means).reshape(-1), factors_NJ.shape[1]
    scale = float(np.abs(centred).max(initial=0.0)) or 1.0
    return {
        "relation": (centred / scale).astype(np.float16),
        "relation_width": width,
        "relation_scale": scale,
        "relation_means": means.astype(np.float32),
    }


def _unit(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    exact = values.astype(np.float64)
    return exact / (np.abs(exact).max(initial=0.0) or 1.0)


def _add_means(matrix_NN: npt.NDArray[Any], means_N: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """r_ij + m_i + m_j - mean(m): takes a centred matrix to the one with row means m, and back with -m."""
    return matrix_NN + means_N[:, None] + means_N[None, :] - means_N.sum() / max(1, len(means_N))


def visual_rows(labelled: pa.Table) -> pa.Table:
    """The visual half of a table of results, ordered by id."""
    kept = labelled.filter(pc.field("reason").is_null()).sort_by("id").select(VISUAL_SCHEMA.names)
    return pa.Table.from_arrays([column.combine_chunks() for column in kept.columns], schema=VISUAL_SCHEMA)


def encode_visual(table: pa.Table) -> bytes:
    """An Arrow file of one batch."""
    buffer = BytesIO()
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return buffer.getvalue()


class VisualStore:
    """Reads visual signals by sample id; the files stay on disk, mapped into memory."""

    def __init__(self, storage: Storage) -> None:
        """Raises `DataError` where a file is damaged or of another version."""
        self._uri = storage.uri
        self._tables: list[pa.Table] = []
        self._places: dict[str, tuple[int, int]] = {}
        for key in [key for key in storage.keys("") if key.startswith("visual-") and key.endswith(SUFFIX)]:
            table = _open(storage.fetch(key), f"'{storage.uri}/{key}'")
            self._places |= {row: (len(self._tables), index) for index, row in enumerate(table["id"].to_pylist())}
            self._tables.append(table)

    def __len__(self) -> int:
        return len(self._places)

    def load(self, row: str) -> VisualSignal:
        """The visual signal of one sample. Raises `DataError` if there is none."""
        if row not in self._places:
            raise DataError(f"'{self._uri}' holds no visual signal of row '{row}': label again")
        file, index = self._places[row]
        return _from_row(self._tables[file].slice(index, 1))


def _open(path: Path, where: str) -> pa.Table:
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where} is damaged ({error}): delete it and label again") from error
    found, wanted = (table.schema.metadata or {}).get(b"sparsight.visual"), VISUAL_SCHEMA.metadata[b"sparsight.visual"]
    if found != wanted:
        raise DataError(f"{where} has visual signals version {found!r}, this code reads {wanted!r}: label again")
    return table


def _from_row(table: pa.Table) -> VisualSignal:
    def values(name: str, dtype: Any = np.float32) -> npt.NDArray[Any] | None:
        cell: Any = table[name][0]
        return cell.values.to_numpy(zero_copy_only=False).astype(dtype) if cell.is_valid else None

    N = int(table["visual_tokens"][0].as_py())
    mass_n, attention = values("visual_tail_mass"), values("attention")
    targets = None
    if mass_n is not None:
        parts: Mapping[str, Any] = {
            name: values(f"visual_{name}", np.int32 if name.endswith("ids") else np.float32)
            for name in ("head_ids", "head_logprobs", "tail_ids", "tail_logprobs")
        }
        table_of = {name: part.reshape(N, len(part) // N if N else 0) for name, part in parts.items()}
        targets = SparseTargets(
            table_of["head_ids"], table_of["head_logprobs"], mass_n, table_of["tail_ids"], table_of["tail_logprobs"]
        )
    attention_LN = None if attention is None else attention.reshape(len(attention) // N if N else 0, N)
    return VisualSignal(targets, _relation_of(table, values("relation"), values("relation_means"), N), attention_LN)


def _relation_of(
    table: pa.Table, stored: npt.NDArray[np.float32] | None, means: npt.NDArray[np.float32] | None, N: int
) -> Relation | None:
    if stored is None or means is None:
        return None
    stored = stored * np.float32(table["relation_scale"][0].as_py())
    width = int(table["relation_width"][0].as_py())
    if width:
        return Relation(factors_NJ=stored.reshape(N, width) + means)
    upper_NN = np.zeros((N, N), np.float32)
    upper_NN[np.triu_indices(N)] = stored
    return Relation(matrix_NN=_add_means(upper_NN + np.triu(upper_NN, 1).T, means))
