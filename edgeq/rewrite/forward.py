"""Fold a scalar scale and shift into the Conv in front of which they stand (L6).

Blocks with a learnt scale and shift behind the activation (PP-LCNetV3) have one before every Conv. A scale goes into
the weight, since a padded 0 scaled is 0. A shift goes into the bias only where the Conv doesn't pad: a border sees 0
and not the shift. Per-channel scales stay: they would make the weights of an output channel uneven, which 8 bits don't
hold.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.ir import query
from edgeq.rewrite.affine import Affine, Vector, moved_bias, weight_dtype
from edgeq.rewrite.match import Edit, each, finite, operands, producer, rank, read_once, scalar


def _fold_forward(conv: ir.Node, edit: Edit) -> bool:
    """A scalar ``s * x + t`` in front of a Conv goes into it; where it pads, only s does and ``x + t/s`` stays."""
    changed = False
    while (step := _step_forward(conv, edit)) is not None:
        conv, changed = step, True
    return changed


def _step_forward(conv: ir.Node, edit: Edit) -> ir.Node | None:
    before, weight = producer(conv.inputs[0], "Mul", "Add"), query.constant(conv.inputs[1])
    if before is None or weight is None or before.graph is not conv.graph or not read_once(before.outputs[0]):
        return None
    pair = operands(before)
    number = scalar(pair[1]) if pair is not None else None
    if pair is None or number is None or not _keeps_rank(pair) or not query.is_float(pair[1]):
        return None
    if before.op_type == "Mul":
        return _scaled_input(conv, pair[0], weight * np.float64(number), None, edit)
    if not _pads(conv):
        shift = weight.reshape(weight.shape[0], -1).astype(np.float64).sum(1) * number
        return _scaled_input(conv, pair[0], weight, shift, edit)
    return _shift_first(conv, before, pair[0], number, edit)


def _keeps_rank(pair: tuple[ir.Value, ir.Value]) -> bool:
    return (rank(pair[1]) or 0) <= (rank(pair[0]) or 1)


def _pads(conv: ir.Node) -> bool:
    automatic = query.attribute(conv, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return automatic or any(query.attribute(conv, "pads", ()))


def _scaled_input(
    conv: ir.Node, data: ir.Value, weight: NDArray[Any], shift: Vector | None, edit: Edit
) -> ir.Node | None:
    kernel, bias = (*conv.inputs, None)[1:3]
    moved = moved_bias(bias, Affine(data, None, shift), weight.shape[0])
    if moved is None or kernel is None or conv.graph is None or not finite(weight_dtype(kernel), weight, moved):
        return None
    if shift is None:
        kernel = edit.reweighed(kernel, weight)
    elif bias is None:
        bias = edit.constant(conv.graph, f"{conv.name}_bias", moved.astype(weight_dtype(kernel)))
    else:
        bias = edit.reweighed(bias, moved)
    inputs = [data, kernel] if bias is None else [data, kernel, bias]
    new = edit.node(conv, "Conv", inputs, dict(conv.attributes), like=conv.outputs[0])
    edit.swap(conv, [new])
    return new


def _shift_first(conv: ir.Node, add: ir.Node, source: ir.Value, shift: float, edit: Edit) -> ir.Node | None:
    """``Conv(s * x + t)`` -> ``Conv'(x + t/s)`` with s in the weight, for a Conv that pads."""
    scaled = producer(source, "Mul")
    pair = operands(scaled) if scaled is not None and read_once(source) and scaled.graph is conv.graph else None
    factor = scalar(pair[1]) if pair is not None else None
    weight = query.constant(conv.inputs[1])
    if pair is None or not factor or weight is None or conv.graph is None or not _keeps_rank(pair):
        return None
    ratio = np.array(shift / factor)
    if not finite(weight.dtype, ratio):
        return None
    constant = edit.constant(conv.graph, f"{add.name}_shift", ratio.astype(weight.dtype))
    moved = edit.node(add, "Add", [pair[0], constant], like=add.outputs[0])
    conv.graph.insert_before(conv, moved)
    new = _scaled_input(conv, moved.outputs[0], weight * np.float64(factor), None, edit)
    if new is None:
        edit.erase(moved.outputs)
    return new


fold_forward = each(_fold_forward, "Conv")
