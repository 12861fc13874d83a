"""Makes an ONNX file a Core ML package and reads it back (L3, stands alone).

``python coreml_worker.py FOLDER`` runs in the environment of onnx2coreml, which has no edgeq. The folder holds
``job.json``; ``result.json`` and the package are left there. Nothing is run: Core ML itself is part of macOS and iOS.

onnx2coreml knows no Q/DQ, and Core ML has both from iOS 17 on: the two lowerings here keep them. coremltools then
stores a DequantizeLinear of constants as ``constexpr_affine_dequantize``: codes, with a scale a channel.
"""

import json
import sys
from collections import Counter
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("onnx2coreml", "coremltools")
CODES = ("uint8", "int8")  # of Core ML's quantize and dequantize
SHIFT = 2.0**-11  # half a step of an f16, of a number: what rounding it may change


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    result: dict[str, Any] = {"sdk": ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)}
    try:
        convert(job, folder / "model.mlpackage")
        result.update(described(folder / "model.mlpackage"))
    except Exception as error:  # noqa: BLE001 - what the tools raise shares no type
        result["error"] = told(error)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def convert(job: dict[str, Any], path: Path) -> None:
    """``job``: the ``model``, the oldest ``system`` it is for (``iOS17``), ``floats`` (``FLOAT16`` or ``FLOAT32``)."""
    import coremltools
    import onnx
    from onnx2coreml import Converter

    system, floats = coremltools.target[job["system"]], coremltools.precision[job["floats"]]
    narrow = floats == coremltools.precision.FLOAT16
    converter = Converter()
    converter.register("QuantizeLinear")(partial(quantize, narrow))
    converter.register("DequantizeLinear")(partial(dequantize, narrow))
    program = converter.to_mil(onnx.load(job["model"]), target=system, precision=floats)
    settings = {"minimum_deployment_target": system, "compute_precision": floats}
    coremltools.convert(program, convert_to="mlprogram", skip_model_load=True, **settings).save(str(path))


def quantize(narrow: bool, context: Any, node: Any) -> Any:
    """Floats -> codes, with one scale or one a channel."""
    from coremltools.converters.mil import Builder

    given = context.values_map[node.input[0]]
    scale, zero_point, axis = mapping(context, node, given)
    check(scale, zero_point, narrow)
    return Builder.quantize(
        input=given, scale=scale, zero_point=zero_point, output_dtype=str(zero_point.dtype), **axis, name=node.output[0]
    )


def dequantize(narrow: bool, context: Any, node: Any) -> Any:
    """Codes -> floats. Constants that no operator decodes become numbers: biases of 32 bits, and weights all of whose
    scales are too small for an f16."""
    from coremltools.converters.mil import Builder

    given = context.values_map[node.input[0]]
    scale, zero_point, axis = mapping(context, node, given)
    if given.val is not None and (zero_point.dtype.name not in CODES or (narrow and coarse(scale))):
        shape = [-1 if place == axis["axis"] else 1 for place in range(given.rank)] if axis else ()
        codes = given.val.astype(np.float64) - zero_point.astype(np.float64).reshape(shape)
        return Builder.const(val=(codes * scale.reshape(shape)).astype(np.float32), name=node.output[0])
    check(scale, zero_point, narrow)
    return Builder.dequantize(input=given, scale=scale, zero_point=zero_point, **axis, name=node.output[0])


def mapping(context: Any, node: Any, given: Any) -> tuple[Any, Any, dict[str, int]]:
    """(f32 scale, zero point, the axis they run along where they are vectors) of a Q or DQ."""
    from onnx import helper

    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    if attributes.get("block_size"):
        raise ValueError("a scale for each block of elements, Core ML has one a tensor or channel")
    values = [context.values_map[name].val for name in node.input[1:] if name]
    if any(value is None for value in values):
        raise ValueError("its scale or zero point is computed, Core ML has constants")
    scale = np.asarray(values[0], np.float32)
    kind = "uint8" if given.val is None else given.val.dtype
    zero_point = np.asarray(values[1] if len(values) > 1 else np.zeros(scale.shape, kind))
    if scale.size == 1:
        return scale.reshape(()), zero_point.reshape(()), {}
    return scale, zero_point, {"axis": int(attributes.get("axis", 1)) % given.rank}


def check(scale: Any, zero_point: Any, narrow: bool) -> None:
    """ValueError for what Core ML's operators don't take."""
    if zero_point.dtype.name not in CODES:
        raise ValueError(f"codes are {zero_point.dtype}, Core ML's {' or '.join(CODES)}")
    if narrow and coarse(scale):
        raise ValueError(f"no scale of a program in 16-bit floats is {scale.max():.3g}")


def coarse(scale: Any) -> bool:
    """Whether rounding to f16 shifts a scale by more than it would the largest one, were that no tiny number."""
    shift = np.abs(scale.astype(np.float16).astype(np.float64) - scale)
    return bool(shift.max() > SHIFT * scale.max())


def described(path: Path) -> dict[str, Any]:
    """What the package at ``path`` holds, read back: its operators by type, its inputs and outputs."""
    from coremltools.models import utils

    spec = utils.load_spec(str(path))
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    nodes = Counter(operation.type for operation in block.operations if operation.type != "const")
    return {
        "nodes": dict(nodes.most_common()),
        "inputs": [one.name for one in spec.description.input],
        "outputs": [one.name for one in spec.description.output],
    }


def told(error: Exception) -> str:
    """What went wrong, and at which node."""
    from onnx2coreml import ConversionError, UnsupportedOpError

    if isinstance(error, UnsupportedOpError):
        return "; ".join(f"node {nodes[0]!r}: it has no {kind}" for kind, nodes in sorted(error.missing.items()))
    if isinstance(error, ConversionError):
        return f"node {error.node_name!r} ({error.op_key}): {error.cause}"
    return str(error)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
