"""One frame's memory: the keys and values that every layer of the text model computed for its tokens.

A block is a value: it is made once by an encoder, never written again, and means the same in any process. Keys are
stored before rotation, so a reader may place the block at any position. It knows nothing of banks, models or questions.
Made by `encoder`, kept by `bank`, read by `answerer`.
"""

import hashlib
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sparsight.errors import StreamError

SINK_NUMBER = -1
"""The number of the block that holds the system prompt; frames count from 0."""


@dataclass(frozen=True, eq=False)
class KvBlock:
    """Keys and values of `S` consecutive tokens in all `L` layers, as one contiguous page in main memory.

    `page_L2GSC[l, 0]` are layer l's keys before rotation, `page_L2GSC[l, 1]` its values; one layer is contiguous, so a
    reader that needs one layer copies one run of bytes. `mean_keys_LGC` (float32) is the retrieval index: the mean
    key over the tokens, for each key/value head. Times are seconds from the start of the stream.
    """

    number: int
    start_s: float
    end_s: float
    page_L2GSC: Tensor
    mean_keys_LGC: Tensor
    digest: str

    @classmethod
    def from_page(cls, number: int, start_s: float, end_s: float, page_L2GSC: Tensor) -> "KvBlock":
        """The block of a page that its maker gives up: the page is moved to main memory, indexed and hashed."""
        page_L2GSC = page_L2GSC.detach().cpu().contiguous()
        mean_keys_LGC = page_L2GSC[:, 0].float().mean(dim=2)
        return cls(number, start_s, end_s, page_L2GSC, mean_keys_LGC, page_digest(page_L2GSC))

    @property
    def keys_LGSC(self) -> Tensor:
        """Un-rotated keys, a view of the page."""
        return self.page_L2GSC[:, 0]

    @property
    def values_LGSC(self) -> Tensor:
        """Values, a view of the page."""
        return self.page_L2GSC[:, 1]

    @property
    def tokens(self) -> int:
        return self.page_L2GSC.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of the page and of the index vector."""
        return self.page_L2GSC.nbytes + self.mean_keys_LGC.nbytes

    def to_bytes(self) -> bytes:
        """The block as one safetensors file, from which `from_bytes` makes an equal one."""
        return save(
            {
                "page": self.page_L2GSC,
                "number": torch.tensor([self.number]),
                "span_s": torch.tensor([self.start_s, self.end_s], dtype=torch.float64),
                "digest": torch.tensor(list(bytes.fromhex(self.digest)), dtype=torch.uint8),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "KvBlock":
        """Read what `to_bytes` wrote.

        Raises `StreamError` when the bytes are not a block, or when the page is not the one that was hashed.
        """
        try:
            tensors = load(data)
            number, span_s, page = int(tensors["number"]), tensors["span_s"], tensors["page"]
            digest = bytes(tensors["digest"].tolist()).hex()
        except (SafetensorError, KeyError) as error:
            raise StreamError(f"these {len(data)} bytes are not a block: {error}. Encode the frame again.") from error
        block = cls.from_page(number, float(span_s[0]), float(span_s[1]), page)
        if block.digest != digest:
            raise StreamError(
                f"block {number} does not match its digest {digest[:12]}: it was damaged on its way. "
                "Fetch another copy, or encode the frame again."
            )
        return block


def page_digest(page_L2GSC: Tensor) -> str:
    """blake2b-256 of the page's bytes, in hexadecimal: equal content has an equal name, whatever its place or time."""
    return hashlib.blake2b(page_L2GSC.view(torch.uint8).numpy().data, digest_size=32).hexdigest()
