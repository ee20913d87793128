"""The benchmark of streams runs, at sizes that say nothing of speed."""

import json
from pathlib import Path

import torch

from benchmarks.stream import HEADS, Sizes, main

TINY = Sizes(
    layers=2,
    hidden=4 * HEADS,
    intermediate=32,
    frame_tokens=49,
    blocks=8,
    best=4,
    recent=2,
    index_blocks=50,
    encode_layers=1,
    encode_frames=13,
    window_frames=2,
    ram_pages=8,
    rounds=1,
)
WANTED = {
    "latency_ratio_16x",
    "encode_last_vs_first",
    "ram_vs_budget",
    "restore_vs_plain_read",
    "gather_vs_memcpy",
    "int8_bytes_ratio",
    "int4_bytes_ratio",
    "retrieval_share",
    "load_vs_recompute",
}


def test_every_figure_is_there(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    assert main(["--json", str(tmp_path / "stream.json")], TINY) == 0
    assert torch.get_num_threads() == threads
    figures: dict[str, float] = json.loads((tmp_path / "stream.json").read_text())["figures"]
    assert figures.keys() >= WANTED
    assert all(figures[name] > 0 for name in WANTED - {"ram_vs_budget"})
    assert figures["int4_bytes_ratio"] < figures["int8_bytes_ratio"] < 1
