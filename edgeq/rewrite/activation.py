"""Give activations that exporters wrote out as arithmetic their names back: GELU, HardSwish, HardSigmoid, ReLU6 (L6).

A product is matched as a set of factors and one number (``match.product``), so that neither the order of the
multiplications nor where the constants stand multiplies the patterns.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.ir import query
from edgeq.rewrite.match import Edit, close, each, operands, plus, producer, product, read_once, scalar

GELU_OPSET, HARD_SWISH_OPSET = 20, 14
TANH_SCALE, TANH_CUBE = math.sqrt(2 / math.pi), 0.044715  # Hendrycks & Gimpel, arXiv:1606.08415
HARD_SIGMOIDS = ((1 / 6, 0.5), (0.2, 0.5))
"""(alpha, beta) that are meant as HardSigmoid: MobileNetV3's and Keras'. Others stay Clip of an affine function."""


def _name_gelu(node: ir.Node, edit: Edit) -> bool:
    """``x/2 (1 + erf(x/sqrt 2))`` -> Gelu; with tanh -> Gelu(approximate="tanh")."""
    factors, constant = product(node.outputs[0])
    if edit.opset < GELU_OPSET or len(factors) != 2 or not close(constant, 0.5):
        return False
    for x, gate in (factors, factors[::-1]):
        inner = plus(gate, 1.0)
        if producer(inner, "Erf") is not None and _is_scaled(inner, x, math.sqrt(0.5)):
            return _become(node, "Gelu", x, edit)
        if producer(inner, "Tanh") is not None and _is_tanh_argument(inner, x):
            return _become(node, "Gelu", x, edit, approximate="tanh")
    return False


def _become(node: ir.Node, op: str, x: ir.Value, edit: Edit, **attributes: Any) -> bool:
    edit.swap(node, [edit.node(node, op, [x], attributes, like=node.outputs[0])])
    return True


def _argument(value: ir.Value | None) -> ir.Value:
    node = None if value is None else value.producer()
    assert node is not None and node.inputs[0] is not None
    return node.inputs[0]


def _is_scaled(function: ir.Value | None, x: ir.Value, scale: float) -> bool:
    factors, constant = product(_argument(function))
    return factors == [x] and close(constant, scale)


def _is_tanh_argument(tanh: ir.Value | None, x: ir.Value) -> bool:
    """``k (x + c x^3)`` or ``k x (1 + c x^2)``."""
    factors, constant = product(_argument(tanh))
    if not close(constant, TANH_SCALE):
        return False
    if len(factors) == 1:
        node = producer(factors[0], "Add")
        parts = [] if node is None else [part for part in node.inputs if part is not None]
        return x in parts and any(_is_power(part, x, 3) for part in parts)
    if len(factors) == 2 and x in factors:
        rest = plus(factors[1] if factors[0] is x else factors[0], 1.0)
        return rest is not None and _is_power(rest, x, 2)
    return False


def _is_power(value: ir.Value, x: ir.Value, exponent: int) -> bool:
    """``TANH_CUBE * x^exponent``, as a product or with Pow."""
    factors, constant = product(value)
    count = 0
    for factor in factors:
        power = producer(factor, "Pow")
        if power is not None and power.inputs[0] is x:
            count += round(scalar(power.inputs[1]) or 0)
        else:
            count += 1 if factor is x else exponent + 1
    return count == exponent and close(constant, TANH_CUBE)


def clip_bounds(node: ir.Node) -> tuple[float, float] | None:
    """(low, high) of a Clip or Relu, from attributes or constant inputs; None when they aren't constant."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    bounds = []
    for index, (name, default) in enumerate((("min", -math.inf), ("max", math.inf)), start=1):
        given = node.inputs[index] if len(node.inputs) > index else None
        bound = query.attribute(node, name, default) if given is None else scalar(given)
        if bound is None:
            return None
        bounds.append(float(bound))
    return bounds[0], bounds[1]


def _clipped(value: ir.Value, low: float, high: float) -> ir.Value | None:
    """The x of ``value = Clip(x, low, high)``, else None."""
    node = producer(value, "Clip")
    bounds = None if node is None else clip_bounds(node)
    if node is None or bounds is None or abs(bounds[0] - low) > 1e-6 or not close(bounds[1], high):
        return None
    return node.inputs[0]


