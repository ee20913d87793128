"""A real service for the serve tests: a tiny random model exported, deployed on Ray Serve, reached over HTTP."""

import base64
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import torch
from PIL import Image
from ray import serve

from serve_apps.app import build, run
from serve_apps.settings import ServiceSettings
from sparsight.artifacts import RunDirectory
from sparsight.config import ArchitectureConfig, ServeConfig
from sparsight.model.tiny import make_dense, make_tokenizer

SMALL = ArchitectureConfig(
    tower_layers=1,
    tower_width=32,
    tower_heads=1,
    text_layers=2,
    text_width=64,
    text_heads=2,
    text_key_value_heads=1,
    text_intermediate=96,
    max_positions=2048,
)
MODEL = "tiny"


def export_tiny(run_dir: Path) -> str:
    """A finished export of a random model whose answers depend on its input; returns its URI."""
    tokenizer = make_tokenizer(["what shape is in the image?", "is there a red circle?"] * 20, 400)
    model = make_dense(SMALL, tokenizer, seed=0)
    with torch.no_grad():
        for layer in model.text_model.layers:
            layer.self_attn.v_proj.weight.mul_(8)
    artifact = RunDirectory(str(run_dir)).artifact("export", "export", 1, {})
    artifact.begin()
    model.save(artifact.storage.fetch() / "model")
    artifact.commit()
    return artifact.storage.uri


@contextmanager
def serving(run_dir: Path, **fields: Any) -> Iterator[str]:
    """Deploy on the cluster of this process; the service's address. `fields` are those of `ServeConfig`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = ServeConfig(port=port, **fields)
    run(build(ServiceSettings(model=export_tiny(run_dir), name=MODEL, serve=config)), config)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


def data_uri(seed: int) -> str:
    """A picture of noise as a data: URI."""
    noise_HWC = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    buffer = BytesIO()
    Image.fromarray(noise_HWC.numpy()).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object of a refused request, after checking that it has OpenAI's shape and leaks nothing."""
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in response.text
    assert ".py" not in response.text
    return error
