"""Write what the target loads, and describe it (L7)."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from edgeq.ir import io
from edgeq.report.record import Artifact
from edgeq.run.session import input_specs, output_specs
from edgeq.target.record import Target
from edgeq.version import __version__


def emit(model: ir.Model, target: Target, path: Path) -> Artifact:
    """Model -> file at ``path``, and its description. Raises OutputError when it can't be written."""
    model.producer_name, model.producer_version = "edgeq", __version__
    io.write(model, path)
    return describe(model, target, path)


def describe(model: ir.Model, target: Target, path: Path) -> Artifact:
    """The description of ``model`` as it stands at ``path``."""
    return Artifact(
        path=str(path),
        target=target.name,
        inputs={spec.name: str(spec) for spec in input_specs(model)},
        outputs={spec.name: str(spec) for spec in output_specs(model)},
        size_bytes=io.size_bytes(path),
        digest=io.file_digest(path),
    )
