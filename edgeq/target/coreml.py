"""Packages for Core ML, made by onnx2coreml and coremltools in their own Python environment (L3).

They run on Linux too, and Core ML doesn't: a package is read back, and never run here.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import onnx_ir as ir

from edgeq.errors import ModelError, TargetError
from edgeq.ir import io, query
from edgeq.target import coreml_worker
from edgeq.target.context import Compiled
from edgeq.target.environment import run_toolkit
from edgeq.target.record import Target

SYSTEM = "iOS17"  # and macOS 14: the first with operators for codes of activations
FLOATS = {"f16": "FLOAT16", "f32": "FLOAT32"}  # float_format -> coremltools' word for what a program computes in
TYPES = (  # of inputs; those of 64 bits become 32
    ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL,
)  # fmt: skip


def compile_coreml(model: ir.Model, origin: Path, target: Target, path: Path) -> Compiled:
    """An ML program of ``model``, read from ``origin``, as the package ``path``. Floats are those of the target, Q/DQ
    stay what they are.

    RuntimeUnavailableError without the tools, ModelError where they refuse the model or a node of it."""
    if target.float_format not in FLOATS:
        raise TargetError(
            f"target {target.name!r} computes floats in {target.float_format}, ML programs in {' or '.join(FLOATS)}",
            hint="set its float_format to one of them",
        )
    _check_inputs(model, origin)
    with tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        io.write(model, folder / "model.onnx")
        job = {"model": str(folder / "model.onnx"), "system": SYSTEM, "floats": FLOATS[target.float_format]}
        result = run_toolkit(target, coreml_worker.__file__, folder, job)
        if "error" in result:
            raise ModelError(
                f"{result['sdk']} can't compile {origin}: {result['error']}",
                hint="nothing of com.microsoft is taken: export it without weights, for a target with fuse = []",
            )
        shutil.move(folder / "model.mlpackage", path)
    made_for = {"sdk": result["sdk"], "system": SYSTEM, "floats": target.float_format}
    names = {key: ", ".join(result[key]) for key in ("inputs", "outputs")}
    return Compiled(path, {**made_for, **names}, result["nodes"])


def _check_inputs(model: ir.Model, origin: Path) -> None:
    for value in model.graph.inputs:
        dims = query.dims(value)
        if dims is None or None in dims:
            raise ModelError(
                f"input {value.name!r} of {origin} has no fixed shape, and Core ML's tools take no other",
                hint=f"pin it: --input {value.name}=1,3,224,224",
            )
        if not dims or value.dtype not in TYPES:
            what = "is a scalar" if not dims else f"is {value.dtype}"
            raise ModelError(
                f"input {value.name!r} of {origin} {what}, which no input of Core ML is",
                hint="inputs are tensors of f32, f16, i32 or bool; edgeq export fixes a scalar that all samples share",
            )
