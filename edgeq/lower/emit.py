"""Write what the target loads, and describe it (L7)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir

from edgeq.ir import io
from edgeq.report.record import Artifact
from edgeq.run.session import input_specs, output_specs
from edgeq.target.record import Target
from edgeq.version import VERSION


def emit(model: ir.Model, target: Target, path: Path) -> Artifact:
    """Model -> file at ``path`` and its description. Raises OutputError when it can't be written."""
    model.producer_name, model.producer_version = "edgeq", VERSION
    io.write(model, path)
    return Artifact(
        path=str(path),
        target=target.name,
        inputs={spec.name: str(spec) for spec in input_specs(model)},
        outputs={spec.name: str(spec) for spec in output_specs(model)},
        size_bytes=io.size_bytes(path),
        digest=_digest(path),
    )


def _digest(path: Path) -> str:
    """sha256 of the file and of the external data beside it."""
    hasher = hashlib.sha256()
    for file in (path, path.with_name(path.name + ".data")):
        if file.is_file():
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    hasher.update(chunk)
    return hasher.hexdigest()
