"""Masks as ONNX Runtime's Attention takes them, made once for all layers (L7).

Three things about the kernel of 1.32 were measured and are heeded: it doesn't broadcast a mask along queries; a score
masked with the lowest float is left out altogether, so that a row of nothing else gives zeros where the arithmetic
gives the mean of the values; and a row of -inf gives zeros, as a guard against NaN does.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.ir import query
from edgeq.lower import heads
from edgeq.rewrite.match import Edit, rank

FLOAT = ir.DataType.FLOAT
LOWEST = float(np.finfo(np.float32).min)
NEARLY_LOWEST = -3e38  # a mask's own minimum, moved off the float that the kernel takes as "left out"
UPSTREAM = 32  # nodes looked at for the constants of a mask


def chosen(condition: ir.Value, fill: float, q: ir.Value, guarded: bool, node: ir.Node, edit: Edit) -> ir.Value | None:
    """Scores of queries ``q`` that are ``fill`` where the condition is False, as a mask to add. A finite fill becomes
    the lowest that the kernel counts: a row of nothing else gives the mean of the values, whatever the scores were."""
    if node.graph is None or (fill == -np.inf and not guarded):
        return None
    zero, low = (
        edit.constant(node.graph, f"{node.name}_{what}", np.array(number, np.float32))
        for what, number in (("zero", 0), ("low", fill if fill == -np.inf else NEARLY_LOWEST))
    )
    made = _made(condition, "Where", [condition, zero, low], node, edit)
    return _rows(made, condition, q, node, edit)


def added(mask: ir.Value, q: ir.Value, guarded: bool, node: ir.Node, edit: Edit) -> ir.Value | None:
    """A mask that is added to the scores of queries ``q``, f32, as the kernel takes it: new nodes stand in front of
    ``node``. ``guarded``: rows of nothing but -inf give zeros. None where it can't be, as for ``chosen``."""
    if mask.dtype != FLOAT or node.graph is None:
        return None
    fills = _fills(mask)
    infinite = -np.inf in fills
    if infinite and not guarded:
        return None  # a row of nothing but -inf is NaN in arithmetic
    raised = mask
    if not fills or any(-np.inf < fill <= LOWEST / 1.01 for fill in fills):
        low = edit.constant(node.graph, f"{mask.name}_low", np.array(NEARLY_LOWEST, np.float32))
        raised = _made(mask, "Max", [mask, low], node, edit)
        if guarded and (infinite or not fills):
            hidden = _made(mask, "IsInf", [mask], node, edit, ir.DataType.BOOL)
            raised = _made(mask, "Where", [hidden, mask, raised], node, edit)
    return _rows(raised, mask, q, node, edit)


def _rows(made: ir.Value, like: ir.Value, q: ir.Value, node: ir.Node, edit: Edit) -> ir.Value | None:
    """The mask with a row a query. None where the shape of ``like`` tells too little."""
    count, shape = rank(like), query.dims(like)
    if count is None or shape is None or not 2 <= count <= 4 or shape[-1] == 1:
        return None
    if shape[-2] != 1 or (query.dims(q) or ())[2] == 1:
        return made
    known = _known(made, "Expand")
    if known is not None or node.graph is None:
        return known
    source, axis = heads.origin(q)
    one = edit.constant(node.graph, f"{made.name}_one", np.ones(1, np.int64))
    tokens = edit.node(node, "Shape", [source], {"start": axis, "end": axis + 1})
    wanted = edit.node(node, "Concat", [tokens.outputs[0], one], {"axis": 0})
    for new in (tokens, wanted):
        new.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        node.graph.insert_before(node, new)
    return _made(made, "Expand", [made, wanted.outputs[0]], node, edit)


def _known(value: ir.Value, op: str) -> ir.Value | None:
    """What an earlier attention made of the value."""
    name = f"{value.name}_attended_{op}"
    return next((user.outputs[0] for user in query.users(value) if user.name == name), None)


def _made(
    value: ir.Value, op: str, inputs: list[ir.Value], node: ir.Node, edit: Edit, dtype: ir.DataType = FLOAT
) -> ir.Value:
    """The output of a new node in front of ``node``, or of the one an earlier attention put there."""
    known = _known(value, op)
    if known is not None:
        return known
    assert node.graph is not None
    new = edit.node(node, op, inputs)
    new.name = f"{value.name}_attended_{op}"
    new.outputs[0].type = ir.TensorType(dtype)
    node.graph.insert_before(node, new)
    return new.outputs[0]


def _fills(mask: ir.Value) -> set[float]:
    """The float constants a mask is computed from; none where a float enters from outside, that is unknown ones. What
    isn't float, as what a Where chooses by or a Cast reads, holds no fill."""
    found: set[float] = set()
    pending, seen = [mask], {mask}
    while pending:
        value = pending.pop()
        array, node = query.constant(value), value.producer()
        if array is not None:
            found.update([float(array.min())] if array.dtype.kind == "f" and array.size else [])
        elif node is None or len(seen) > UPSTREAM:
            return set()
        else:
            fresh = [one for one in node.inputs if one is not None and one not in seen]
            fresh = [one for one in fresh if one.dtype is None or query.is_float(one)]
            seen.update(fresh)
            pending.extend(fresh)
    return found