def _name_hard_swish(node: ir.Node, edit: Edit) -> bool:
    """``x Clip(x + 3, 0, 6) / 6`` or ``x HardSigmoid(x)`` with 1/6 and 1/2 -> HardSwish."""
    factors, constant = product(node.outputs[0])
    if edit.opset < HARD_SWISH_OPSET or len(factors) != 2:
        return False
    for x, gate in (factors, factors[::-1]):
        inner = _clipped(gate, 0.0, 6.0)
        if inner is not None and plus(inner, 3.0) is x and close(constant, 1 / 6):
            return _become(node, "HardSwish", x, edit)
        sigmoid = producer(gate, "HardSigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is x and close(constant, 1.0):
            alpha, beta = query.attribute(sigmoid, "alpha", 0.2), query.attribute(sigmoid, "beta", 0.5)
            if close(alpha, 1 / 6) and close(beta, 0.5):
                return _become(node, "HardSwish", x, edit)
    return False


def _name_hard_sigmoid(node: ir.Node, edit: Edit) -> bool:
    """``Clip(x + 3, 0, 6) / 6`` or ``Clip(alpha x + beta, 0, 1)`` -> HardSigmoid."""
    if node.op_type == "Clip":
        return _name_clipped_line(node, edit)
    factors, constant = product(node.outputs[0])
    inner = _clipped(factors[0], 0.0, 6.0) if len(factors) == 1 and close(constant, 1 / 6) else None
    x = plus(inner, 3.0)
    return x is not None and _become(node, "HardSigmoid", x, edit, alpha=1 / 6, beta=0.5)


def _name_clipped_line(node: ir.Node, edit: Edit) -> bool:
    line = producer(_clipped(node.outputs[0], 0.0, 1.0), "Add")
    pair = None if line is None else operands(line)
    if pair is None or not read_once(pair[0]):
        return False
    factors, slope = product(pair[0])
    for alpha, beta in HARD_SIGMOIDS:
        if len(factors) == 1 and close(slope, alpha) and close(scalar(pair[1]), beta):
            return _become(node, "HardSigmoid", factors[0], edit, alpha=alpha, beta=beta)
    return False


def _join_clips(node: ir.Node, edit: Edit) -> bool:
    """A Relu or Clip in front of a Clip, or a Relu behind one -> one Clip (what a quantizer's range replaces)."""
    before = producer(node.inputs[0], "Relu", "Clip")
    if before is None or before.graph is not node.graph or node.graph is None or not query.is_float(node.inputs[0]):
        return False
    inner, outer = clip_bounds(before), clip_bounds(node)
    dtype = node.outputs[0].dtype
    if inner is None or outer is None or dtype is None or inner[0] > inner[1] or outer[0] > outer[1]:
        return False
    low, high = (min(max(bound, outer[0]), outer[1]) for bound in inner)
    if (low, high) == (0.0, math.inf):
        return _become(node, "Relu", _argument(before.outputs[0]), edit)
    if edit.opset < 11:
        attributes = {name: value for name, value in (("min", low), ("max", high)) if math.isfinite(value)}
        return _become(node, "Clip", _argument(before.outputs[0]), edit, **attributes)
    bounds = [_bound(node, name, value, dtype.numpy(), edit) for name, value in (("min", low), ("max", high))]
    inputs = [before.inputs[0], *(bounds if bounds[1] is not None else bounds[:1])]
    edit.swap(node, [edit.node(node, "Clip", inputs, like=node.outputs[0])])
    return True


def _bound(node: ir.Node, name: str, value: float, dtype: np.dtype[Any], edit: Edit) -> ir.Value | None:
    if not math.isfinite(value) or node.graph is None:
        return None
    array: NDArray[Any] = np.array(value, dtype)
    return edit.constant(node.graph, f"{node.name}_{name}", array)


name_gelus = each(_name_gelu, "Mul", "Div")
name_hard_swishes = each(_name_hard_swish, "Mul", "Div")
name_hard_sigmoids = each(_name_hard_sigmoid, "Mul", "Div", "Clip")
join_clips = each(_join_clips, "Clip", "Relu")
