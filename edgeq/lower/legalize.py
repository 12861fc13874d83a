"""Is the model something the target can load and compute faithfully? (L7).

Checked on the finished graph, because every step before may be extended by others: opset, stored codes, bias scales.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.errors import ModelError
from edgeq.ir import query
from edgeq.target.record import Target


def legalize(model: ir.Model, target: Target) -> ir.Model:
    """The model itself when legal. Raises ModelError naming the first node or tensor that is not."""
    opset = model.opset_imports.get("", 0)
    if opset > target.opset:
        raise ModelError(
            f"the model uses opset {opset}, target {target.name!r} takes at most {target.opset}",
            hint="export it with a lower opset",
        )
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and query.is_constant(node.inputs[0]):
            _check_codes(node, target)
    return model


def _check_codes(node: ir.Node, target: Target) -> None:
    codes, scale = query.constant(node.inputs[0]), query.constant(node.inputs[1])
    if codes is None or scale is None:
        return
    if codes.dtype == np.int8 and codes.size and int(np.abs(codes.astype(np.int16)).max()) > target.limits.weight_code_max:
        raise ModelError(
            f"weight {node.inputs[0].name!r} uses codes beyond +-{target.limits.weight_code_max} "  # type: ignore[union-attr]
            f"that target {target.name!r} multiplies without saturation",
        )
    if not np.all(np.isfinite(scale)) or float(scale.min()) < target.limits.min_scale:
        raise ModelError(f"scale {node.inputs[1].name!r} is {float(scale.min()):g}, below what {target.name!r} computes")  # type: ignore[union-attr]
