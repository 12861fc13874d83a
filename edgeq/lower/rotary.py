"""Rotary positions written out -> the RotaryEmbedding op of opset 23 (L7).

``x cos + rotated(x) sin`` with ``rotated(x) = [-x2, x1]`` of the halves of the last axis, or of what is rotated of it,
where cos and sin hold the same numbers in both halves. ONNX Runtime 1.32's kernel wants half of them and a row a
sequence of the batch: it doesn't broadcast (measured), so they are repeated once for all layers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.ir import query
from edgeq.lower import heads
from edgeq.rewrite.match import Edit, each, producer, rank, read_once, scalar

OPSET = 23


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
    return _is_part(second, x, size // 2, size) and _is_part(joined.inputs[1], x, 0, size // 2)


def _is_part(value: ir.Value | None, x: ir.Value | None, first: int, last: int) -> bool:
    """Whether the value is ``x[..., first:last]`` of x [B, heads, S, D], by Slice or by Split in two."""
    node, size = producer(value, "Slice", "Split"), (query.dims(x) or (None,))[-1]
    if node is None or node.inputs[0] is not x or size is None or value is None:
        return False
    if node.op_type == "Split":
        own = (query.dims(value) or (0,))[-1]
        begin = 0 if node.outputs[0] is value else size - (own or 0)
        ends = query.attribute(node, "axis", 0) in (-1, 3) and len(node.outputs) == 2
        return ends and (begin, own) == (first, last - first)
    start, end, axis, step = ([scalar(part) for part in node.inputs[1:]] + [None, 1.0])[:4]
    if start is None or end is None or axis not in (-1, 3) or step != 1:
        return False
    start, end = (bound + size if bound < 0 else bound for bound in (start, end))
    return (start, min(end, size)) == (first, last)


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
    batch = edit.node(node, "Shape", [heads.origin(x)[0]], {"start": 0, "end": 1})
    wanted = edit.node(node, "Concat", [batch.outputs[0], ones], {"axis": 0})
    expand = edit.node(node, "Expand", [table, wanted.outputs[0]])
    for made in (batch, wanted):
        made.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    expand.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return [batch, wanted, expand]


def _rotate_part(node: ir.Node, edit: Edit) -> bool:
    """``[rotated(x[..., :d]), x[..., d:]]`` -> rotated in its first d numbers."""
    if query.attribute(node, "axis") not in (-1, 3) or len(node.inputs) != 2:
        return False
    rotation = producer(node.inputs[0], "RotaryEmbedding")
    cut = producer(rotation.inputs[0], "Slice", "Split") if rotation is not None else None
    x, size = (cut.inputs[0], (query.dims(cut.inputs[0]) or (None,))[-1]) if cut is not None else (None, None)
    width = (query.dims(node.inputs[0]) or (None,))[-1]
    if rotation is None or x is None or width is None or size is None or rank(x) != 4:
        return False
    if query.attribute(rotation, "rotary_embedding_dim", 0):
        return False
    if not _is_part(rotation.inputs[0], x, 0, width) or not _is_part(node.inputs[1], x, width, size):
        return False
    inputs, attributes = [x, *rotation.inputs[1:]], heads.attributes(rotation) | {"rotary_embedding_dim": width}
    edit.swap(node, [edit.node(node, "RotaryEmbedding", inputs, attributes, like=node.outputs[0])])
    return True


def _rotate_rows(node: ir.Node, edit: Edit) -> bool:
    """RotaryEmbedding of heads [B, heads, S, D] -> of rows [B, S, heads D], split behind it: what reads rows takes them
    as they are."""
    turned, shape = producer(node.inputs[0], "Transpose"), query.dims(node.inputs[0])
    if turned is None or shape is None or not read_once(turned.outputs[0]) or node.graph is None:
        return False
    made = heads.rows(node.inputs[0], node, edit)
    if made is None:
        return False
    source, new = made
    count = heads.count(node.inputs[0])
    attributes = heads.attributes(node) | {"num_heads": count}
    rotated = edit.node(node, "RotaryEmbedding", [source, *node.inputs[1:]], attributes, like=source)
    target = edit.constant(node.graph, f"{source.name}_heads", np.array([0, 0, count, shape[3]]))
    again = edit.node(node, "Reshape", [rotated.outputs[0], target], like=turned.inputs[0])
    split = edit.node(node, "Transpose", [again.outputs[0]], {"perm": heads.SPLIT}, like=node.outputs[0])
    edit.swap(node, [*new, rotated, again, split])
    return True


rotate = each(_rotate, "Add")
rotate_part = each(_rotate_part, "Concat")
rotate_rows = each(_rotate_rows, "RotaryEmbedding")
