"""What a stream's memory costs as it grows: questions, encoding, RAM, disk, retrieval, each beside what bounds it.

The model has the text dimensions of LLaVA-OneVision-0.5B (Qwen2, 24 layers of width 896, 14 heads over 2 key/value
heads of 64, 196 tokens a frame), random weights in bfloat16 (real checkpoints' type, and the faster one where a
processor multiplies it), and a vocabulary of 1024: with the true one answers take longer. Long streams are random
pages: nothing here depends on what an answer says.

- `latency_ratio_16x`: time from question to answer (16 tokens over 72 blocks) at 16 times the stream's length / at its
  length. The short stream lies in RAM, of the long one an eighth; the rest is in files that the system may have cached.
  `first_token_ratio_16x` is the same up to the first token, where all reading is. The limit is 1.
- `encode_last_vs_first`: CPU time of one frame, its block's put included, in the last tenth of a stream / in the first
  once the window is full, with `encode_layers` layers: more of them would hide what grows. The limit is 1.
- `ram_vs_budget`: growth of peak resident memory / `ram_bytes`, in a new process under the system's own allocator,
  while 20 times that is put and asked: over the peak of making the blocks alone, which is the caller's. What is
  gathered comes on top of the limit, which is 1.
- `restore_vs_plain_read`: time to read a stream's files into memory / to restore it, every row hashed. Before both, the
  page cache is dropped; for `restore_vs_plain_read_warm` both find everything in it. The limit is 1.
- `gather_vs_memcpy`: time to copy a question's rows, a layer at a time, from and to one piece of memory that is ready /
  to gather them from RAM into a new one. The limit is 1.
- `int8_bytes_ratio`, `int4_bytes_ratio`: bytes of a page / of one in bfloat16. Limits 0.5 and 0.25, and the grids.
- `retrieval_share`: scoring 100,000 blocks in all layers and choosing among them / the long stream's answer. It reads
  100,000 x 2 x 64 x 4 bytes x 24 layers = 1.23 GB of mean keys. `index_read_vs_scoring` is the time of a bare sum over
  these / that of scoring and choosing: at 1 nothing is left but to read less.
- `load_vs_recompute`: time to load a page from the disk (page cache dropped) / to encode a frame in a window of
  `window_frames`. An exact page depends on all frames as far back as layers x window, so one frame is the least that
  computing it anew would cost.

Times are wall times on all cores but for encoding, which is on one; what is compared takes turns, and figures are
medians of the rounds' ratios. With `--device cuda` the model is on the accelerator and every time lasts until that is
idle: encoding is wall time as well, the copies of `gather_vs_memcpy` are from page-locked memory to the accelerator,
and `near_vs_ram_gather` is the time to gather rows that the accelerator has / that main memory has. Run as
`python -m benchmarks.stream --json FILE [--device cuda]`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.result import write_result
from sparsight.kv.answerer import StreamAnswerer
from sparsight.kv.attention import KvTextModel
from sparsight.kv.bank import BlockIndex
from sparsight.kv.block import SINK_NUMBER, KvBlock
from sparsight.kv.disk import DiskBudget
from sparsight.kv.encoder import StreamEncoder, encode_sink
from sparsight.kv.page import Encoding
from sparsight.kv.retrieve import BestAndRecent
from sparsight.kv.tiers import MemoryBudget, TieredBank

HEADS, KV_HEADS, HEAD_WIDTH, VOCABULARY = 14, 2, 64, 1024
SINK, PROMPT, ANSWER = 14, 32, 16
"""Tokens."""
LONGER, STREAM_PER_BUDGET = 16, 20
DISK = DiskBudget(2**40)


class Sizes(NamedTuple):
    """What a test makes smaller."""

    layers: int = 24
    hidden: int = HEADS * HEAD_WIDTH
    intermediate: int = 4864
    frame_tokens: int = 196
    blocks: int = 128
    best: int = 64
    recent: int = 8
    index_blocks: int = 100_000
    encode_layers: int = 2
    encode_frames: int = 200
    window_frames: int = 8
    ram_pages: int = 64
    rounds: int = 5


REALISTIC = Sizes()


class Host(NamedTuple):
    """A random model, ready for streams."""

    model: KvTextModel
    answerer: StreamAnswerer
    sink: KvBlock


def main(argv: Sequence[str] | None = None, sizes: Sizes = REALISTIC) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--measure-ram", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    if arguments.measure_ram:
        print(measure_ram(Sizes(*arguments.measure_ram)))
        return 0
    figures = bytes_ratios(sizes) | {"ram_vs_budget": ram_vs_budget(sizes)}
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        figures |= time_encoding(Path(folder), sizes, device)
        figures |= time_stream(Path(folder), sizes, device)
    write_result(arguments.json, figures | sizes._asdict())
    return 0


def random_host(sizes: Sizes, layers: int, device: torch.device) -> Host:
    config = Qwen2Config(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=32_768,
    )
    causal = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().to(device)
    model = KvTextModel(causal.model)
    return Host(model, StreamAnswerer(model, causal.lm_head), encode_sink(model, torch.arange(SINK)))


def random_blocks(sizes: Sizes, count: int, encoding: Encoding = "plain") -> Iterator[KvBlock]:
    """One page of random numbers in bfloat16, moved to another mean for every block."""
    width = sizes.hidden // HEADS
    page_L2GSC = torch.randn(sizes.layers, 2, KV_HEADS, sizes.frame_tokens, width).bfloat16()
    for number in range(count):
        moved_L2GSC = page_L2GSC.clone()
        moved_L2GSC[:, 0] += torch.randn(sizes.layers, KV_HEADS, 1, width).bfloat16()
        yield KvBlock.from_page(number, float(number), float(number + 1), moved_L2GSC, encoding)


def page_bytes(sizes: Sizes, encoding: Encoding = "plain") -> int:
    return next(random_blocks(sizes, 1, encoding)).rows_LU.nbytes


def bytes_ratios(sizes: Sizes) -> dict[str, float]:
    plain = page_bytes(sizes)
    return {
        "int8_bytes_ratio": page_bytes(sizes, "int8") / plain,
        "int4_bytes_ratio": page_bytes(sizes, "int4") / plain,
    }


def time_encoding(folder: Path, sizes: Sizes, device: torch.device) -> dict[str, float]:
    """One frame after another into a bank, on one thread."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter  # a put ends with the page in main memory
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    host = random_host(sizes, sizes.encode_layers, device)
    encoder = StreamEncoder(host.model, host.sink, window_tokens(sizes))
    ram_bytes = sizes.ram_pages * page_bytes(sizes) * sizes.encode_layers // sizes.layers
    frames_s: list[float] = []
    with TieredBank.create(folder / "encoded", host.sink, MemoryBudget(ram_bytes), DISK) as bank:
        for number in range(sizes.encode_frames):
            embeds_FSD = torch.randn(1, sizes.frame_tokens, sizes.hidden)
            start_s = clock()
            bank.put(encoder.encode(embeds_FSD, [(float(number), float(number + 1))])[0])
            frames_s.append(clock() - start_s)
    torch.set_num_threads(threads)
    tenth = (sizes.encode_frames - sizes.window_frames) // 10
    first_s = statistics.median(frames_s[sizes.window_frames + 1 :][:tenth])
    return {"encode_last_vs_first": statistics.median(frames_s[-tenth:]) / first_s}


