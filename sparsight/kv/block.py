"""One frame's memory: the keys and values that every layer of the text model computed for its tokens.

A block is a value: it is made once by an encoder, never written again, and means the same in any process. Keys are
stored before rotation, so a reader may place the block at any position. It knows nothing of banks, models or questions.
Made by `encoder`, kept by `bank`, read by `answerer`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sparsight.errors import StreamError
from sparsight.kv.page import Encoding, PageFormat

SINK_NUMBER = -1
"""The number of the block that holds the system prompt; frames count from 0."""

DIGEST_BYTES = 16


class BlockHead(NamedTuple):
    """What the next block of a stream is compared with."""

    number: int
    start_s: float
    format: PageFormat
    digest: str


@dataclass(frozen=True, eq=False)
class KvBlock:
    """Keys and values of `S` consecutive tokens in all `L` layers, as one contiguous page in main memory.

    `rows_LU` are the page's bytes in `format`: one layer is one run of bytes. `mean_keys_LGC` (float32) is the
    retrieval index: the mean key over the tokens, for each key/value head, taken before the page was quantised. Times
    are seconds from the start of the stream. `digest` names the content: equal rows and mean keys, equal digest.
    """

    number: int
    start_s: float
    end_s: float
    format: PageFormat
    rows_LU: Tensor
    mean_keys_LGC: Tensor
    digest: str

    @classmethod
    def from_page(
        cls, number: int, start_s: float, end_s: float, page_L2GSC: Tensor, encoding: Encoding = "plain"
    ) -> "KvBlock":
        """The block of a page that its maker gives up: the page is indexed, encoded, moved to main memory, hashed."""
        page_L2GSC = page_L2GSC.detach()
        L, _, G, S, C = page_L2GSC.shape
        page_format = PageFormat(encoding, page_L2GSC.dtype, L, G, S, C)
        mean_keys_LGC = page_L2GSC[:, 0].float().mean(dim=2).cpu()
        return cls.of_rows(number, start_s, end_s, page_format, page_format.pack(page_L2GSC).cpu(), mean_keys_LGC)

    @classmethod
    def of_rows(
        cls,
        number: int,
        start_s: float,
        end_s: float,
        page_format: PageFormat,
        rows_LU: Tensor,
        mean_keys_LGC: Tensor,
    ) -> "KvBlock":
        """The block of rows that are encoded already."""
        digest = block_digest(row_digests(rows_LU), mean_keys_LGC)
        return cls(number, start_s, end_s, page_format, rows_LU, mean_keys_LGC, digest)

    @property
    def head(self) -> BlockHead:
        return BlockHead(self.number, self.start_s, self.format, self.digest)

    @property
    def page_L2GSC(self) -> Tensor:
        """`page_L2GSC[l, 0]` are layer l's keys before rotation, `page_L2GSC[l, 1]` its values, in the model's type.

        A view of the rows where these are plain."""
        return self.format.unpack(self.rows_LU)

    @property
    def keys_LGSC(self) -> Tensor:
        """Un-rotated keys."""
        return self.page_L2GSC[:, 0]

    @property
    def values_LGSC(self) -> Tensor:
        """Values."""
        return self.page_L2GSC[:, 1]

    @property
    def tokens(self) -> int:
        return self.format.tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the page and of the index vector."""
        return self.rows_LU.nbytes + self.mean_keys_LGC.nbytes

    def to_bytes(self) -> bytes:
        """The block as one safetensors file, from which `from_bytes` makes an equal one."""
        about = json.dumps([self.number, self.start_s, self.end_s, self.format.to_json(), self.digest])
        return save(
            {"rows": self.rows_LU, "mean_keys": self.mean_keys_LGC},
            metadata={"about": about, "checksum": xxhash.xxh3_128_hexdigest(about.encode())},
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "KvBlock":
        """Read what `to_bytes` wrote.

        Raises `StreamError` when the bytes are not a block, or when anything in it is not what was hashed.
        """
        try:
            tensors = load(data)
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            whole = xxhash.xxh3_128_hexdigest(metadata["about"].encode()) == metadata["checksum"]
            number, start_s, end_s, page_format, digest = json.loads(metadata["about"])
            page_format = PageFormat.from_json(page_format)
            block = cls.of_rows(number, start_s, end_s, page_format, tensors["rows"], tensors["mean_keys"])
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise StreamError(f"these {len(data)} bytes are not a block: {error}. Encode the frame again.") from error
        if not whole or block.digest != digest:
            raise StreamError(
                f"block {number} does not match its digest {digest[:12]}: it was damaged on its way. "
                "Fetch another copy, or encode the frame again."
            )
        return block


def row_digests(rows: Iterable[Tensor]) -> bytes:
    """xxh3-128 of each row, one after the other: finds damage, and is no protection against forgery."""
    return b"".join(xxhash.xxh3_128_digest(row_U.numpy().data) for row_U in rows)


def block_digest(digests: bytes, mean_keys_LGC: Tensor) -> str:
    """The name of a block's content, in hexadecimal, from its rows' digests."""
    return xxhash.xxh3_128_hexdigest(digests + mean_keys_LGC.numpy().tobytes())
