"""Any order of puts, reads, flushes, uploads, damage, crashes, moves and restores, against a plain dictionary.

The dictionary knows which blocks were put, how many of them are durable, how many are in the store, and which are lost:
those whose page or record was damaged where the store did not have it. After a crash a bank holds some prefix of what
was put that has every durable block; `test_killed` has a crash that is real.
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
from sparsight.kv.records import record_type
from sparsight.kv.tiers import MemoryBudget, TieredBank
from sparsight.storage import LocalStorage
from tests.unit.kv.random_blocks import LAYERS, PAGE_BYTES, block_of, sink_of

SEGMENT_PAGES, MOST_BLOCKS = 3, 30
HEAD_BYTES = 40
"""Of a record: number and times, and their checksum. `test_store_damage` damages them."""


class BankMachine(RuleBasedStateMachine):
    """One stream; `put` is every block that it took, by number, `lost` the numbers that it cannot have any more, and
    `copied` how many of the first blocks the store has."""

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
        page_format = block_of(0, encoding=encoding).format
        self.page_bytes, self.record_bytes = page_format.page_bytes, record_type(page_format).itemsize
        segment_bytes = SEGMENT_PAGES * self.page_bytes
        self.memory = MemoryBudget(ram_pages * PAGE_BYTES, device_pages * PAGE_BYTES, recent)
        three_segments_bytes = 3 * segment_bytes + MOST_BLOCKS * self.record_bytes
        self.disk = DiskBudget(three_segments_bytes if with_store else 2**15, 2**20, segment_bytes)
        self.store = LocalStorage(self.root / "store") if with_store else None
        self.put: dict[int, KvBlock] = {}
        self.lost: set[int] = set()
        self.durable = self.copied = 0
        self.bank = TieredBank.create(self.folder, sink_of(), self.memory, self.disk, self.store)

    @property
    def folder(self) -> Path:
        return self.root / str(self.lives)

    @property
    def whole(self) -> list[int]:
        return [number for number in sorted(self.put) if number not in self.lost]

    def close(self) -> None:
        """Everything is durable then, and what is full was copied."""
        self.bank.close()
        self.durable = len(self.put)
        if self.store is not None:
            self.copied = max(self.copied, self.durable // SEGMENT_PAGES * SEGMENT_PAGES)

    def restore(self) -> None:
        """Open the stream again; every lost block, and no other, is found."""
        self.bank = TieredBank.restore(self.folder, self.memory, self.disk, self.store)
        lost = set(self.bank.verify())
        kept = len(self.bank) + len(lost)
        assert max(self.durable, self.copied) <= kept <= len(self.put)
        self.put = {number: self.put[number] for number in sorted(self.put)[:kept]}
        self.durable = kept
        self.lost &= set(self.put)
        assert lost == self.lost

    @rule(skip=st.integers(0, 2))
    def put_the_next(self, skip: int) -> None:
        block = block_of(max(self.put, default=-1) + 1 + skip, encoding=self.encoding)
        if len(self.put) == MOST_BLOCKS:
            return
        self.bank.put(block)
        self.put[block.number] = block

    @precondition(lambda self: self.put)
    @rule(back=st.integers(0, 3))
    def put_an_old_one(self, back: int) -> None:
        """The last may be put again if it is not lost, any other is refused."""
        number = sorted(self.put)[max(0, len(self.put) - 1 - back)]
        if number == max(self.put) and number not in self.lost:
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

    @precondition(lambda self: self.lost)
    @rule(data=st.data(), layer=st.integers(0, LAYERS - 1))
    def gather_what_is_lost(self, data: st.DataObject, layer: int) -> None:
        numbers = [*self.whole[:2], data.draw(st.sampled_from(sorted(self.lost)))]
        try:
            self.bank.gather(layer, numbers)
        except LostBlockError:
            return
        raise AssertionError("a lost block was used")

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
        if upload and self.store is not None:
            self.copied = self.durable

    @rule()
    def close_and_restore(self) -> None:
        self.close()
        self.restore()

    @rule(data=st.data(), torn_bytes=st.integers(0, 50), torn_pages=st.floats(0, SEGMENT_PAGES))
    def crash_and_restore(self, data: st.DataObject, torn_bytes: int, torn_pages: float) -> None:
        """Another process sees the files as they were at some moment since the last durable point: pages come first, so
        there may be more of them than records, whole or not."""
        durable = self.durable
        self.close()
        self.durable = durable
        kept = data.draw(st.integers(self.durable, len(self.put)))
        old = self.folder
        self.lives += 1
        shutil.copytree(old, self.folder)
        for segment, path in enumerate(sorted(self.folder.glob("*.index"))):
            records = max(0, kept - segment * SEGMENT_PAGES)
            content = path.read_bytes()
            path.write_bytes(content[: records * self.record_bytes + (torn_bytes if records < SEGMENT_PAGES else 0)])
            if kept < segment * SEGMENT_PAGES:
                path.unlink()
                path.with_suffix(".pages").unlink(missing_ok=True)
            elif records < SEGMENT_PAGES and (pages := path.with_suffix(".pages")).exists():
                pages.write_bytes(pages.read_bytes()[: round((records + torn_pages) * self.page_bytes)])
        self.restore()
        assert len(self.put) == max(kept, self.copied)

    @precondition(lambda self: self.copied)
    @rule()
    def move_to_another_machine(self) -> None:
        """All that is left is the store."""
        self.close()
        self.durable = self.copied
        self.lives += 1
        self.restore()
        assert len(self.put) == self.copied

    @precondition(lambda self: self.whole)
    @rule(data=st.data(), kind=st.sampled_from(["pages", "index"]), place=st.floats(0, 1, exclude_max=True))
    def damage(self, data: st.DataObject, kind: str, place: float) -> None:
        """Flip a bit of a page or of a record; that block and no other is lost, if the store does not have it."""
        number = data.draw(st.sampled_from(self.whole))
        self.close()
        position = sorted(self.put).index(number)
        if position >= self.copied:
            self.lost.add(number)
        segment, slot = divmod(position, SEGMENT_PAGES)
        path = self.folder / f"{segment:05d}.{kind}"
        if path.exists():
            first, size = (0, self.page_bytes) if kind == "pages" else (HEAD_BYTES, self.record_bytes - HEAD_BYTES)
            content = bytearray(path.read_bytes())
            content[slot * (first + size) + first + int(place * size)] ^= 16
            path.write_bytes(content)
        self.restore()

    @rule()
    def clear(self) -> None:
        self.bank.clear()
        self.put.clear()
        self.lost.clear()
        self.durable = self.copied = 0

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
    max_examples=40,
    stateful_step_count=30,
    phases=[Phase.generate, Phase.shrink],
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestBank = BankMachine.TestCase


def test_with_a_store_segments_leave_the_folder_and_are_read_back() -> None:
    """The machine's budgets are small enough for that."""
    machine = BankMachine()
    machine.begin(encoding="int8", ram_pages=12, device_pages=0, recent=1, with_store=True)
    for _ in range(MOST_BLOCKS):
        machine.put_the_next(skip=0)
    machine.make_durable(upload=True)
    assert not (machine.folder / "00000.pages").exists()
    assert len(list(machine.folder.glob("*.pages"))) <= 4
    for number in machine.whole:
        assert machine.bank.get(number).digest == machine.put[number].digest
    machine.move_to_another_machine()
    machine.holds_what_was_put()
    machine.teardown()
