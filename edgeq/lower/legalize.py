"""Is the model something the target can load and compute faithfully? (L7).

Checked on the finished graph, because every step before may be extended by others: opset, scales, sums of products.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.analyse.saturation import certify
from edgeq.errors import ModelError
from edgeq.ir import query
from edgeq.lower.fuse import newest_opset
from edgeq.target.record import Target


def legalize(model: ir.Model, target: Target) -> ir.Model:
    """The model itself when legal. Raises ModelError naming the first node or tensor that is not."""
    opset, newest = model.opset_imports.get("", 0), newest_opset(target)
    if opset > newest:
        raise ModelError(
            f"the model uses opset {opset}, target {target.name!r} takes at most {newest}",
            hint="export it with a lower opset",
        )
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and query.is_constant(node.inputs[0]):
            _check_scale(node, target)
    for sums in certify(model).nodes:
        if sums.worst > target.limits.pair_sum_max:
            raise ModelError(
                f"two products of node {sums.node!r} add to {sums.worst}, "
                f"target {target.name!r} adds up to {target.limits.pair_sum_max} without saturation",
                hint="raise the scales of its weights, or round them to nearest",
            )
    return model


def _check_scale(node: ir.Node, target: Target) -> None:
    scales = node.inputs[1]
    scale = query.constant(scales)
    if scales is None or scale is None:
        return
    if not np.all(np.isfinite(scale)) or float(np.abs(scale).min()) < target.limits.min_scale:
        raise ModelError(
            f"scale {scales.name!r} is {float(np.abs(scale).min()):g}, "
            f"target {target.name!r} computes down to {target.limits.min_scale:g}"
        )
