"""Asks vLLM, in a process of its own, for the log-probs that an exported student gives to the fixed prompts.

vLLM keeps engines, worker processes and global settings, so it never runs inside ours: `verify_vllm` starts
`python -m sparsight.model.export_vllm` and compares what that writes. Where vLLM is not installed, the verdict says so.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsight.errors import ExportError
from sparsight.model.export import largest_difference, probe_ids, probe_logprobs, probes
from sparsight.model.vision_language import VisionLanguageModel

TOLERANCE = 1e-3
"""Largest difference of a log-prob between float32 transformers and float32 vLLM: kernels sum in other orders."""

NOT_INSTALLED = "not installed"
UNUSABLE = 3
_SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
_CPU_CACHE_GIB = "1"


def verify_vllm(model: VisionLanguageModel, directory: Path, timeout_s: float = 600.0) -> str:
    """The verdict of vLLM on an exported directory: equal with the largest difference, not installed, or not usable.

    Raises `ExportError` where vLLM starts but refuses the model, gives other numbers, or takes longer than
    `timeout_s`.
    """
    if importlib.util.find_spec("vllm") is None:
        return NOT_INSTALLED
    with tempfile.TemporaryDirectory(prefix="sparsight-vllm-") as folder:
        request, reply = Path(folder) / "request.json", Path(folder) / "reply.json"
        request.write_text(json.dumps({"side": model.pixels.side, "rows": _requests(model)}))
        code, told = _run(directory, request, reply, timeout_s)
        if code == UNUSABLE:
            return f"installed, but not usable here: {told}"
        if code != 0:
            raise ExportError(f"vLLM does not load '{directory}': {told}")
        answered = [torch.tensor(row) for row in json.loads(reply.read_text())]
    gap = largest_difference(probe_logprobs(model), answered)
    if not gap <= TOLERANCE:
        raise ExportError(
            f"'{directory}' gives other numbers in vLLM: log-probs differ by {gap:.2e}, allowed are {TOLERANCE:.0e}"
        )
    return f"equal, largest log-prob difference {gap:.1e}"


def _requests(model: VisionLanguageModel) -> list[dict[str, Any]]:
    """Per probe the ids with one placeholder for the picture (vLLM expands it), and how many tokens follow it."""
    rows: list[dict[str, Any]] = []
    for probe in probes(model.pixels.side):
        ids, _ = probe_ids(model, probe)
        first = ids.index(model.chat.visual_id)
        after = ids[first + model.visual_tokens() :]
        rows.append({"ids": [*ids[: first + 1], *after], "after": len(after)})
    return rows


def _run(directory: Path, request: Path, reply: Path, timeout_s: float) -> tuple[int, str]:
    """Exit status of the vLLM process, and the line of standard error that says most."""
    command = [sys.executable, "-m", "sparsight.model.export_vllm", str(directory), str(request), str(reply)]
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {"VLLM_CPU_KVCACHE_SPACE": _CPU_CACHE_GIB} | os.environ | _SETTINGS | {"PYTHONPATH": paths}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"vLLM did not answer for '{directory}' within {timeout_s:.0f} s: raise the limit") from error
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    causes = [line for line in lines if "Error:" in line] or lines  # the engine's own error comes before its wrappers'
    return done.returncode, causes[0].strip()[:500] if causes else f"exit status {done.returncode}"


def answer(directory: str, request: Path, reply: Path) -> int:
    """Runs in the child process: load the directory in vLLM and write the prompts' log-probs."""
    try:
        vllm: Any = importlib.import_module("vllm")
        importlib.import_module("torchvision")  # vLLM's LLaVA classes need it, and only fail later without it
    except (ImportError, RuntimeError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}".splitlines()[0] + "\n")
        return UNUSABLE
    asked = json.loads(request.read_text())
    engine = vllm.LLM(
        model=directory,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=4,
        enforce_eager=True,
        gpu_memory_utilization=0.3,
        limit_mm_per_prompt={"image": 0, "video": 1},
    )
    prompts = [
        {
            "prompt_token_ids": row["ids"],
            "multi_modal_data": {"video": np.asarray(probe.picture)[None]},
        }
        for row, probe in zip(asked["rows"], probes(asked["side"]), strict=True)
    ]
    outputs = engine.generate(prompts, vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0))
    rows: list[list[float]] = []
    for row, output in zip(asked["rows"], outputs, strict=True):
        ids, said = output.prompt_token_ids, output.prompt_logprobs
        rows.append([said[place][ids[place]].logprob for place in range(len(ids) - row["after"], len(ids))])
    reply.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(answer(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
