"""Functions between a DequantizeLinear and a QuantizeLinear, computed on the codes (L7).

A piecewise linear function of one tensor is a Clip of its codes when the scales fit, which ``analyse/encode`` sees to:
HardSigmoid is the identity between its bounds in another scale, and HardSwish is x times that. ONNX Runtime 1.32 has
none of them on integers, while its Clip of u8 and its QLinearMul take a half to a quarter of the time of the float
kernel with Q and DQ around (measured). A rewrite compares all codes before it is made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.ir import query
from edgeq.rewrite.activation import clip_bounds
from edgeq.rewrite.match import Edit, each, producer, reader

NEAR = 1e-4  # of a code: scales are float32, and no two codes are nearer than one
SWISH_SLOPE, SWISH_REACH = 1 / 6, 3.0  # HardSwish(x) = x clip(x / 6 + 1 / 2, 0, 1)


def _clip_codes(node: ir.Node, edit: Edit) -> bool:
    """``Q(f(DQ(codes)))`` that only clips -> Clip(codes)."""
    dq, q = producer(node.inputs[0], "DequantizeLinear"), reader(node.outputs[0], "QuantizeLinear")
    codes = _all_codes(dq)
    params = _params(q)
    if dq is None or q is None or codes is None or params is None or dq.inputs[0] is None:
        return False
    exact, (scale, zero) = _function(node, _real(codes, dq)), params
    if exact is None:
        return False
    steps = np.clip(exact / np.float64(scale) + zero, codes[0], codes[-1])
    low, high = (float(np.rint(bound)) for bound in (steps[0], steps[-1]))
    if q.outputs[0].dtype != dq.inputs[0].dtype or not np.allclose(steps, np.clip(codes, low, high), rtol=0, atol=NEAR):
        return False
    edit.swap(q, [_clip(q, dq.inputs[0], low, high, edit)])
    return True


def _multiply_codes(node: ir.Node, edit: Edit) -> bool:
    """HardSwish of dequantized codes -> x times the codes clipped, where its half is a whole number of steps."""
    dq = producer(node.inputs[0], "DequantizeLinear")
    codes, params = _all_codes(dq), _params(dq)
    if dq is None or codes is None or params is None or reader(node.outputs[0], "QuantizeLinear") is None:
        return False
    (scale, zero), reach = params, SWISH_REACH / float(params[0])
    base = zero - round(reach)
    if abs(reach - round(reach)) > NEAR * reach or base < codes[0] or dq.inputs[0] is None or node.graph is None:
        return False
    clipped = _clip(node, dq.inputs[0], base, min(zero + round(reach), codes[-1]), edit)
    gate_scale = edit.constant(node.graph, f"{node.name}_gate_scale", np.array(scale * SWISH_SLOPE, np.float32))
    gate_zero = edit.constant(node.graph, f"{node.name}_gate_zero_point", np.array(base, _dtype(dq)))
    gate = edit.node(node, "DequantizeLinear", [clipped.outputs[0], gate_scale, gate_zero], like=node.outputs[0])
    edit.swap(node, [clipped, gate, edit.node(node, "Mul", [node.inputs[0], gate.outputs[0]], like=node.outputs[0])])
    return True


def _pad_codes(node: ir.Node, edit: Edit) -> bool:
    """Pad with zeros between equal scales -> Pad of the codes with the zero point."""
    dq, q = producer(node.inputs[0], "DequantizeLinear"), reader(node.outputs[0], "QuantizeLinear")
    before, after = _params(dq), _params(q)
    if dq is None or q is None or before is None or before != after or q.outputs[0].dtype != _type(dq):
        return False
    value = node.inputs[2] if len(node.inputs) > 2 else None
    filled = query.constant(value)
    if value is not None and (filled is None or filled.any()):
        return False
    if query.attribute(node, "mode", "constant") != "constant":
        return False
    inputs = [dq.inputs[0], node.inputs[1], dq.inputs[2], *node.inputs[3:4]]
    attributes = {name: attr.value for name, attr in node.attributes.items()}
    edit.swap(q, [edit.node(q, "Pad", inputs, attributes, like=q.outputs[0])])
    return True


def _function(node: ir.Node, x: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """f of all codes, in float64."""
    if node.op_type == "HardSigmoid":
        alpha, beta = query.attribute(node, "alpha", 0.2), query.attribute(node, "beta", 0.5)
        return np.asarray(np.clip(alpha * x + beta, 0.0, 1.0))
    bounds = clip_bounds(node)
    return None if bounds is None else np.clip(x, *bounds)


def _clip(near: ir.Node, codes: ir.Value, low: float, high: float, edit: Edit) -> ir.Node:
    assert near.graph is not None and codes.dtype is not None
    bounds = [
        edit.constant(near.graph, f"{near.name}_{what}", np.array(bound, codes.dtype.numpy()))
        for what, bound in (("low", low), ("high", high))
    ]
    return edit.node(near, "Clip", [codes, *bounds], like=codes)


def _params(node: ir.Node | None) -> tuple[np.float32, int] | None:
    """Scale and zero point of a Q or DQ that has one of each."""
    if node is None or len(node.inputs) < 3:
        return None
    scale, zero = query.constant(node.inputs[1]), query.constant(node.inputs[2])
    return None if scale is None or zero is None or scale.size != 1 or zero.size != 1 else (
        np.float32(scale.item()), int(zero.item()))  # fmt: skip


def _type(dq: ir.Node) -> ir.DataType | None:
    return None if dq.inputs[2] is None else dq.inputs[2].dtype


def _dtype(dq: ir.Node) -> np.dtype[Any]:
    found = _type(dq)
    assert found is not None
    return found.numpy()


def _all_codes(dq: ir.Node | None) -> NDArray[np.int64] | None:
    """Every code of an 8-bit DQ, ascending."""
    if dq is None or _params(dq) is None or _type(dq) not in (ir.DataType.UINT8, ir.DataType.INT8):
        return None
    info = np.iinfo(_dtype(dq))
    return np.arange(info.min, info.max + 1)


def _real(codes: NDArray[np.int64], dq: ir.Node) -> NDArray[np.float64]:
    scale, zero = _params(dq) or (np.float32(1), 0)
    return (codes - zero) * np.float64(scale)


clip_codes = each(_clip_codes, "HardSigmoid", "Clip", "Relu")
multiply_codes = each(_multiply_codes, "HardSwish")
pad_codes = each(_pad_codes, "Pad")
