"""The few edits every rewrite is made of, in constant time each (L2).

All work on a model that the caller cloned. Names are unique across the graph, since ONNX Runtime, reports and plans
speak of tensors by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


class Names:
    """Gives names nobody uses yet in a graph and its bodies. One scan at the start, then constant time."""

    def __init__(self, model: ir.Model) -> None:
        self.taken: set[str] = set()
        self.counts: dict[str, int] = {}
        for graph in model.graphs():
            self.taken.update(value.name or "" for value in graph.inputs)
            self.taken.update(graph.initializers)
            for node in graph:
                self.taken.add(node.name or "")
                self.taken.update(value.name or "" for value in node.outputs)

    def fresh(self, wanted: str) -> str:
        name, count = wanted, self.counts.get(wanted, 1)
        while name in self.taken:
            count += 1
            name = f"{wanted}_{count}"
        self.taken.add(name)
        self.counts[wanted] = count  # where the next search starts: unnamed nodes all want one name
        return name


def add_initializer(graph: ir.Graph, name: str, array: NDArray[Any] | ir.TensorProtocol) -> ir.Value:
    """Register a constant under ``name``, which must be fresh."""
    tensor = ir.tensor(array, name=name) if isinstance(array, np.ndarray | np.generic) else array
    value = ir.Value(
        name=name, shape=ir.Shape(tuple(tensor.shape.numpy())), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def make_node(
    op: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    output: str,
    attributes: dict[str, Any] | None = None,
    *,
    domain: str = "",
    like: ir.Value | None = None,
    dtype: ir.DataType | None = None,
) -> ir.Node:
    """A node with one output called ``output``; shape taken from ``like``, type from ``dtype`` or ``like``."""
    value = ir.Value(name=output)
    if like is not None:
        value.shape, value.type = like.shape, like.type
    if dtype is not None:
        value.type = ir.TensorType(dtype)
    return ir.node(op, inputs, attributes or {}, domain=domain, outputs=[value], name=name)


def replace_node(graph: ir.Graph, old: ir.Node, new: Sequence[ir.Node]) -> None:
    """Put ``new`` where ``old`` stands; the last new node's outputs take over the old ones' names, readers and
    place among the graph's outputs."""
    graph.insert_before(old, new)
    for before, after in zip(old.outputs, new[-1].outputs, strict=False):
        take_over(before, after)
    graph.remove(old, safe=True)


def take_over(before: ir.Value, after: ir.Value) -> None:
    """Let ``after`` be what ``before`` was: readers, graph output, name, shape and type."""
    name = before.name
    if after.shape is None:
        after.shape = before.shape
    if after.type is None:
        after.type = before.type
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    before.name = None
    after.name = name


def remove_node(node: ir.Node) -> None:
    """Take out a node nobody reads, with what its bodies read from outside."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph().all_nodes():
                for index in range(len(inner.inputs)):
                    inner.replace_input_with(index, None)
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def drop_dead(model: ir.Model) -> int:
    """Remove nodes nobody reads and initializers nobody uses. Returns how many nodes went."""
    removed = 0
    for graph in reversed(list(model.graphs())):  # bodies first: their readers keep outer nodes alive
        removed += _drop_dead_nodes(graph)
    for graph in model.graphs():
        used = {value.name for value in graph.inputs} | {value.name for value in graph.outputs}
        for name in [name for name, value in graph.initializers.items() if not value.uses() and name not in used]:
            del graph.initializers[name]
    return removed


def _drop_dead_nodes(graph: ir.Graph) -> int:
    removed = 0
    for node in reversed(graph):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            remove_node(node)
            removed += 1
    return removed
