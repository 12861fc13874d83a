"""Normalizations in the forms a target runs fastest (L7).

ONNX Runtime 1.32 makes one SkipLayerNormalization of a sum and the LayerNormalization behind it, which on its CPU
provider takes six times as long as both (measured: 243 against 41 us for [1, 124, 384]). It leaves a Sum alone.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.ir import query
from edgeq.rewrite.match import Edit, axes, each, operands, producer, reader, scalar
from edgeq.rewrite.normalization import quotients, squared, uncast

RMS_OPSET = 23


def _name_rms_norm(node: ir.Node, edit: Edit) -> bool:
    """``x / sqrt(mean(x^2) + epsilon)`` along the last axis, times a constant -> RMSNormalization."""
    if edit.opset < RMS_OPSET or node.graph is None:
        return False
    for x, total, gamma in quotients(node):
        added = producer(uncast(total), "Add")
        pair = operands(added) if added is not None else None
        mean = producer(uncast(pair[0]), "ReduceMean") if pair is not None else None
        size = (query.dims(x) or (None,))[-1]
        if mean is None or pair is None or size is None or x.dtype != ir.DataType.FLOAT:
            continue
        source, epsilon, over = uncast(squared(mean.inputs[0])), scalar(pair[1]), axes(mean)
        last = len(query.dims(x) or ()) - 1
        if source is None or uncast(x) is not source or epsilon is None or over not in ((-1,), (last,)):
            continue
        if not query.attribute(mean, "keepdims", 1) or source.dtype != ir.DataType.FLOAT:
            continue
        final, scale = (node, gamma) if gamma is not None else _scale(node, size)
        if scale is None:
            scale = edit.constant(node.graph, f"{node.name}_scale", np.ones(size, np.float32))
        elif query.dims(scale) != (size,):
            return False
        attributes = {"axis": -1, "epsilon": epsilon}
        edit.swap(final, [edit.node(final, "RMSNormalization", [source, scale], attributes, like=final.outputs[0])])
        return True
    return False


def _scale(node: ir.Node, size: int) -> tuple[ir.Node, ir.Value | None]:
    """The Mul by a constant [size] behind the quotient, and it."""
    after = reader(node.outputs[0], "Mul")
    pair = operands(after) if after is not None else None
    return (
        (after, pair[1]) if after is not None and pair is not None and query.dims(pair[1]) == (size,) else (node, None)
    )


def _keep_sum_apart(node: ir.Node, edit: Edit) -> bool:
    """Add in front of a LayerNormalization -> Sum."""
    total = producer(node.inputs[0], "Add")
    if total is None or total.graph is not node.graph or any(query.is_constant(value) for value in total.inputs):
        return False
    edit.swap(total, [edit.node(total, "Sum", list(total.inputs), like=total.outputs[0])])
    return True


name_rms_norms = each(_name_rms_norm, "Div", "Mul")
keep_sums_apart = each(_keep_sum_apart, "LayerNormalization")
