"""Nodes in 16-bit floats, with casts at the borders, and the same arithmetic in f32 for a runtime without it (L6).

ONNX Runtime's CPU provider runs a float16 node it has no kernel for in f32 and drops the casts between two of them:
what a device rounds and overflows, it doesn't (1e4 * 1e4 / 1e4 in float16 is 1e4 there, and infinite on a device). So
``rounded`` writes the same model in f32, with each 16-bit tensor rounded by a pair of casts, which it does compute.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.ir import edit, query
from edgeq.ir.narrow import slots

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
TO = "to"


def halve(
    model: ir.Model, nodes: Collection[str], dtype: ir.DataType, bounds: Mapping[str, float] | None = None
) -> ir.Model:
    """The model with ``nodes`` (names) in ``dtype``; inputs, outputs and other nodes keep f32, and a tensor between the
    two is cast once. ``bounds``: constant -> the magnitude it is cut at."""
    clone = model.clone()
    opset = clone.opset_imports[""]
    chosen = {node: slots(node, dtype, opset) for node in clone.graph if node.name in nodes}
    site = _Site(clone, dtype, bounds or {})
    halved = [node.outputs[index] for node, (_, outputs) in chosen.items() for index in outputs]
    for node, (_, outputs) in chosen.items():
        _retype(node, outputs, dtype)
    known = set(halved)
    for node, (inputs, _) in chosen.items():
        for index in inputs:
            value = node.inputs[index]
            if value is not None and value not in known:
                node.replace_input_with(index, site.narrowed(value))
    for value in halved:
        outside = [(reader, index) for reader, index in value.uses() if index not in chosen.get(reader, ((), ()))[0]]
        if outside or value.is_graph_output():
            site.widen(value, outside)
    edit.drop_dead(clone)
    return clone


def rounded(model: ir.Model) -> ir.Model:
    """A model with 16-bit floats -> the same in f32, each 16-bit tensor of the main graph rounded where it is written.
    What a kernel keeps inside isn't rounded."""
    clone = model.clone()
    graph, names = clone.graph, edit.Names(clone)
    for value in [one for one in graph.initializers.values() if one.dtype in HALVES and not one.is_graph_output()]:
        array = query.constant(value)
        assert array is not None
        stored = edit.add_initializer(graph, names.fresh(f"{value.name}_f32"), array.astype(np.float32))
        value.replace_all_uses_with(stored)
    for value in [one for one in graph.inputs if one.dtype in HALVES]:
        wide = _cast(names, value, ir.DataType.FLOAT)
        value.replace_all_uses_with(wide.outputs[0])
        wide.replace_input_with(0, value)
        graph.insert_before(graph[0], wide)
    for node in list(graph):
        for value in [one for one in node.outputs if one.dtype in HALVES]:
            _round(graph, names, node, value)
    edit.drop_dead(clone)
    return clone


def _round(graph: ir.Graph, names: edit.Names, node: ir.Node, value: ir.Value) -> None:
    """``value`` of ``node`` in f32, and what reads it behind a pair of casts; a graph output keeps its type."""
    dtype = value.dtype
    assert dtype is not None
    _retype(node, [value.index() or 0], ir.DataType.FLOAT)
    down = _cast(names, value, dtype)
    up = _cast(names, down.outputs[0], ir.DataType.FLOAT)
    graph.insert_after(node, [down, up])
    output = value.is_graph_output()
    readers = [use for use in value.uses() if use.node is not down]
    value.replace_all_uses_with(down.outputs[0], replace_graph_outputs=True)
    down.replace_input_with(0, value)
    for reader, index in readers:
        reader.replace_input_with(index, up.outputs[0])
    _rename(names, value, (down if output else up).outputs[0])


def _cast(names: edit.Names, value: ir.Value, dtype: ir.DataType) -> ir.Node:
    name = names.fresh(f"{value.name}_{'f32' if dtype == ir.DataType.FLOAT else dtype.short_name()}")
    return edit.make_node("Cast", [value], f"{name}_Cast", name, {TO: int(dtype)}, like=value, dtype=dtype)


def _rename(names: edit.Names, value: ir.Value, heir: ir.Value) -> None:
    """Give ``value``'s name to ``heir``."""
    name, value.name = str(value.name), names.fresh(f"{value.name}_exact")
    heir.name = name


def _retype(node: ir.Node, outputs: Collection[int], dtype: ir.DataType) -> None:
    for index in outputs:
        node.outputs[index].type = ir.TensorType(dtype)
    if outputs and node.op_type == "Cast":
        node.attributes[TO] = ir.AttrInt64(TO, int(dtype))
    elif outputs and node.op_type == "ConstantOfShape":
        fill = query.attribute(node, "value")
        array = np.zeros(1, np.float32) if fill is None else fill.numpy()
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array.astype(dtype.numpy())))


class _Site:
    """Makes what stands between f32 and 16 bits, each once."""

    def __init__(self, model: ir.Model, dtype: ir.DataType, bounds: Mapping[str, float]) -> None:
        self.graph, self.names, self.dtype, self.bounds = model.graph, edit.Names(model), dtype, bounds
        self.first = self.graph[0] if len(self.graph) else None
        self.made: dict[ir.Value, ir.Value] = {}

    def narrowed(self, value: ir.Value) -> ir.Value:
        """``value`` in 16 bits: stored so when it is constant."""
        if value not in self.made:
            array = query.constant(value)
            self.made[value] = self._casted(value) if array is None else self._stored(value, array)
        return self.made[value]

    def widen(self, value: ir.Value, outside: Collection[tuple[ir.Node, int]]) -> None:
        """Let readers ``outside`` and graphs that put a 16-bit ``value`` out have it in f32."""
        cast, producer = _cast(self.names, value, ir.DataType.FLOAT), value.producer()
        assert producer is not None
        self.graph.insert_after(producer, cast)
        output, inside = value.is_graph_output(), [use for use in value.uses() if use not in outside]
        value.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
        for reader, index in inside:
            reader.replace_input_with(index, value)
        if output:
            _rename(self.names, value, cast.outputs[0])

    def _casted(self, value: ir.Value) -> ir.Value:
        cast, producer = _cast(self.names, value, self.dtype), value.producer()
        if producer is not None:
            self.graph.insert_after(producer, cast)
        else:
            assert self.first is not None
            self.graph.insert_before(self.first, cast)
        return cast.outputs[0]

    def _stored(self, value: ir.Value, array: NDArray[np.float32]) -> ir.Value:
        bound = self.bounds.get(str(value.name))
        cut = array if bound is None else np.where(np.isinf(array), array, np.clip(array, -bound, bound))
        with np.errstate(over="ignore"):  # infinity is what a constant beyond the format is, unless it is cut
            stored = cut.astype(self.dtype.numpy())
        name = self.names.fresh(f"{value.name}_{self.dtype.short_name()}")
        return edit.add_initializer(self.graph, name, stored)
