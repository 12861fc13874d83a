"""Decide ``If`` nodes whose condition is known and put the taken branch in their place (L3).

Some exporters put whole networks inside an ``If`` on a scalar input (a sample rate), and a quantizer sees one node.
Conditions are computed by a table of a few numpy functions over constants, known shapes and the values given for scalar
inputs, not by a runtime: a condition is a handful of scalar ops, and a partly known shape is enough for most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.errors import UsageError, did_you_mean
from edgeq.ir import edit, query, verify

Array = NDArray[Any]
Known = dict[ir.Value, Array | None]

SMALL = 64
"""Elements up to which a constant takes part; conditions are made of scalars and shapes."""

DEPTH = 64
"""Nodes a condition may hang on, in a chain."""


def _cast(node: ir.Node, x: Array) -> Array:
    return x.astype(ir.DataType(query.attribute(node, "to")).numpy())


def _axes(node: ir.Node, rest: tuple[Array, ...]) -> tuple[int, ...] | None:
    axes = rest[0] if rest else query.attribute(node, "axes")
    return None if axes is None else tuple(int(axis) for axis in np.atleast_1d(axes))


def _divide(_: ir.Node, a: Array, b: Array) -> Array:
    if np.issubdtype(a.dtype, np.integer):  # ONNX truncates toward zero
        return np.asarray(np.trunc(a / b), a.dtype)
    return np.asarray(a / b)


def _slice(
    _: ir.Node, x: Array, starts: Array, ends: Array, axes: Array | None = None, steps: Array | None = None
) -> Array:
    axes = np.arange(len(starts)) if axes is None else axes
    steps = np.ones_like(starts) if steps is None else steps
    cut = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        low = None if step < 0 and end < -x.shape[axis] else int(end)  # INT_MIN: down to the first element
        cut[int(axis)] = slice(int(start), low, int(step))
    return x[tuple(cut)]


def _filled(node: ir.Node, shape: Array) -> Array | None:
    value = query.attribute(node, "value")
    fill = np.zeros(1, np.float32) if value is None else value.numpy()
    return None if math.prod(shape.tolist()) > SMALL else np.full(tuple(shape), fill.reshape(()), fill.dtype)


def _reshaped(node: ir.Node, x: Array, shape: Array) -> Array:
    keeps = not query.attribute(node, "allowzero", 0)
    return x.reshape([x.shape[axis] if size == 0 and keeps else size for axis, size in enumerate(shape.tolist())])


FOLDS: dict[str, Callable[..., Array | None]] = {
    "Identity": lambda _, x: x,
    "Size": lambda _, x: np.array(x.size, np.int64),
    "Cast": _cast,
    "Not": lambda _, x: ~x,
    "And": lambda _, a, b: a & b,
    "Or": lambda _, a, b: a | b,
    "Xor": lambda _, a, b: a ^ b,
    "Equal": lambda _, a, b: np.asarray(a == b),
    "Greater": lambda _, a, b: np.asarray(a > b),
    "GreaterOrEqual": lambda _, a, b: np.asarray(a >= b),
    "Less": lambda _, a, b: np.asarray(a < b),
    "LessOrEqual": lambda _, a, b: np.asarray(a <= b),
    "Add": lambda _, a, b: np.asarray(a + b),
    "Sub": lambda _, a, b: np.asarray(a - b),
    "Mul": lambda _, a, b: np.asarray(a * b),
    "Div": _divide,
    "Squeeze": lambda node, x, *axes: np.squeeze(x, _axes(node, axes)),
    "Unsqueeze": lambda node, x, *axes: np.expand_dims(x, _axes(node, axes) or 0),
    "Reshape": _reshaped,
    "Gather": lambda node, x, index: np.asarray(np.take(x, index, query.attribute(node, "axis", 0))),
    "Slice": _slice,
    "Transpose": lambda node, x: np.transpose(x, query.attribute(node, "perm")),
    "ConstantOfShape": _filled,
    "Concat": lambda node, *parts: np.concatenate(parts, query.attribute(node, "axis")),
}
"""Op type -> its value from the values of its inputs, for a node of the newest form."""


def evaluate(value: ir.Value | None, known: Known, depth: int = DEPTH) -> Array | None:
    """The value of ``value`` when constants, shapes and what ``known`` holds decide it, else None. ``known`` is
    filled on the way, so that shared parts are computed once."""
    if value is None:
        return None
    if value not in known:
        known[value] = _computed(value, known, depth)
    return known[value]


def _computed(value: ir.Value, known: Known, depth: int) -> Array | None:
    if query.is_constant(value):
        tensor = value.const_value
        return tensor.numpy() if tensor is not None and tensor.size <= SMALL else None
    node = value.producer()
    if node is None or node.domain != "" or depth == 0:
        return None
    of_shape = _from_shape(node, known, depth)
    if of_shape is not None or node.op_type not in FOLDS:
        return of_shape
    inputs = [evaluate(part, known, depth - 1) for part in node.inputs]
    if any(array is None for part, array in zip(node.inputs, inputs, strict=True) if part is not None):
        return None
    try:
        found = FOLDS[node.op_type](node, *inputs)
    except (ValueError, IndexError):  # shapes that don't fit: the runtime's to report
        return None
    return None if found is None or found.size > SMALL else np.asarray(found)


def _from_shape(node: ir.Node, known: Known, depth: int) -> Array | None:
    """What a partly known shape says: the whole of it, its rank, or one size of it."""
    if node.op_type == "Shape" and not {"start", "end"} & set(node.attributes):
        shape = query.dims(node.inputs[0])
        return None if shape is None or None in shape else np.array(shape, np.int64)
    shaped = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if shaped is None or shaped.op_type != "Shape" or {"start", "end"} & set(shaped.attributes):
        return None
    shape = query.dims(shaped.inputs[0])
    if shape is None:
        return None
    if node.op_type == "Size":
        return np.array(len(shape), np.int64)
    index = evaluate(node.inputs[1], known, depth - 1) if node.op_type == "Gather" else None
    if index is None or any(shape[int(at)] is None for at in index.flat):
        return None
    return np.array([shape[int(at)] for at in index.flat], np.int64).reshape(index.shape)


@dataclass(frozen=True)
class Decided:
    """How many ``If`` nodes were decided, and the scalar inputs whose values decided them."""

    count: int
    fixed: dict[str, Array]

    def __str__(self) -> str:
        nodes = f"{self.count} If node{'s' if self.count > 1 else ''} decided"
        values = ", ".join(f"{name} = {value.item()}" for name, value in self.fixed.items())
        return nodes + (f" by {values}; conditions no longer follow other values" if values else "")


def specialise(model: ir.Model, values: Mapping[str, Array]) -> tuple[ir.Model, Decided]:
    """Model with names of its own everywhere -> a copy without the ``If`` nodes that ``values`` of scalar inputs,
    constants and known shapes decide. The inputs stay in the signature and other readers still see them.
    Raises UsageError for a name that is no input or a value that isn't one number."""
    names = [value.name or "" for value in model.graph.inputs]
    for name, array in values.items():
        if name not in names:
            raise UsageError(f"the model has no input {name!r} to fix", hint=did_you_mean(name, names))
        if np.size(array) != 1:
            raise UsageError(f"input {name!r} can't be fixed to {np.size(array)} values, only to one")
    count, decided, behind = 0, model, set[str]()
    while any(node.op_type == "If" for node in query.nodes(decided)):
        candidate = verify.infer_shapes(_fold_small(verify.infer_shapes(decided)))
        inputs = {value.name or "": value for value in candidate.graph.inputs}
        given: Known = {inputs[name]: np.asarray(array) for name, array in values.items()}
        taken = _inline_decided(candidate.graph, given, edit.Names(candidate), behind)
        if not taken:
            break
        edit.drop_dead(candidate)
        count, decided = count + taken, candidate
    fixed = {name: np.asarray(values[name]) for name in values if name in behind}
    return decided, Decided(count, fixed)


