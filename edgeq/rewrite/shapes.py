"""Follow sizes through the integer arithmetic that exporters write around Reshape (L6).

A batch or sequence axis stays dynamic, but most of what surrounds it is known: ``Concat(Shape(x)[0], 12, 64)`` holds
one unknown. Values are object arrays whose elements are a number, the name of a dynamic axis, or an ``Axis`` without
one. What is known whole becomes a constant; a Reshape target with one unknown gets -1 there, and 0 where it copies an
axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.ir import query
from edgeq.rewrite.match import Edit, nodes, symbols

Sizes = NDArray[Any]
Known = dict[ir.Value, Sizes]

ELEMENTS = 64
"""Integer constants up to so many elements take part; shapes have few."""


@dataclass(frozen=True)
class Axis:
    """The size of one dynamic axis that has no name."""

    value: ir.Value
    index: int


def known_sizes(model: ir.Model) -> Known:
    """Integer values that are made of shapes, as far as they are known."""
    known: Known = {}
    for node in nodes(model):
        follow = RULES.get(node.op_type) if node.domain == "" else None
        found = None if follow is None or len(node.outputs) != 1 else follow(node, known)
        if found is not None:
            known[node.outputs[0]] = found
    return known


def _sizes(value: ir.Value | None, known: Known) -> Sizes | None:
    if value is None or value in known:
        return None if value is None else known[value]
    tensor = value.const_value if query.is_constant(value) else None
    if tensor is None or tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32) or tensor.size > ELEMENTS:
        return None
    return tensor.numpy().astype(object)


def _numbers(value: ir.Value | None) -> NDArray[Any] | None:
    array = query.constant(value)
    return None if array is None or array.size > ELEMENTS else array


def _shape(node: ir.Node, _: Known) -> Sizes | None:
    source = node.inputs[0]
    shape = None if source is None else axis_sizes(source)
    if shape is None:
        return None
    return shape[query.attribute(node, "start", 0) : query.attribute(node, "end", len(shape))]


def axis_sizes(value: ir.Value) -> Sizes | None:
    """The shape of a value; an axis without size and name is told from all others."""
    shape = symbols(value)
    if shape is None:
        return None
    sizes = np.empty(len(shape), object)
    sizes[:] = [Axis(value, index) if dim is None else dim for index, dim in enumerate(shape)]
    return sizes


def _size(node: ir.Node, _: Known) -> Sizes | None:
    shape = query.dims(node.inputs[0])
    return None if shape is None or None in shape else np.array(int(np.prod(np.array(shape, np.int64))), object)


def _same(node: ir.Node, known: Known) -> Sizes | None:
    return _sizes(node.inputs[0], known)


def _cast(node: ir.Node, known: Known) -> Sizes | None:
    whole = query.attribute(node, "to") in (ir.DataType.INT64, ir.DataType.INT32)
    return _sizes(node.inputs[0], known) if whole else None


def _gather(node: ir.Node, known: Known) -> Sizes | None:
    data, index = _sizes(node.inputs[0], known), _numbers(node.inputs[1])
    if data is None or index is None or data.ndim != 1 or index.size == 0 or np.abs(index).max() > data.size:
        return None
    return np.array(data.take(index, mode="wrap"), object)


def _slice(node: ir.Node, known: Known) -> Sizes | None:
    data = _sizes(node.inputs[0], known)
    bounds = [array for value in node.inputs[1:] if (array := _numbers(value)) is not None and array.size == 1]
    if data is None or data.ndim != 1 or len(bounds) != len(node.inputs) - 1 or len(bounds) < 2:
        return None
    step = int(bounds[3].flat[0]) if len(bounds) > 3 else 1
    return data[int(bounds[0].flat[0]) : int(bounds[1].flat[0]) : step] if step > 0 else None


def _concat(node: ir.Node, known: Known) -> Sizes | None:
    parts = [_sizes(value, known) for value in node.inputs]
    if any(part is None or part.ndim != 1 for part in parts):
        return None
    return np.concatenate([part for part in parts if part is not None])


def _unsqueeze(node: ir.Node, known: Known) -> Sizes | None:
    data = _sizes(node.inputs[0], known)
    return data.reshape(1) if data is not None and data.ndim == 0 else None


def _squeeze(node: ir.Node, known: Known) -> Sizes | None:
    data = _sizes(node.inputs[0], known)
    return data.reshape(()) if data is not None and data.size == 1 else None


def _equal(node: ir.Node, known: Known) -> Sizes | None:
    """No size is negative, so one that isn't a number differs from any negative number."""
    a, b = (_sizes(value, known) for value in node.inputs)
    if a is None or b is None:
        return None
    pairs = list(zip(*(side.flat for side in np.broadcast_arrays(a, b)), strict=True))
    told = [(isinstance(x, int) and isinstance(y, int)) or _negative(x) or _negative(y) for x, y in pairs]
    if not all(told):
        return None
    return np.array([x == y for x, y in pairs], object).reshape(np.broadcast_shapes(a.shape, b.shape))