def window_tokens(sizes: Sizes) -> int:
    return SINK + sizes.window_frames * sizes.frame_tokens


def time_stream(folder: Path, sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Everything that takes the whole model, or a stream of many blocks."""
    host = random_host(sizes, sizes.layers, device)
    memory = MemoryBudget(2 * sizes.blocks * page_bytes(sizes), recent_blocks=sizes.recent)
    lengths = {"short": sizes.blocks, "long": LONGER * sizes.blocks}
    banks = {name: TieredBank.create(folder / name, host.sink, memory, DISK, device=device) for name in lengths}
    for name, bank in banks.items():
        for block in random_blocks(sizes, lengths[name]):
            bank.put(block)
        bank.flush()
    figures = time_questions(host, banks, random_index(sizes), sizes)
    figures["gather_vs_memcpy"] = gather_vs_memcpy(banks["short"], sizes, device)
    if device.type != "cpu":
        figures["near_vs_ram_gather"] = near_vs_ram_gather(folder / "near", banks["short"], sizes, device)
    for bank in banks.values():
        bank.close()
    figures["load_vs_recompute"] = load_vs_recompute(host, folder / "long", memory, sizes)
    for name, cold in (("restore_vs_plain_read", True), ("restore_vs_plain_read_warm", False)):
        figures[name] = restore_vs_plain_read(folder / "short", memory, sizes, cold)
    return figures


def random_index(sizes: Sizes) -> BlockIndex:
    numbers_N = torch.arange(sizes.index_blocks)
    mean_keys_LNGC = torch.randn(sizes.layers, sizes.index_blocks, KV_HEADS, sizes.hidden // HEADS)
    spans_s_N2 = torch.stack((numbers_N, numbers_N + 1), dim=1).double()
    return BlockIndex(numbers_N, spans_s_N2, mean_keys_LNGC, mean_keys_LNGC.flatten(2).norm(dim=2))


def time_questions(host: Host, banks: dict[str, TieredBank], index: BlockIndex, sizes: Sizes) -> dict[str, float]:
    retriever = BestAndRecent(sizes.best, sizes.recent)
    queries_HTC = torch.randn(HEADS, PROMPT, sizes.hidden // HEADS)
    found: dict[str, list[float]] = {name: [] for name in ("latency", "first_token", "share", "read")}
    for counted in [False] + [True] * sizes.rounds:
        prompt_ids_T = torch.randint(VOCABULARY, (PROMPT,))
        short, long = (ask(host, bank, prompt_ids_T, retriever) for bank in banks.values())
        scoring_s = seconds(lambda: [retriever.select(layer, queries_HTC, index) for layer in range(sizes.layers)])
        read_s = seconds(lambda: [mean_keys_NGC.sum() for mean_keys_NGC in index.mean_keys_LNGC])
        if counted:
            found["latency"].append(long.answer_s / short.answer_s)
            found["first_token"].append(long.first_token_s / short.first_token_s)
            found["share"].append(scoring_s / long.answer_s)
            found["read"].append(read_s / scoring_s)
    names = ("latency_ratio_16x", "first_token_ratio_16x", "retrieval_share", "index_read_vs_scoring")
    return {name: statistics.median(ratios) for name, ratios in zip(names, found.values(), strict=True)}


class Latency(NamedTuple):
    """Of one question."""

    first_token_s: float
    answer_s: float


def ask(host: Host, bank: TieredBank, prompt_ids_T: Tensor, retriever: BestAndRecent) -> Latency:
    times_s: list[float] = []
    start_s = time.perf_counter()
    host.answerer.ask(
        bank,
        prompt_ids_T,
        retriever,
        max_new_tokens=ANSWER,
        on_token=lambda _: times_s.append(time.perf_counter() - start_s),
    )
    return Latency(times_s[0], times_s[-1])


def gather_vs_memcpy(bank: TieredBank, sizes: Sizes, device: torch.device) -> float:
    """One question's rows, all layers; the plain copies are from as many places into memory that lies ready."""
    chosen = chosen_blocks(sizes)
    gather_all(bank, chosen)  # from now on they are in RAM
    plain = [bank.gather(layer, numbers).cpu() for layer, numbers in enumerate(chosen)]
    ready = torch.empty_like(plain[0], device=device)
    if device.type != "cpu":
        plain = [layer_R2GSC.pin_memory() for layer_R2GSC in plain]

    def copy() -> None:
        for layer_R2GSC in plain:
            ready.copy_(layer_R2GSC, non_blocking=True)

    return median_ratio(copy, lambda: gather_all(bank, chosen), 4 * sizes.rounds)


def near_vs_ram_gather(folder: Path, bank: TieredBank, sizes: Sizes, device: torch.device) -> float:
    chosen, all_bytes = chosen_blocks(sizes), 2 * sizes.blocks * page_bytes(sizes)
    memory = MemoryBudget(all_bytes, device_bytes=all_bytes, recent_blocks=sizes.recent)
    with TieredBank.create(folder, bank.sink, memory, DISK, device=device) as near:
        for block in random_blocks(sizes, sizes.blocks):
            near.put(block)
        return median_ratio(lambda: gather_all(near, chosen), lambda: gather_all(bank, chosen), 4 * sizes.rounds)


def chosen_blocks(sizes: Sizes) -> list[list[int]]:
    """As a question chooses them: of each layer its own, in time order."""
    return [torch.randperm(sizes.blocks)[: sizes.best].sort().values.tolist() for _ in range(sizes.layers)]


def gather_all(bank: TieredBank, chosen: list[list[int]]) -> None:
    for layer, numbers in enumerate(chosen):
        bank.gather(layer, numbers)


def load_vs_recompute(host: Host, folder: Path, memory: MemoryBudget, sizes: Sizes) -> float:
    """The oldest pages, which a restored bank has on the disk only."""
    encoder = StreamEncoder(host.model, host.sink, window_tokens(sizes))

    def encode(frames: int = 1) -> None:
        encoder.encode(torch.randn(frames, sizes.frame_tokens, sizes.hidden), [(0.0, 0.0)] * frames)

    encode(sizes.window_frames + 1)
    files, oldest = list(folder.iterdir()), iter(range(sizes.blocks))
    with TieredBank.restore(folder, memory, DISK) as bank:
        return median_ratio(
            lambda: bank.get(next(oldest)), encode, sizes.rounds, before=lambda: drop_from_page_cache(files)
        )


def restore_vs_plain_read(folder: Path, memory: MemoryBudget, sizes: Sizes, cold: bool) -> float:
    files = sorted(folder.iterdir())

    def restore() -> None:
        with TieredBank.restore(folder, memory, DISK) as bank:
            assert len(bank) == sizes.blocks

    return median_ratio(
        lambda: [path.read_bytes() for path in files],
        restore,
        sizes.rounds,
        before=lambda: drop_from_page_cache(files if cold else []),
    )


def drop_from_page_cache(files: Iterable[Path]) -> None:
    """What was written of them is on the disk already."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def median_ratio(
    one: Callable[[], object], other: Callable[[], object], rounds: int, before: Callable[[], None] = lambda: None
) -> float:
    """Median over rounds of one's time over the other's; a round before does not count."""
    ratios: list[float] = []
    for _ in range(rounds + 1):
        before()
        one_s = seconds(one)
        before()
        ratios.append(one_s / seconds(other))
    return statistics.median(ratios[1:])


def seconds(action: Callable[[], object]) -> float:
    finish_all()
    start_s = time.perf_counter()
    action()
    finish_all()
    return time.perf_counter() - start_s


def finish_all() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def ram_vs_budget(sizes: Sizes) -> float:
    command = [sys.executable, "-m", "benchmarks.stream", "--json", "-", "--measure-ram", json.dumps(sizes)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_ram(sizes: Sizes) -> float:
    """Growth of this process's peak resident memory, over that of making blocks, while 20 times the budget is put and
    asked."""
    page_L2GSC = torch.randn(sizes.layers, 2, KV_HEADS, SINK, sizes.hidden // HEADS).bfloat16()
    sink = KvBlock.from_page(SINK_NUMBER, 0.0, 0.0, page_L2GSC)
    ram_bytes = sizes.ram_pages * page_bytes(sizes)
    with tempfile.TemporaryDirectory() as folder:
        with TieredBank.create(Path(folder) / "small", sink, MemoryBudget(2**24), DISK) as bank:
            put_and_gather(bank, sizes._replace(frame_tokens=1), 20)  # what is loaded on first use is no growth
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
        for _ in random_blocks(sizes, sizes.ram_pages):
            pass
        before_bytes = peak_bytes()
        with TieredBank.create(Path(folder) / "stream", sink, MemoryBudget(ram_bytes), DISK) as bank:
            put_and_gather(bank, sizes, STREAM_PER_BUDGET * sizes.ram_pages)
        return (peak_bytes() - before_bytes) / ram_bytes


def put_and_gather(bank: TieredBank, sizes: Sizes, blocks: int) -> None:
    """After every sixteenth block, gather a layer's share of a question."""
    for number, block in enumerate(random_blocks(sizes, blocks)):
        bank.put(block)
        if number % 16 == 0:
            bank.gather(number // 16 % sizes.layers, torch.randint(number + 1, (sizes.best,)).tolist())


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


if __name__ == "__main__":
    sys.exit(main())
