"""Take out what changes nothing, and join movers that follow each other (L6).

Exporters leave these behind, and each would stand between a producer and the kernel it could fuse with.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgeq.ir import query
from edgeq.rewrite.match import Edit, each, operands, producer, rank, symbols

NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1, "Max": -math.inf, "Min": math.inf}
"""Op of two -> the constant that leaves the other operand as it is."""

REGROUPING = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
"""Ops that keep the elements and their order."""

ENDLESS = 10**9
"""An end of a Slice that no axis reaches."""

SAME_OF_ONE = ("Concat", "Sum", "Max", "Min", "Mean")
"""Ops of any number of inputs that return the only one they have."""


def _drop_noop(node: ir.Node, edit: Edit) -> bool:
    return _is_noop(node) and edit.bypass(node, _kept(node))


def _kept(node: ir.Node) -> ir.Value | None:
    pair = operands(node) if node.op_type in NEUTRAL else None
    return pair[0] if pair is not None else node.inputs[0]


def _is_noop(node: ir.Node) -> bool:
    match node.op_type:
        case "Identity":
            return True
        case "Dropout":
            training = node.inputs[2] if len(node.inputs) > 2 else None
            flag = query.constant(training)
            return training is None or (flag is not None and not flag.any())
        case "Cast":
            source = node.inputs[0]
            return source is not None and source.dtype is not None and source.dtype == query.attribute(node, "to")
        case "Reshape":
            return reshape_keeps(node)
        case "Flatten":
            return rank(node.inputs[0]) == 2 and query.attribute(node, "axis", 1) in (1, -1)
        case "Transpose":
            permutation = query.attribute(node, "perm")
            return permutation is not None and tuple(permutation) == tuple(range(len(permutation)))
        case "Expand" | "Tile":
            return _repeats_nothing(node)
        case "Pad":
            pads = query.attribute(node, "pads") if len(node.inputs) < 2 else query.constant(node.inputs[1])
            return pads is not None and not np.any(pads)
        case "Slice":
            return _slices_all(node)
        case "AveragePool" | "MaxPool":
            return _pools_nothing(node)
    if node.op_type in NEUTRAL and len(node.inputs) == 2:
        return _neutral(node)
    return node.op_type in SAME_OF_ONE and len(node.inputs) == 1


def reshape_keeps(node: ir.Node) -> bool:
    """At most one axis is not known to stay; the count of elements settles that one."""
    shape, target = symbols(node.inputs[0]), query.constant(node.inputs[1])
    if shape is None or target is None or len(shape) != target.size:
        return False
    copies = not query.attribute(node, "allowzero", 0)
    moved = [
        index
        for index, (dim, wanted) in enumerate(zip(shape, target.tolist(), strict=True))
        if wanted != dim and not (wanted == 0 and copies)
    ]
    rest = [dim for index, dim in enumerate(shape) if index not in moved]
    return not moved or (len(moved) == 1 and target[moved[0]] == -1 and 0 not in rest)


def _repeats_nothing(node: ir.Node) -> bool:
    shape, target = symbols(node.inputs[0]), query.constant(node.inputs[1])
    if shape is None or target is None or target.size > len(shape):
        return False
    if node.op_type == "Tile":
        return bool((target == 1).all())
    padded = [1] * (len(shape) - target.size) + target.tolist()
    return all(wanted in (1, dim) for wanted, dim in zip(padded, shape, strict=True))


def _slices_all(node: ir.Node) -> bool:
    if len(node.inputs) < 3:
        return False
    shape = query.dims(node.inputs[0])
    starts, ends = query.constant(node.inputs[1]), query.constant(node.inputs[2])
    named = query.constant(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    steps = query.constant(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else np.ones(1)
    if starts is None or ends is None or steps is None or not (steps == 1).all() or (starts != 0).any():
        return False
    if len(node.inputs) > 3 and node.inputs[3] is not None and named is None:
        return False
    chosen = range(ends.size) if named is None else named.tolist()
    limits = [None if shape is None else shape[axis] for axis in chosen]
    # Exporters write 10^9 or the largest int32 or int64 for "to the end".
    return all(end >= (ENDLESS if dim is None else dim) for end, dim in zip(ends.tolist(), limits, strict=True))


def _pools_nothing(node: ir.Node) -> bool:
    kernel = query.attribute(node, "kernel_shape")
    strides, pads = query.attribute(node, "strides", (1,)), query.attribute(node, "pads", (0,))
    return math.prod(kernel) == 1 and math.prod(strides) == 1 and not any(pads)


def _neutral(node: ir.Node) -> bool:
    """x + 0, x * 1, max(x, -inf), ... where the constant doesn't make the result larger than x."""
    pair = operands(node)
    if pair is None or (node.op_type in ("Sub", "Div") and pair[0] is not node.inputs[0]):
        return False
    value, other = pair
    shape, small = query.dims(value), query.dims(other)
    if shape is None or small is None or len(small) > len(shape) or other.dtype == ir.DataType.STRING:
        return False
    tail = shape[len(shape) - len(small) :]
    if any(dim not in (1, wide) for dim, wide in zip(small, tail, strict=True)):
        return False
    array = query.constant(other)
    return array is not None and bool((array == NEUTRAL[node.op_type]).all())


