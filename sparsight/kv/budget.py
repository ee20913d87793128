"""How much memory a stream may take, and what of it is left for cached rows. Used by `tiers`."""

from dataclasses import dataclass

from sparsight.errors import StreamError
from sparsight.kv.page import PageFormat


@dataclass(frozen=True)
class MemoryBudget:
    """`ram_bytes` covers the index, blocks on their way to the disk, cached rows, and an eighth for rows that are
    read or gathered; the newest `recent_blocks` stay as far as they fit. `device_bytes` are the accelerator's.

    Raises `StreamError` for negative numbers.
    """

    ram_bytes: int
    device_bytes: int = 0
    recent_blocks: int = 8

    def __post_init__(self) -> None:
        if min(self.ram_bytes, self.device_bytes, self.recent_blocks) < 0:
            raise StreamError(f"{self} is impossible: give numbers of at least 0.")

    def waiting_bytes(self, page_format: PageFormat) -> int:
        """For blocks on their way to the disk."""
        return max(page_format.page_bytes, self.ram_bytes // 16)

    def cache_rows(self, page_format: PageFormat, index_bytes: int) -> int:
        """Rows that main memory has room for beside waiting blocks and the index; negative where these are too much."""
        free_bytes = self.ram_bytes - self.ram_bytes // 8 - index_bytes - self.waiting_bytes(page_format)
        return free_bytes // page_format.row_bytes

    def check(self, page_format: PageFormat, index_bytes: int, cached_pages: int) -> None:
        """Raises `StreamError` where not even so many pages can be cached."""
        if self.cache_rows(page_format, index_bytes) < cached_pages * page_format.layers:
            raise StreamError(
                f"{self.ram_bytes} bytes of main memory, an eighth kept free, have no room beside an index of "
                f"{index_bytes} for {1 + cached_pages} pages of {page_format.page_bytes}: give the stream more."
            )
