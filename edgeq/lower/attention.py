"""Attention written out as products and a Softmax -> the Attention op of opset 23 (L7).

What is looked for around a Softmax over keys: ``softmax(scale q k^T + mask) v`` with the scale on the scores, on q, on
k or on both (torch's SDPA), the mask added or chosen by Where, a guard against rows of NaN, keys and values that are
repeated for groups of heads, and heads split and joined by Reshape and Transpose. Where the heads come from and go back
to rank 3, Attention takes them as they are and all of that goes.

Three things about ONNX Runtime 1.32's kernel were measured and are heeded: it doesn't broadcast a mask along queries;
a score masked with the lowest float is left out altogether, so that a row of nothing else gives zeros where the
arithmetic gives the mean of the values; and a row of -inf gives zeros, as the guard does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgeq.ir import query
from edgeq.rewrite.match import Edit, each, producer, product, rank, read_once, reader, scalar

OPSET = 23
FLOAT = ir.DataType.FLOAT
SPLIT, TURNED_KEYS, TURNED = (0, 2, 1, 3), (0, 2, 3, 1), (0, 1, 3, 2)
LOWEST = float(np.finfo(np.float32).min)
NEARLY_LOWEST = -3e38  # a mask's own minimum, moved off the float that the kernel takes as "left out"
UPSTREAM = 32  # nodes looked at for the constants of a mask


@dataclass(frozen=True)
class Heads:
    """Queries, keys or values: ``split`` [B, heads, S, D] and ``joined`` [B, S, heads D], one of them at least."""

    split: ir.Value | None
    joined: ir.Value | None
    count: int
    size: int


@dataclass(frozen=True)
class Scores:
    """``scale * q k^T + mask``. ``chosen``: where the mask is False the score is ``masked``."""

    q: Heads
    k: Heads
    scale: float
    mask: ir.Value | None = None
    chosen: ir.Value | None = None
    masked: ir.Value | None = None


def _attend(node: ir.Node, edit: Edit) -> bool:
    scores = _scores(node.inputs[0]) if _over_keys(node) and edit.opset >= OPSET else None
    after, guarded = _guarded(node)
    weighted = None if after is None or scores is None else reader(after, "MatMul")
    if scores is None or weighted is None or weighted.inputs[0] is not after:
        return False
    v = _heads(weighted.inputs[1])
    if v is None or v.count != scores.k.count or scores.q.count % v.count or scores.q.size != scores.k.size:
        return False
    final = _joined_again(weighted, scores.q.count * v.size)
    parts = (scores.q, scores.k, v)
    if final is None or any(part.joined is None for part in parts):
        final = weighted
        if any(part.split is None for part in parts):
            return False
    mask = _mask(scores, guarded, node, edit)
    if mask is None and (scores.mask is not None or scores.chosen is not None):
        return False
    _put(final, parts, mask, scores.scale, edit, joined=final is not weighted)
    return True


def _put(
    final: ir.Node, parts: tuple[Heads, ...], mask: ir.Value | None, scale: float, edit: Edit, *, joined: bool
) -> None:
    attributes: dict[str, float] = {"scale": scale}
    if joined:
        attributes |= {"q_num_heads": parts[0].count, "kv_num_heads": parts[1].count}
    inputs = [part.joined if joined else part.split for part in parts]
    inputs = [*inputs, mask] if mask is not None else inputs
    edit.swap(final, [edit.node(final, "Attention", inputs, attributes, like=final.outputs[0])])


def _over_keys(node: ir.Node) -> bool:
    x = node.inputs[0]
    return rank(x) == 4 and query.attribute(node, "axis", -1) in (-1, 3) and x is not None and x.dtype == FLOAT


def _guarded(node: ir.Node) -> tuple[ir.Value | None, bool]:
    """The weights, behind ``Where(IsNaN(p), 0, p)`` if there is one."""
    weights = node.outputs[0]
    readers = query.users(weights)
    test = next((one for one in readers if one.op_type == "IsNaN"), None)
    choice = None if test is None else reader(test.outputs[0], "Where")
    if choice is None:
        return weights, False
    guard = scalar(choice.inputs[1]) == 0 and choice.inputs[2] is weights and set(readers) == {test, choice}
    return (choice.outputs[0] if guard else None), True


def _scores(value: ir.Value | None) -> Scores | None:
    """What a Softmax reads."""
    if value is None:
        return None
    if not read_once(value):
        return None
    added, choice = producer(value, "Add"), producer(value, "Where")
    if choice is not None:
        found = _product(choice.inputs[1])
        q, k, scale = found if found is not None else (None, None, 0.0)
        fill = scalar(choice.inputs[2])
        if q is None or k is None or fill is None or fill > -1e3:
            return None
        return Scores(q, k, scale, chosen=choice.inputs[0], masked=choice.inputs[2])
    if added is None:
        found = _product(value)
        return None if found is None else Scores(*found)
    for inner, mask in ((added.inputs[0], added.inputs[1]), (added.inputs[1], added.inputs[0])):
        found = _product(inner)
        if found is not None and inner is not None and read_once(inner):
            return Scores(*found, mask=mask)
    return None


def _product(value: ir.Value | None) -> tuple[Heads, Heads, float] | None:
    """(queries, keys, scale) of ``scale * q k^T``, the factors on either side."""
    if value is None:
        return None
    factors, scale = product(value)
    node = producer(factors[0], "MatMul") if len(factors) == 1 else None
    if node is None or node.inputs[0] is None or node.inputs[1] is None:
        return None
    (left, first), (right, second) = product(node.inputs[0]), product(node.inputs[1])
    q = _heads(left[0]) if len(left) == 1 else None
    k = _keys(right[0]) if len(right) == 1 else None
    return None if q is None or k is None else (q, k, scale * first * second)


def _keys(value: ir.Value) -> Heads | None:
    """Heads behind keys that are turned for the product: [B, heads, D, S]."""
    node = producer(value, "Transpose", "Reshape")
    if node is None:
        return None
    if node.op_type == "Reshape":  # torch turns them as [B heads, S, D]
        turned = producer(node.inputs[0], "Transpose")
        flat = producer(turned.inputs[0], "Reshape") if turned is not None else None
        if turned is None or flat is None or _permutation(turned) != (0, 2, 1):
            return None
        before, after = query.dims(flat.inputs[0]), query.dims(value)
        if before is None or after is None or len(before) != 4 or len(after) != 4 or before[3] != after[2]:
            return None
        return _heads(flat.inputs[0])
    if _permutation(node) == TURNED:
        return _heads(node.inputs[0])
    return _apart(None, node.inputs[0]) if _permutation(node) == TURNED_KEYS else None


def _permutation(node: ir.Node) -> tuple[int, ...]:
    return tuple(query.attribute(node, "perm", ()))


def _heads(value: ir.Value | None) -> Heads | None:
    """Heads [B, heads, S, D], without the repetition for groups."""
    value = _unrepeated(value)
    if value is None or rank(value) != 4:
        return None
    node = producer(value, "Transpose", "RotaryEmbedding")
    if node is not None and node.op_type == "Transpose" and _permutation(node) == SPLIT:
        return _apart(value, node.inputs[0])
    count, size = (query.dims(value) or ())[1::2]
    if node is not None and node.op_type == "RotaryEmbedding":
        inner = _heads(node.inputs[0])
        return None if inner is None else Heads(value, None, inner.count, inner.size)
    return None if count is None or size is None else Heads(value, None, count, size)


def _unrepeated(value: ir.Value | None) -> ir.Value | None:
    """What ``Reshape(Expand(Unsqueeze(x, 2)))`` repeats in [B, heads, S, D] -> [B, heads groups, S, D], else itself."""
    node = producer(value, "Reshape")
    wide = producer(node.inputs[0], "Expand") if node is not None else None
    thin = producer(wide.inputs[0], "Unsqueeze", "Reshape") if wide is not None else None
    if thin is None or wide is None or thin.inputs[0] is None:
        return value
    source, one, many = query.dims(thin.inputs[0]), query.dims(thin.outputs[0]), query.dims(wide.outputs[0])
    after = query.dims(value)
    if source is None or one is None or many is None or after is None or (len(source), len(one)) != (4, 5):
        return value
    if one[2] != 1 or many[1] is None or many[2] is None or len(after) != 4 or after[1] != many[1] * many[2]:
        return value
    return thin.inputs[0] if after[3] == source[3] == one[4] else value


def _apart(split: ir.Value | None, rows: ir.Value | None) -> Heads | None:
    """Heads of ``rows`` [B, S, heads, D], which a Reshape made of rank 3."""
    reshaped, shape = producer(rows, "Reshape"), query.dims(rows)
    if shape is None or len(shape) != 4:
        return None
    joined = reshaped.inputs[0] if reshaped is not None and rank(reshaped.inputs[0]) == 3 else None
    width = (query.dims(joined) or (None,))[-1]
    size = shape[3]
    count = shape[2] if shape[2] is not None else width // size if width is not None and size else None
    if count is None or size is None or (joined is not None and width != count * size):
        return None
    return Heads(split, joined, count, size)


def _joined_again(weighted: ir.Node, width: int) -> ir.Node | None:
    """The Reshape behind a product with the values that makes [B, S, heads D] of it."""
    turned = reader(weighted.outputs[0], "Transpose")
    final = reader(turned.outputs[0], "Reshape") if turned is not None and _permutation(turned) == SPLIT else None
    shape = query.dims(final.outputs[0]) if final is not None else None
    return final if shape is not None and len(shape) == 3 and shape[-1] in (None, width) else None


def _mask(scores: Scores, guarded: bool, node: ir.Node, edit: Edit) -> ir.Value | None:
    """The mask as the kernel takes it, made once for all layers that read it; None where it can't be or there is none.

    New nodes stand in front of ``node``."""
    assert node.graph is not None
    if scores.chosen is not None and scores.masked is not None:
        zero = edit.constant(node.graph, f"{node.name}_zero", np.array(0, np.float32))
        chosen = _made(scores.chosen, "Where", [scores.chosen, zero, scores.masked], node, edit, like=scores.masked)
        return _rows(chosen, rank(scores.chosen), query.dims(scores.chosen), scores.q, node, edit)
    mask = scores.mask
    if mask is None or mask.dtype != FLOAT:
        return None
    fills = _fills(mask)
    if min(fills, default=-np.inf) == -np.inf and fills and not guarded:
        return None  # a row of nothing but -inf is NaN in arithmetic
    shape, count = query.dims(mask), rank(mask)
    if not fills or -np.inf < min(fills) <= LOWEST / 1.01:
        low = edit.constant(node.graph, f"{mask.name}_low", np.array(NEARLY_LOWEST, np.float32))
        mask = _made(mask, "Max", [mask, low], node, edit, like=mask)
    return _rows(mask, count, shape, scores.q, node, edit)


def _rows(
    mask: ir.Value, count: int | None, shape: tuple[int | None, ...] | None, q: Heads, node: ir.Node, edit: Edit
) -> ir.Value | None:
    """The mask with a row a query. None where its shape tells too little."""
    if count is None or shape is None or not 2 <= count <= 4 or shape[-1] == 1:
        return None
    source = q.joined if q.joined is not None else q.split
    if shape[-2] != 1:
        return mask
    if source is None or node.graph is None:
        return None
    axis = 1 if source is q.joined else 2
    if (query.dims(source) or ())[axis] == 1:
        return mask
    known = _known(mask, "Expand")
    if known is not None:
        return known
    ones = np.ones(1, np.int64)
    one = edit.constant(node.graph, f"{mask.name}_one", ones)
    rows = edit.node(node, "Shape", [source], {"start": axis, "end": axis + 1})
    wanted = edit.node(node, "Concat", [rows.outputs[0], one], {"axis": 0})
    for each_new in (rows, wanted):
        each_new.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        node.graph.insert_before(node, each_new)
    return _made(mask, "Expand", [mask, wanted.outputs[0]], node, edit)


def _known(value: ir.Value, op: str) -> ir.Value | None:
    """What an earlier attention made of the value."""
    name = f"{value.name}_attended_{op}"
    return next((user.outputs[0] for user in query.users(value) if user.name == name), None)


def _made(
    value: ir.Value, op: str, inputs: list[ir.Value], node: ir.Node, edit: Edit, *, like: ir.Value | None = None
) -> ir.Value:
    """The output of a new node in front of ``node``, or of the one an earlier attention put there."""
    known = _known(value, op)
    if known is not None:
        return known
    assert node.graph is not None
    new = edit.node(node, op, inputs)
    new.name = f"{value.name}_attended_{op}"
    new.outputs[0].type = ir.TensorType(FLOAT)
    new.outputs[0].shape = like.shape if like is not None else None
    node.graph.insert_before(node, new)
    return new.outputs[0]


def _fills(mask: ir.Value) -> set[float]:
    """The float constants a mask is computed from; none where a float enters from outside, that is unknown ones."""
    found: set[float] = set()
    pending, seen = [mask], {mask}
    while pending:
        value = pending.pop()
        array = query.constant(value)
        if array is not None:
            if array.dtype.kind == "f" and array.size:
                found.add(float(array.min()))
            continue
        node = value.producer()
        if node is None:
            if query.is_float(value):
                return set()
            continue
        if len(seen) > UPSTREAM:
            continue
        fresh = [one for one in node.inputs if one is not None and one not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return found


attend = each(_attend, "Softmax")
