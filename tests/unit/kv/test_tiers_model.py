"""Any order of puts, reads, flushes, uploads, damage, crashes and restores, against a plain dictionary.

The dictionary knows which blocks were put, how many of them are durable, and which pages were damaged. After a crash a
bank holds some prefix of what was put that has every durable block; `test_killed` has a crash that is real.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sparsight.errors import LostBlockError, StreamError
from sparsight.kv.bank import BlockBank, RamBank
from sparsight.kv.block import KvBlock
from sparsight.kv.disk import DiskBudget
from sparsight.kv.page import Encoding
from sparsight.kv.segments import record_type
from sparsight.kv.tiers import MemoryBudget, TieredBank
from sparsight.storage import LocalStorage
from tests.unit.kv.random_blocks import LAYERS, PAGE_BYTES, block_of, sink_of

SEGMENT_PAGES = 3


class BankMachine(RuleBasedStateMachine):
    """One stream; `put` is every block that it took, by number, and `damaged` the numbers whose page is broken."""

    @initialize(
        encoding=st.sampled_from(["plain", "int8", "int4"]),
        ram_pages=st.sampled_from([12, 40]),
        device_pages=st.sampled_from([0, 2]),
        recent=st.sampled_from([0, 1, 4]),
        with_store=st.booleans(),
    )
    def begin(self, encoding: Encoding, ram_pages: int, device_pages: int, recent: int, with_store: bool) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.lives = 0
        self.encoding: Encoding = encoding
        self.segment_bytes = SEGMENT_PAGES * block_of(0, encoding=encoding).rows_LU.nbytes
        self.memory = MemoryBudget(ram_pages * PAGE_BYTES, device_pages * PAGE_BYTES, recent)
        self.disk = DiskBudget(2**15, 2**20 if with_store else 0, self.segment_bytes)
        self.store = LocalStorage(self.root / "store") if with_store else None
        self.put: dict[int, KvBlock] = {}
        self.damaged: set[int] = set()
        self.durable = 0
        self.bank = TieredBank.create(self.folder, sink_of(), self.memory, self.disk, self.store)

    @property
    def folder(self) -> Path:
        return self.root / str(self.lives)

    @property
    def whole(self) -> list[int]:
        return [number for number in sorted(self.put) if number not in self.damaged]

    def restore(self) -> None:
        """Open the stream again; every damaged page, and no other, is found."""
        self.bank = TieredBank.restore(self.folder, self.memory, self.disk, self.store)
        lost = set(self.bank.verify())
        kept = len(self.bank) + len(lost)
        assert self.durable <= kept <= len(self.put)
        self.put = {number: self.put[number] for number in sorted(self.put)[:kept]}
        self.durable = kept
        self.damaged &= set(self.put)
        assert lost == self.damaged

    @rule(skip=st.integers(0, 2))
    def put_the_next(self, skip: int) -> None:
        block = block_of(max(self.put, default=-1) + 1 + skip, encoding=self.encoding)
        if len(self.put) == 30:
            return
        self.bank.put(block)
        self.put[block.number] = block

    @precondition(lambda self: self.put)
    @rule(back=st.integers(0, 3))
    def put_an_old_one(self, back: int) -> None:
        """The last may be put again, any other is refused."""
        number = sorted(self.put)[max(0, len(self.put) - 1 - back)]
        if number == max(self.put):
            self.bank.put(self.put[number])
            return
        try:
            self.bank.put(self.put[number])
        except StreamError:
            return
        raise AssertionError("an old block was taken again")

    @precondition(lambda self: self.whole)
    @rule(data=st.data(), layer=st.integers(0, LAYERS - 1))
    def gather(self, data: st.DataObject, layer: int) -> None:
        numbers = data.draw(st.lists(st.sampled_from(self.whole), min_size=1, max_size=8))
        expected = torch.stack([self.put[number].page_L2GSC[layer] for number in numbers])
        assert torch.equal(self.bank.gather(layer, numbers), expected)

    @precondition(lambda self: self.damaged)
    @rule(data=st.data(), layer=st.integers(0, LAYERS - 1))
    def gather_what_is_lost(self, data: st.DataObject, layer: int) -> None:
        numbers = [*self.whole[:2], data.draw(st.sampled_from(sorted(self.damaged)))]
        try:
            self.bank.gather(layer, numbers)
        except LostBlockError:
            return
        raise AssertionError("a damaged page was used")

    @precondition(lambda self: self.whole)
    @rule(data=st.data())
    def get(self, data: st.DataObject) -> None:
        block = self.put[data.draw(st.sampled_from(self.whole))]
        found = self.bank.get(block.number)
        assert (found.digest, found.start_s, found.end_s) == (block.digest, block.start_s, block.end_s)
        assert torch.equal(found.rows_LU, block.rows_LU)

    @precondition(lambda self: self.put)
    @rule(data=st.data())
    def prefetch(self, data: st.DataObject) -> None:
        self.bank.prefetch(data.draw(st.lists(st.sampled_from(sorted(self.put)), max_size=4)))

    @rule(upload=st.booleans())
    def make_durable(self, upload: bool) -> None:
        if upload:
            self.bank.upload()
        else:
            self.bank.flush()
        self.durable = len(self.put)

    @rule()
    def close_and_restore(self) -> None:
        self.bank.close()
        self.durable = len(self.put)
        self.restore()

    @rule(data=st.data(), torn_bytes=st.integers(0, 50))
    def crash_and_restore(self, data: st.DataObject, torn_bytes: int) -> None:
        """Another process sees the files as they were at some moment since the last durable point."""
        self.bank.close()
        if self.store is not None:  # what it holds was durable before
            self.durable = len(self.put)
        kept = data.draw(st.integers(self.durable, len(self.put)))
        old = self.folder
        self.lives += 1
        shutil.copytree(old, self.folder)
        record_bytes = record_type(block_of(0, encoding=self.encoding).format).itemsize
        for segment, path in enumerate(sorted(self.folder.glob("*.index"))):
            records = max(0, kept - segment * SEGMENT_PAGES)
            content = path.read_bytes()
            path.write_bytes(content[: records * record_bytes + (torn_bytes if records < SEGMENT_PAGES else 0)])
            if kept < segment * SEGMENT_PAGES:
                path.unlink()
        self.restore()
        assert len(self.put) == kept

    @precondition(lambda self: self.whole and self.store is None)
    @rule(data=st.data(), layer=st.integers(0, LAYERS - 1))
    def damage(self, data: st.DataObject, layer: int) -> None:
        """Flip a bit of a page; the bank must notice before it uses that page again, and lose nothing else."""
        number = data.draw(st.sampled_from(self.whole))
        self.bank.close()
        self.durable = len(self.put)
        self.damaged.add(number)
        row = self.put[number].rows_LU[layer].numpy().tobytes()
        for path in self.folder.glob("*.pages"):
            content = bytearray(path.read_bytes())
            if (place := content.find(row)) >= 0:
                content[place + len(row) // 2] ^= 16
                path.write_bytes(content)
        self.restore()

    @rule()
    def clear(self) -> None:
        self.bank.clear()
        self.put.clear()
        self.damaged.clear()
        self.durable = 0

    @invariant()
    def holds_what_was_put(self) -> None:
        index = self.bank.index()
        blocks = [self.put[number] for number in self.whole]
        assert index.numbers_N.tolist() == [block.number for block in blocks]
        assert index.spans_s_N2.tolist() == [[block.start_s, block.end_s] for block in blocks]
        for row, block in enumerate(blocks):
            assert torch.equal(index.mean_keys_LNGC[:, row], block.mean_keys_LGC)
        twin = twin_of(blocks)
        assert (len(self.bank), self.bank.nbytes) == (len(twin), twin.nbytes)

    def teardown(self) -> None:
        if hasattr(self, "bank"):
            self.bank.close()
            shutil.rmtree(self.root)


def twin_of(blocks: list[KvBlock]) -> BlockBank:
    twin = RamBank(sink_of(), 2**30)
    for block in blocks:
        twin.put(block)
    return twin


BankMachine.TestCase.settings = settings(
    max_examples=20,
    stateful_step_count=20,
    phases=[Phase.generate, Phase.shrink],
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestBank = BankMachine.TestCase