def _merge_regroupings(node: ir.Node, edit: Edit) -> bool:
    """Two that only regroup axes -> none when the shape is the first one again, one when the second is a Reshape."""
    before = producer(node.inputs[0], *REGROUPING)
    if before is None or before.graph is not node.graph:
        return False
    shape, inputs = symbols(before.inputs[0]), tuple(node.inputs)
    if shape is not None and None not in shape and shape == symbols(node.outputs[0]):
        return edit.bypass(node, before.inputs[0]) and edit.erase(inputs)
    target = query.constant(node.inputs[1]) if node.op_type == "Reshape" else None
    if target is None:
        return False
    copied = [] if query.attribute(node, "allowzero", 0) else np.flatnonzero(target == 0).tolist()
    if copied and not _same_axes(before.inputs[0], before.outputs[0], copied):
        return False  # a size of the tensor in between
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    output = node.outputs[0]
    edit.swap(node, [edit.node(node, "Reshape", [before.inputs[0], node.inputs[1]], attributes, like=output)])
    return True


def _same_axes(a: ir.Value | None, b: ir.Value, axes: list[int]) -> bool:
    """Whether two tensors have the same number or name along each of the axes."""
    first, second = symbols(a) or (), symbols(b) or ()
    return all(
        axis < min(len(first), len(second)) and first[axis] is not None and first[axis] == second[axis] for axis in axes
    )


def _drop_empty_part(node: ir.Node, edit: Edit) -> bool:
    """Concat with parts that hold nothing -> of the others: what is left of a head that is rotated as a whole."""
    axis = query.attribute(node, "axis")
    kept = [value for value in node.inputs if (query.dims(value) or {axis: None})[axis] != 0]
    if not kept or len(kept) == len(node.inputs):
        return False
    edit.swap(node, [edit.node(node, "Concat", kept, {"axis": axis}, like=node.outputs[0])])
    return True


def _merge_transposes(node: ir.Node, edit: Edit) -> bool:
    """Transpose of Transpose -> one, or none."""
    before = producer(node.inputs[0], "Transpose")
    second = query.attribute(node, "perm")
    first = None if before is None else query.attribute(before, "perm")
    if before is None or first is None or second is None or before.graph is not node.graph:
        return False
    permutation = [first[axis] for axis in second]
    if permutation == list(range(len(permutation))):
        source, inputs = before.inputs[0], tuple(node.inputs)
        return edit.bypass(node, source) and edit.erase(inputs)
    output = node.outputs[0]
    edit.swap(node, [edit.node(node, "Transpose", [before.inputs[0]], {"perm": permutation}, like=output)])
    return True


drop_noops = each(
    _drop_noop,
    *("Identity", "Dropout", "Cast", "Reshape", "Flatten", "Transpose", "Expand", "Tile", "Pad", "Slice"),
    *("AveragePool", "MaxPool", "Add", "Sub", "Mul", "Div", *SAME_OF_ONE),
)
drop_empty_parts = each(_drop_empty_part, "Concat")
merge_transposes = each(_merge_transposes, "Transpose")
merge_regroupings = each(_merge_regroupings, *REGROUPING)
