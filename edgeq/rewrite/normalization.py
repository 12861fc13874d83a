"""Give LayerNormalization and Softmax, written out as reductions and arithmetic, their names back (L6).

Written out they are five to fifteen tensors that would each be quantized; named, they are one float kernel with float32
sums inside. Casts to a wider float around the sums are looked through: the named op sums in float32 itself. So are the
reshapes by which JAX gives a reduced axis back, and its variance ``max(0, E[x^2] - E[x]^2)``. A normalisation over
channels that aren't last (ConvNeXt) becomes the named op between two Transposes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgeq.ir import query
from edgeq.rewrite.match import Edit, axes, close, each, operands, producer, product, rank, read_once, reader, scalar

LAYER_NORM_OPSET, SOFTMAX_OPSET = 17, 13


Axes = tuple[int, ...]
"""Axes counted from the end, ascending."""


@dataclass(frozen=True)
class Core:
    """``(x - mean) / sqrt(variance + epsilon)`` over ``axes`` of x, times ``gamma`` where that stands inside."""

    x: ir.Value
    axes: Axes
    epsilon: float
    gamma: ir.Value | None


def uncast(value: ir.Value | None) -> ir.Value | None:
    """The value behind Casts between float types."""
    while (node := producer(value, "Cast")) is not None and query.is_float(node.inputs[0]) and query.is_float(value):
        value = node.inputs[0]
    return value


def _core(node: ir.Node) -> Core | None:
    """Match the quotient: ``d / sqrt(v)``, ``d * reciprocal(sqrt(v))`` or ``d * v^-0.5``."""
    for centred, total, gamma in quotients(node):
        difference, added = producer(uncast(centred), "Sub"), producer(uncast(total), "Add")
        pair = None if added is None else operands(added)
        epsilon = scalar(pair[1]) if pair is not None else None
        x = None if difference is None else difference.inputs[0]
        if difference is None or pair is None or epsilon is None or x is None:
            continue
        mean, variance = uncast(difference.inputs[1]), uncast(pair[0])
        over = _mean_axes(_restored(mean), x)
        if not over or not all(_reduces_to_one(value, x, over) for value in (mean, variance)):
            continue
        if _is_variance(_restored(variance), difference, x, over):
            return Core(x, over, epsilon, gamma)
    return None


def quotients(node: ir.Node) -> list[tuple[ir.Value, ir.Value, ir.Value | None]]:
    """(numerator, squared denominator, constant factor of the denominator's inverse) that the node may divide."""
    a, b = node.inputs[0], node.inputs[1]
    if a is None or b is None:
        return []
    if node.op_type == "Div":
        root = producer(uncast(b), "Sqrt")
        return [] if root is None or root.inputs[0] is None else [(a, root.inputs[0], None)]
    found = []
    for numerator, factor in ((a, b), (b, a)):
        scaled = producer(factor, "Mul")
        pair = operands(scaled) if scaled is not None and read_once(factor) else None
        inverse, gamma = (factor, None) if pair is None else pair
        if (square := _inverse_root(producer(uncast(inverse), "Reciprocal", "Div", "Pow"))) is not None:
            found.append((numerator, square, gamma))
    return found


def _inverse_root(node: ir.Node | None) -> ir.Value | None:
    """The v of ``1 / sqrt(v)``."""
    if node is None:
        return None
    if node.op_type == "Pow":
        return node.inputs[0] if close(scalar(node.inputs[1]), -0.5) else None
    if node.op_type == "Div" and scalar(node.inputs[0]) != 1:
        return None
    root = producer(node.inputs[-1], "Sqrt")
    return None if root is None else root.inputs[0]


def _restored(value: ir.Value | None) -> ir.Value | None:
    """The value behind a Reshape or Unsqueeze that only gives it one more axis, of one."""
    node = producer(value, "Reshape", "Unsqueeze")
    before, after = (query.dims(node.inputs[0]), query.dims(value)) if node is not None else (None, None)
    if node is None or before is None or after is None or len(after) != len(before) + 1:
        return value
    for index in (index for index, dim in enumerate(after) if dim == 1):
        rest = after[:index] + after[index + 1 :]
        if [a for a, b in zip(before, rest, strict=True) if a is None or a != b] in ([], [None]):
            return node.inputs[0]
    return value


def _reduces_to_one(value: ir.Value | None, x: ir.Value, over: Axes) -> bool:
    """Whether the value has the rank of x and one element along ``over``, so that it broadcasts as a statistic of x."""
    shape = query.dims(value)
    return shape is not None and len(shape) == rank(x) and all(shape[axis] == 1 for axis in over)


def _mean_axes(value: ir.Value | None, x: ir.Value) -> Axes:
    """The axes of x over which the value is its mean; none when it isn't."""
    node = producer(value, "ReduceMean", "Mul", "Div")
    scale = 1.0
    if node is not None and node.op_type != "ReduceMean":
        factors, scale = product(node.outputs[0])
        node = producer(factors[0], "ReduceSum") if len(factors) == 1 else None
    found, shape = (None if node is None else axes(node)), query.dims(x)
    if node is None or found is None or shape is None or uncast(node.inputs[0]) is not uncast(x):
        return ()
    over = tuple(sorted(axis % len(shape) - len(shape) for axis in found))
    if node.op_type == "ReduceSum":
        sizes = [shape[axis] for axis in over]
        if None in sizes or not close(scale, 1 / math.prod(size or 0 for size in sizes)):
            return ()
    return over


def _is_variance(value: ir.Value | None, difference: ir.Node, x: ir.Value, over: Axes) -> bool:
    """``E[d^2]`` of this difference, or ``E[x^2] - E[x]^2`` with or without a max with 0."""
    clamped = producer(value, "Max", "Relu")
    if clamped is not None:
        pair = operands(clamped) if clamped.op_type == "Max" else None
        value = clamped.inputs[0] if pair is None else pair[0]
        if pair is not None and scalar(pair[1]) != 0:
            return False
    gap = producer(value, "Sub")
    if gap is None:
        squares = _averaged(value)
        return squares is not None and _is_square(squares, difference) and _mean_axes(value, squares) == over
    squares, mean = _averaged(gap.inputs[0]), squared(gap.inputs[1])
    if squares is None or mean is None or _mean_axes(mean, x) != over:
        return False
    return uncast(squared(squares)) is uncast(x) and _mean_axes(gap.inputs[0], squares) == over


def _averaged(value: ir.Value | None) -> ir.Value | None:
    """What a mean is taken of."""
    node = producer(value, "ReduceMean", "Mul", "Div")
    if value is not None and node is not None and node.op_type != "ReduceMean":
        factors, _ = product(value)
        node = producer(factors[0], "ReduceSum") if len(factors) == 1 else None
    return None if node is None else uncast(node.inputs[0])


def squared(value: ir.Value | None) -> ir.Value | None:
    """The x of ``x * x`` or ``x ^ 2``."""
    node = producer(uncast(value), "Pow", "Mul")
    if node is None:
        return None
    same = close(scalar(node.inputs[1]), 2.0) if node.op_type == "Pow" else node.inputs[0] is node.inputs[1]
    return node.inputs[0] if same else None


def _is_square(value: ir.Value | None, difference: ir.Node) -> bool:
    """``d^2`` of this difference or of one with the same operands."""
    node = producer(uncast(value), "Pow", "Mul")
    if node is None:
        return False
    if node.op_type == "Pow":
        return close(scalar(node.inputs[1]), 2.0) and _same_difference(node.inputs[0], difference)
    return all(_same_difference(factor, difference) for factor in node.inputs)


def _same_difference(value: ir.Value | None, difference: ir.Node) -> bool:
    node = producer(uncast(value), "Sub")
    return node is difference or (
        node is not None and [uncast(a) for a in node.inputs] == [uncast(b) for b in difference.inputs]
    )


def _name_layer_norm(node: ir.Node, edit: Edit) -> bool:
    """The quotient with the Mul and Add of constants behind it -> LayerNormalization."""
    core = _core(node) if edit.opset >= LAYER_NORM_OPSET else None
    if core is None or core.x.dtype is None or node.graph is None or node.outputs[0].dtype != core.x.dtype:
        return False
    last, gamma = (node, core.gamma) if core.gamma is not None else _parameter(node, "Mul", core)
    last, beta = _parameter(last, "Add", core)
    shape = [(query.dims(core.x) or ())[axis] for axis in core.axes]
    trailing = core.axes == tuple(range(-len(core.axes), 0))
    if None in shape or not (trailing or len(core.axes) == 1) or (gamma is not None and not _spans(gamma, core)):
        return False
    sizes = tuple(int(size or 0) for size in shape)
    if gamma is None:
        gamma = edit.constant(node.graph, f"{node.name}_scale", np.ones(sizes, core.x.dtype.numpy()))
    parameters = [_shaped(constant, sizes, edit) for constant in (gamma, beta) if constant is not None]
    edit.swap(last, _layer_norm(last, core, parameters, edit) if trailing else _turned(last, core, parameters, edit))
    return True


def _layer_norm(last: ir.Node, core: Core, parameters: list[ir.Value], edit: Edit) -> list[ir.Node]:
    attributes = {"axis": core.axes[0], "epsilon": core.epsilon}
    return [edit.node(last, "LayerNormalization", [core.x, *parameters], attributes, like=last.outputs[0])]


def _turned(last: ir.Node, core: Core, parameters: list[ir.Value], edit: Edit) -> list[ir.Node]:
    """The normalisation over one axis that isn't last, between a Transpose that makes it the last and one back."""
    count = rank(core.x) or 0
    axis = core.axes[0] % count
    there = [index for index in range(count) if index != axis] + [axis]
    back = [there.index(index) for index in range(count)]
    first = edit.node(last, "Transpose", [core.x], {"perm": there})
    first.outputs[0].type = core.x.type
    attributes = {"axis": -1, "epsilon": core.epsilon}
    norm = edit.node(last, "LayerNormalization", [first.outputs[0], *parameters], attributes)
    norm.outputs[0].type = core.x.type
    return [first, norm, edit.node(last, "Transpose", [norm.outputs[0]], {"perm": back}, like=last.outputs[0])]


def _parameter(node: ir.Node, op: str, core: Core) -> tuple[ir.Node, ir.Value | None]:
    """The only reader of ``node`` and its constant, when it is ``op`` by a constant along the normalised axes."""
    after = reader(node.outputs[0], op)
    pair = None if after is None else operands(after)
    if after is None or pair is None or not _spans(pair[1], core):
        return node, None
    return after, pair[1]


def _spans(constant: ir.Value, core: Core) -> bool:
    """Whether a constant has the sizes of x along the normalised axes and one along all others."""
    found, wide = query.dims(constant), query.dims(core.x)
    if found is None or wide is None or not len(wide) >= len(found) >= -core.axes[0]:
        return False
    return all(found[axis] == (wide[axis] if axis in core.axes else 1) for axis in range(-len(found), 0))


def _shaped(constant: ir.Value, sizes: tuple[int, ...], edit: Edit) -> ir.Value:
    """The constant without the axes of one around the normalised ones."""
    array = query.constant(constant)
    assert array is not None
    return constant if array.shape == sizes else edit.reweighed(constant, array.reshape(sizes))


def _name_softmax(node: ir.Node, edit: Edit) -> bool:
    """``e / sum(e)`` with ``e = exp(x - max(x))`` along one axis -> Softmax."""
    exponential = producer(node.inputs[0], "Exp")
    difference = None if exponential is None else producer(exponential.inputs[0], "Sub")
    if edit.opset < SOFTMAX_OPSET or difference is None:
        return False
    x, e = difference.inputs[0], node.inputs[0]
    axis = _reduced(node.inputs[1], "ReduceSum", e)
    if x is None or axis is None or axis != _reduced(difference.inputs[1], "ReduceMax", x):
        return False
    edit.swap(node, [edit.node(node, "Softmax", [x], {"axis": axis}, like=node.outputs[0])])
    return True


def _reduced(value: ir.Value | None, op: str, x: ir.Value | None) -> int | None:
    """The axis, from the end, over which the value reduces x and which it keeps or is given back."""
    node, count = producer(_restored(value), op), rank(x)
    over = None if node is None else axes(node)
    if node is None or x is None or node.inputs[0] is not x or count is None or over is None or len(over) != 1:
        return None
    axis = over[0] % count - count
    return axis if _reduces_to_one(value, x, (axis,)) else None


def _join_rows(node: ir.Node, edit: Edit) -> bool:
    """Softmax of x flattened to rows and given its shape back (how opset 12 is brought to 13) -> Softmax of x, when the
    rows are the last axis."""
    rows = producer(node.inputs[0], "Softmax")
    flat = producer(rows.inputs[0], "Flatten") if rows is not None else None
    if rows is None or flat is None or query.attribute(rows, "axis", -1) not in (-1, 1) or edit.opset < SOFTMAX_OPSET:
        return False
    x = flat.inputs[0]
    count = rank(x)
    if x is None or count is None or query.attribute(flat, "axis", 1) % count != count - 1:
        return False
    if not _is_shape_of(node.inputs[1], x):
        return False
    edit.swap(node, [edit.node(rows, "Softmax", [x], {"axis": -1}, like=node.outputs[0])])
    return True


def _is_shape_of(target: ir.Value | None, x: ir.Value) -> bool:
    taken, written, shape = producer(target, "Shape"), query.constant(target), query.dims(x)
    if taken is not None:
        return taken.inputs[0] is x and not {"start", "end"} & set(taken.attributes)
    if written is None or shape is None or written.size != len(shape):
        return False
    return [dim for dim, size in zip(shape, written.tolist(), strict=True) if dim != size] in ([], [None])


name_layer_norms = each(_name_layer_norm, "Div", "Mul")
name_softmaxes = each(_name_softmax, "Div")
join_softmax_rows = each(_join_rows, "Reshape")
