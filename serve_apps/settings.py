"""What one deployed service is made from, and the finished export that it serves.

Model, tokenizer and picture statistics come from the export directory alone. Used by `app.build` and every replica.
"""

import torch
from pydantic import BaseModel, ConfigDict

from sparsight import layout
from sparsight.artifacts import Manifest, read_manifest
from sparsight.config import ServeConfig
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.storage import open_storage


class ServiceSettings(BaseModel):
    """The arguments of `serve_apps.app:build`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """The finished export: a folder or s3:// URI with a manifest, and the checkpoint under `model/`."""
    name: str = "student"
    """The model's id in requests."""
    serve: ServeConfig = ServeConfig()


def check_export(uri: str) -> Manifest:
    """The manifest of a finished export. Raises `ArtifactError` if it is unfinished or something else."""
    return read_manifest(open_storage(uri), kind="export")


def load_student(settings: ServiceSettings) -> VisionLanguageModel:
    """The exported model, on this process's GPU if it was given one. `serve.threads` CPU threads compute it."""
    check_export(settings.model)
    torch.set_num_threads(settings.serve.threads)
    directory = open_storage(settings.model).fetch(layout.MODEL)
    return VisionLanguageModel.load(directory, device="cuda" if torch.cuda.is_available() else "cpu")
