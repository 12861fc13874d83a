"""Write arithmetic with constants in one way: Add and Mul, the constant second (L6).

Targets have integer kernels for Add and Mul but none for Sub and Div, and every later pattern meets one form.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.ir import query
from edgeq.rewrite.match import Edit, each, finite, operands, producer, rank, read_once, scalar

DISCRETE = frozenset(
    ("Floor", "Ceil", "Round", "Cast", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Mod", "Sign")
)
"""Readers that turn a difference of one unit in the last place into a difference of one."""


def _constant_second(node: ir.Node, _: Edit) -> bool:
    """Add and Mul with a constant first -> constant second."""
    first, second = node.inputs[0], node.inputs[1]
    if not query.is_constant(first) or query.is_constant(second):
        return False
    node.replace_input_with(0, second)
    node.replace_input_with(1, first)
    return True


def _additive(node: ir.Node, edit: Edit) -> bool:
    """``x - c`` -> ``x + (-c)``, exact for floats."""
    array = query.constant(node.inputs[1])
    if array is None or query.is_constant(node.inputs[0]) or not query.is_float(node.inputs[1]):
        return False
    return _second_to(node, "Add", -array, edit)


def _multiplicative(node: ir.Node, edit: Edit) -> bool:
    """``x / c`` -> ``x * (1/c)``: exact for powers of two, else within one unit in the last place, which is why readers
    that round or compare keep the division."""
    array = query.constant(node.inputs[1])
    if array is None or query.is_constant(node.inputs[0]) or not query.is_float(node.inputs[1]) or not array.all():
        return False
    inverse = 1 / array.astype(np.float64)
    exact = bool((np.frexp(array.astype(np.float64))[0] == 0.5).all())
    if not exact and any(user.op_type in DISCRETE for user in query.users(node.outputs[0])):
        return False
    return finite(array.dtype, inverse) and _second_to(node, "Mul", inverse, edit)


def _second_to(node: ir.Node, op: str, array: np.ndarray, edit: Edit) -> bool:
    constant = node.inputs[1]
    assert constant is not None
    inputs = [node.inputs[0], edit.reweighed(constant, array)]
    edit.swap(node, [edit.node(node, op, inputs, like=node.outputs[0])])
    return True


def _sum_of_two(node: ir.Node, edit: Edit) -> bool:
    """Sum of two -> Add, which has kernels on more targets."""
    if len(node.inputs) != 2:
        return False
    edit.swap(node, [edit.node(node, "Add", list(node.inputs), like=node.outputs[0])])
    return True


def _square(node: ir.Node, edit: Edit) -> bool:
    """``x ^ 2`` -> ``x * x``, as runtimes compute it; Mul has integer kernels."""
    if scalar(node.inputs[1]) != 2 or node.outputs[0].dtype != (node.inputs[0] or node.outputs[0]).dtype:
        return False
    edit.swap(node, [edit.node(node, "Mul", [node.inputs[0]] * 2, like=node.outputs[0])])
    return True


def _join_constants(node: ir.Node, edit: Edit) -> bool:
    """``(x + a) + b`` -> ``x + (a + b)``, ``(x * a) * b`` -> ``x * (a * b)``, where that doesn't grow the constant."""
    pair = operands(node)
    inner = producer(pair[0], node.op_type) if pair is not None and read_once(pair[0]) else None
    before = operands(inner) if inner is not None and inner.graph is node.graph else None
    if pair is None or before is None or not query.is_float(pair[1]) or pair[1].dtype != before[1].dtype:
        return False
    first, second = query.constant(before[1]), query.constant(pair[1])
    if first is None or second is None or max(first.ndim, second.ndim) > (rank(before[0]) or 1):
        return False
    wide = (np.add if node.op_type == "Add" else np.multiply)(first.astype(np.float64), second.astype(np.float64))
    if wide.size > max(first.size, second.size) or not finite(first.dtype, wide):
        return False
    inputs = [before[0], edit.reweighed(pair[1], wide)]
    edit.swap(node, [edit.node(node, node.op_type, inputs, like=node.outputs[0])])
    return True


constants_second = each(_constant_second, "Add", "Mul")
subtract_as_add = each(_additive, "Sub")
divide_as_multiply = each(_multiplicative, "Div")
sums_as_adds = each(_sum_of_two, "Sum")
squares = each(_square, "Pow")
join_constants = each(_join_constants, "Add", "Mul")