def _negative(size: object) -> bool:
    return isinstance(size, int) and size < 0


def _where(node: ir.Node, known: Known) -> Sizes | None:
    test, yes, no = node.inputs[0], _sizes(node.inputs[1], known), _sizes(node.inputs[2], known)
    chosen = known.get(test) if test is not None else None
    if chosen is None or yes is None or no is None:
        return None
    return np.where(chosen.astype(bool), yes, no)


RULES: dict[str, Callable[[ir.Node, Known], Sizes | None]] = {
    "Shape": _shape,
    "Size": _size,
    "Identity": _same,
    "Cast": _cast,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Equal": _equal,
    "Where": _where,
}


def freeze_sizes(model: ir.Model, keep: frozenset[str]) -> list[str]:
    """Sizes known whole become constants; a Reshape target with one unknown becomes a constant with -1, an Expand
    target one with 1 along axes that stay; an Expand to the shape its input has goes."""
    edit, matched = Edit(model), []
    known = known_sizes(model)
    for value, sizes in known.items():
        node = value.producer()
        if node is None or node.name in keep or value.is_graph_output() or not value.uses():
            continue
        if all(isinstance(size, int) for size in sizes.flat):
            dtype = np.int64 if value.dtype is None else value.dtype.numpy()
            edit.freeze(value, np.array(sizes.tolist(), dtype))
            matched.append(node.name or "")
    for node in tuple(nodes(model)):
        target = known.get(node.inputs[1]) if node.op_type in ("Reshape", "Expand") and node.inputs[1] else None
        if target is None or node.domain != "" or node.name in keep or node.graph is None:
            continue
        change = _settle_expand if node.op_type == "Expand" else _freeze_target
        if change(node, target, edit):
            matched.append(node.name or "")
    return matched


def _freeze_target(node: ir.Node, target: Sizes, edit: Edit) -> bool:
    """0, which copies, for a size that its axis has already; -1 for the only other one that isn't a number. Numbers
    stay as they are, -1 and a 0 that copies among them; where 0 means no elements, none may."""
    source, data = node.inputs[1], node.inputs[0]
    shape = None if data is None else axis_sizes(data)
    copies = not query.attribute(node, "allowzero", 0) or 0 not in target.tolist()
    plain = [
        size if isinstance(size, int) else 0 if copies and _same_axis(shape, index, size) else -1
        for index, size in enumerate(target)
    ]
    if plain.count(-1) > 1 or (not copies and 0 in plain) or source is None or node.graph is None:
        return False
    node.replace_input_with(1, edit.constant(node.graph, f"{source.name}", np.array(plain, np.int64)))
    if copies:
        node.attributes.pop("allowzero", None)
    return edit.erase([source])


def _same_axis(shape: Sizes | None, index: int, size: object) -> bool:
    return shape is not None and index < len(shape) and shape[index] == size


def _settle_expand(node: ir.Node, target: Sizes, edit: Edit) -> bool:
    """An axis stays when the target asks for 1 or for the size, number or name, that the input has."""
    data, source = node.inputs[0], node.inputs[1]
    shape = None if data is None else axis_sizes(data)
    if shape is None or source is None or node.graph is None or len(target) < 1:
        return False
    axes = np.concatenate([np.ones(max(len(target) - len(shape), 0), object), shape])[-len(target) :]
    plain = [1 if wanted in (1, dim) else wanted for wanted, dim in zip(target, axes, strict=True)]
    if len(target) <= len(shape) and all(wanted == 1 for wanted in plain):
        return edit.bypass(node, data) and edit.erase([source])
    if query.is_constant(source) or not all(isinstance(wanted, int) for wanted in plain):
        return False
    node.replace_input_with(1, edit.constant(node.graph, f"{source.name}", np.array(plain, np.int64)))
    return edit.erase([source])
