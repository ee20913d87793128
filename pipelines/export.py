"""The first student leaves the run as a verified hub directory: artefact `export`, what serving loads.

Nothing counts as exported before plain transformers, and vLLM where it is installed, have given the same log-probs.
Run as `python -m pipelines.export --config FILE`.
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipelines.command import run_command
from pipelines.models import ModelSource, exported_student
from sparsight import layout
from sparsight.artifacts import Artifact, RunDirectory
from sparsight.config import RunConfig
from sparsight.errors import ArtifactError
from sparsight.model.export import verify_transformers, write_export
from sparsight.model.export_vllm import verify_vllm
from sparsight.model.parameters import activated_parameters, total_parameters
from sparsight.model.vision_language import VisionLanguageModel
from sparsight.observe import say

KIND, VERSION = "export", 1


def export(config: RunConfig) -> None:
    """Write the artefact `export`; a finished one is left alone.

    Raises `ArtifactError` where the student is not trained, `ExportError` where the export does not reload to the
    same numbers; then no manifest is written.
    """
    student = exported_student(config)
    artifact = plan_export(config, student)
    if artifact.finished is not None:
        say("export: nothing to do, the export is there")
        return
    artifact.begin()
    model = VisionLanguageModel.load(student.fetch())
    folder = Path(tempfile.mkdtemp(prefix="sparsight-export-"))
    try:
        write_export(model, folder)
        gap = verify_transformers(model, folder)
        verdicts = {"transformers": f"equal, largest log-prob difference {gap:.1e}", "vllm": verify_vllm(model, folder)}
        artifact.storage.publish(folder, layout.MODEL)
    finally:
        shutil.rmtree(folder)
    figures = {
        "activated_parameters": float(activated_parameters(model)),
        "total_parameters": float(total_parameters(model)),
    }
    artifact.commit(figures=figures, details={"student": student.label, "verified": verdicts})
    for reader, verdict in verdicts.items():
        say(f"export: {reader}: {verdict}")


def plan_export(config: RunConfig, student: ModelSource) -> Artifact:
    """The artefact of this stage, fingerprinted by the student it is made from."""
    run = RunDirectory(config.run_dir)
    return run.artifact(layout.EXPORT, KIND, VERSION, {"student": student.label}, {"student": student.fingerprint})


def plan(config: RunConfig) -> list[str]:
    """One line: what would be done."""
    try:
        artifact = plan_export(config, exported_student(config))
    except ArtifactError as error:
        return [f"export: waits for earlier stages ({error})"]
    state = "finished, kept" if artifact.finished else "to be written"
    return [f"export: {state} ({artifact.storage.uri})"]


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("Export the first student of a run and verify that it reloads.", export, argv, plan)


if __name__ == "__main__":
    sys.exit(main())
