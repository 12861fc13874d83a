"""Rotary positions written out -> the RotaryEmbedding op of opset 23 (L7).

``x cos + rotated(x) sin`` with ``rotated(x) = [-x2, x1]`` of the halves of the last axis, where cos and sin hold the
same numbers in both halves. ONNX Runtime 1.32's kernel wants half of them and a row a sequence of the batch: it doesn't
broadcast (measured), so they are repeated once for all layers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.ir import query
from edgeq.rewrite.match import Edit, each, producer, rank, read_once, scalar

OPSET = 23
SPLIT = (0, 2, 1, 3)
ELEMENTWISE = ("Cos", "Sin", "Cast", "Identity")


def _rotate(node: ir.Node, edit: Edit) -> bool:
    """``x cos + [-x2, x1] sin`` of x [B, heads, S, D], cos and sin [B or 1, 1, S, D]."""
    if edit.opset < OPSET or rank(node.outputs[0]) != 4 or node.outputs[0].dtype != ir.DataType.FLOAT:
        return False
    straight, turned = producer(node.inputs[0], "Mul"), producer(node.inputs[1], "Mul")
    if straight is None or turned is None:
        return False
    for plain, other in ((straight, turned), (turned, straight)):
        found = _factors(plain, other)
        if found is not None:
            x, cosine, sine = found
            tables = [_table(table, x, node, edit) for table in (cosine, sine)]
            if None in tables:
                return False
            edit.swap(node, [edit.node(node, "RotaryEmbedding", [x, *tables], like=node.outputs[0])])
            return True
    return False


def _factors(plain: ir.Node, other: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """(x, cos, sin) where ``plain`` is x cos and ``other`` is rotated(x) sin."""
    for x, cosine in (plain.inputs, plain.inputs[::-1]):
        for rotated, sine in (other.inputs, other.inputs[::-1]):
            if x is None or cosine is None or sine is None:
                continue
            if _is_rotated(rotated, x) and _is_table(cosine) and _is_table(sine):
                return x, cosine, sine
    return None


def _is_rotated(value: ir.Value | None, x: ir.Value) -> bool:
    """``[-x2, x1]``."""
    joined, size = producer(value, "Concat"), (query.dims(x) or (None,))[-1]
    if joined is None or size is None or size % 2 or len(joined.inputs) != 2:
        return False
    if query.attribute(joined, "axis") not in (-1, 3):
        return False
    negative = producer(joined.inputs[0], "Neg")
    second = negative.inputs[0] if negative is not None else None
    return _is_half(second, x, 1, size) and _is_half(joined.inputs[1], x, 0, size)


def _is_half(value: ir.Value | None, x: ir.Value, which: int, size: int) -> bool:
    node = producer(value, "Slice", "Split")
    if node is None or node.inputs[0] is not x or value is None:
        return False
    if node.op_type == "Split":
        halves = query.dims(value)
        last = query.attribute(node, "axis", 0) in (-1, 3)
        return last and len(node.outputs) == 2 and node.outputs[which] is value and (halves or (0,))[-1] == size // 2
    start, end, axis, step = ([scalar(part) for part in node.inputs[1:]] + [None, 1.0])[:4]
    if start is None or end is None or axis not in (-1, 3) or step != 1:
        return False
    start, end = (bound + size if bound < 0 else bound for bound in (start, end))
    return (start, min(end, size)) == ((0, size // 2) if which == 0 else (size // 2, size))


def _is_table(value: ir.Value) -> bool:
    shape = query.dims(value)
    return shape is not None and len(shape) == 4 and shape[1] == 1 and _twice(value)


def _twice(value: ir.Value | None) -> bool:
    """Whether both halves of the last axis hold the same."""
    while value is not None:
        array = query.constant(value)
        if array is not None:
            half = array.shape[-1] // 2 if array.ndim else 0
            return half > 0 and np.array_equal(array[..., :half], array[..., half:])
        node = value.producer()
        if node is None or node.domain:
            return False
        if node.op_type == "Concat":
            a, b = node.inputs if len(node.inputs) == 2 else (None, value)
            return a is b and query.attribute(node, "axis") in (-1, (rank(value) or 0) - 1)
        if not _keeps_halves(node):
            return False
        value = node.inputs[0]
    return False


def _keeps_halves(node: ir.Node) -> bool:
    """Whether the op leaves the last axis of its first input alone, or does the same to each element."""
    before, after = query.dims(node.inputs[0]), query.dims(node.outputs[0])
    match node.op_type:
        case "Cos" | "Sin" | "Cast" | "Identity":
            return True
        case "Mul":
            return scalar(node.inputs[1]) is not None
        case "Unsqueeze" | "Squeeze" | "Reshape":
            return before is not None and after is not None and before[-1] is not None and before[-1] == after[-1]
        case "Gather":
            return query.attribute(node, "axis", 0) == 0 and (rank(node.inputs[0]) or 0) > 1
        case "Slice":
            axes = query.constant(node.inputs[3]) if len(node.inputs) > 3 else None
            last = (rank(node.inputs[0]) or 0) - 1
            return axes is not None and not {-1, last} & set(axes.reshape(-1).tolist())
        case _:
            return False


def _table(value: ir.Value, x: ir.Value, node: ir.Node, edit: Edit) -> ir.Value | None:
    """cos or sin [B or 1, 1, S, D] -> [B, S, D/2], made once for all that read it."""
    shape, graph = query.dims(value), node.graph
    assert shape is not None and graph is not None
    name = f"{value.name}_rotary"
    known = next((user for user in query.users(value) if user.name == name), None)
    if known is None:
        half = (shape[-1] or 0) // 2
        if not half:
            return None
        bounds = [edit.constant(graph, f"{name}_{what}", np.array([k])) for what, k in (("0", 0), ("half", half))]
        last, one = (edit.constant(graph, f"{name}_{what}", np.array([k])) for what, k in (("last", 3), ("heads", 1)))
        known = edit.node(node, "Slice", [value, *bounds, last])
        known.name = name
        thin = edit.node(node, "Squeeze", [known.outputs[0], one])
        shapes = [(shape[0], 1, shape[2], half), (shape[0], shape[2], half)]
        new = [known, thin]
        for made, dims in zip(new, shapes, strict=True):
            made.outputs[0].type, made.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(dims)
        if shape[0] == 1 and (query.dims(x) or (None,))[0] != 1:
            new += _repeated(thin.outputs[0], x, node, edit)
        graph.insert_before(node, new)
    after = query.users(known.outputs[0])[0].outputs[0]
    repeated = next((user for user in query.users(after) if user.op_type == "Expand"), None)
    return after if repeated is None else repeated.outputs[0]


def _repeated(table: ir.Value, x: ir.Value, node: ir.Node, edit: Edit) -> list[ir.Node]:
    """The table once for each sequence of the batch."""
    assert node.graph is not None
    ones = edit.constant(node.graph, f"{node.name}_ones", np.ones(2, np.int64))
    batch = edit.node(node, "Shape", [_rows_of(x)], {"start": 0, "end": 1})
    wanted = edit.node(node, "Concat", [batch.outputs[0], ones], {"axis": 0})
    expand = edit.node(node, "Expand", [table, wanted.outputs[0]])
    for made in (batch, wanted):
        made.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    expand.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return [batch, wanted, expand]


def _rows_of(x: ir.Value) -> ir.Value:
    """What the heads were split off, as they may go."""
    turned = producer(x, "Transpose")
    split = producer(turned.inputs[0], "Reshape") if turned is not None else None
    rows = split.inputs[0] if split is not None else None
    return rows if rows is not None and rank(rows) == 3 else x


def _rotate_rows(node: ir.Node, edit: Edit) -> bool:
    """RotaryEmbedding of heads [B, heads, S, D] that were just split off rows -> of the rows [B, S, heads D], split
    behind it: what reads rows takes them as they are."""
    turned = producer(node.inputs[0], "Transpose")
    if turned is None or tuple(query.attribute(turned, "perm", ())) != SPLIT or not read_once(turned.outputs[0]):
        return False
    split = producer(turned.inputs[0], "Reshape")
    shape = query.dims(turned.inputs[0])
    if split is None or not read_once(split.outputs[0]) or rank(split.inputs[0]) != 3 or shape is None:
        return False
    width, size = (query.dims(split.inputs[0]) or ())[-1], shape[3]
    if width is None or size is None or width % size or split.inputs[0] is None:
        return False
    attributes = {name: attr.value for name, attr in node.attributes.items()} | {"num_heads": width // size}
    rows = edit.node(node, "RotaryEmbedding", [split.inputs[0], *node.inputs[1:]], attributes, like=split.inputs[0])
    again = edit.node(node, "Reshape", [rows.outputs[0], split.inputs[1]], _plain(split), like=split.outputs[0])
    heads = edit.node(node, "Transpose", [again.outputs[0]], {"perm": SPLIT}, like=node.outputs[0])
    edit.swap(node, [rows, again, heads])
    return True


def _plain(node: ir.Node) -> dict[str, object]:
    return {name: attr.value for name, attr in node.attributes.items()}


rotate = each(_rotate, "Add")
rotate_rows = each(_rotate_rows, "RotaryEmbedding")
