"""Tensors whose values are the pixels of a picture, as whole numbers away from a middle (L2)."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.ir import query


def codes_of(value: ir.Value) -> tuple[ir.Value, int] | None:
    """(uint8 pixels, z) where ``value`` is pixels - z for a whole z from 0 to 255: codes with a scale of 1."""
    zero, node = 0.0, value.producer()
    if node is not None and node.op_type == "Add":
        shift = query.constant(node.inputs[1])
        if shift is None or shift.size != 1:
            return None
        zero = -float(shift.item())
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None or node.op_type != "Cast" or not zero.is_integer() or not 0 <= zero <= 255:
        return None
    source = node.inputs[0]
    return None if source is None or source.dtype != ir.DataType.UINT8 else (source, int(zero))