def _fold_small(model: ir.Model) -> ir.Model:
    """Make what shape arithmetic yields initializers, in place: inference stops at a Pad or Reshape it can't see into.
    Values of the given inputs take no part, since their other readers keep following them."""
    known: Known = {}
    for node in query.nodes(model):
        graph, value = node.graph, node.outputs[0] if node.outputs else None
        if value is None or not isinstance(graph, ir.Graph) or value.is_graph_output() or not value.uses():
            continue
        found = evaluate(value, known)
        if found is not None:
            name = value.name or ""
            value.name = f"{name}_computed"
            value.replace_all_uses_with(edit.add_initializer(graph, name, np.ascontiguousarray(found)))
    edit.drop_dead(model)
    return model


def _inline_decided(graph: ir.Graph, given: Known, names: edit.Names, behind: set[str]) -> int:
    """Inline the outermost decided ``If`` nodes of ``graph`` and its bodies, in place; adds to ``behind`` the inputs
    that decided. Returns how many."""
    known, count = dict(given), 0
    for node in list(graph):
        condition = evaluate(node.inputs[0], known) if node.op_type == "If" and node.domain == "" else None
        if condition is not None:
            behind |= _inputs_behind(node.inputs[0], given)
            branch = node.attributes["then_branch" if bool(condition.all()) else "else_branch"].as_graph()
            _inline(graph, node, branch, names)
            count += 1
            continue
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                count += _inline_decided(attribute.as_graph(), given, names, behind)
    return count


def _inputs_behind(value: ir.Value | None, given: Known) -> set[str]:
    """Names of the given inputs a condition is computed from; an input's shape isn't its value."""
    found, seen, pending = set[str](), set[ir.Value](), [value]
    while pending:
        at = pending.pop()
        if at is None or at in seen:
            continue
        seen.add(at)
        if at in given:
            found.add(at.name or "")
        node = at.producer()
        if node is not None and node.op_type != "Shape":
            pending.extend(node.inputs)
    return found


def _inline(parent: ir.Graph, node: ir.Node, branch: ir.Graph, names: edit.Names) -> None:
    """Put a branch's nodes where its ``If`` stands."""
    results = list(branch.outputs)
    branch.outputs.clear()
    for value in list(branch.initializers.values()):
        branch.initializers.pop(value.name or "")
        parent.register_initializer(value)
    moved = list(branch)
    branch.remove(moved)
    parent.insert_before(node, moved)
    own = {value for inner in moved for value in inner.outputs}
    for before, after in zip(node.outputs, results, strict=True):
        if not before.is_graph_output():
            before.replace_all_uses_with(after)
            continue
        if after not in own or after.is_graph_output():  # another's value can't take this output's name
            copy = edit.make_node(
                "Identity", [after], names.fresh(f"{node.name}_copy"), names.fresh(f"{before.name}_copy"), like=before
            )
            parent.insert_before(node, copy)
            after = copy.outputs[0]
        edit.take_over(before, after)
    parent.remove(node, safe=True)
