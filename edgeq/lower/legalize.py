"""Is the model something the target can load and compute faithfully? (L7).

Checked on the finished graph, because every step before may be extended by others: opset, stored codes, bias scales.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.errors import ModelError
from edgeq.ir import query
from edgeq.ir.ops import OPS
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
    stored, scales = node.inputs[0], node.inputs[1]
    codes, scale = query.constant(stored), query.constant(scales)
    if stored is None or scales is None or codes is None or scale is None:
        return
    multiplied = any(_is_weight(use.node, use.idx) for use in node.outputs[0].uses())
    largest = int(np.abs(codes.astype(np.int64)).max()) if codes.size else 0
    if codes.dtype == np.int8 and multiplied and largest > target.limits.weight_code_max:
        raise ModelError(
            f"weight {stored.name!r} uses codes up to +-{largest}, target {target.name!r} multiplies "
            f"+-{target.limits.weight_code_max} without saturation"
        )
    if not np.all(np.isfinite(scale)) or float(np.abs(scale).min()) < target.limits.min_scale:
        raise ModelError(
            f"scale {scales.name!r} is {float(np.abs(scale).min()):g}, "
            f"target {target.name!r} computes down to {target.limits.min_scale:g}"
        )


def _is_weight(node: ir.Node, index: int) -> bool:
    """Whether a node multiplies and accumulates what it reads there; constants of an Add may use every code."""
    row = OPS.get(node.op_type)
    return row is not None and row.weight == index
