"""A part of a model as a model of its own: from any of its values to any others (L2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from edgeq.ir import edit


def part(model: ir.Model, inputs: Iterable[str], outputs: Iterable[str]) -> ir.Model:
    """The model that computes the main graph's values ``outputs`` from its values ``inputs``; weights are shared.

    Inputs nothing reads are left out. A value among the outputs has to be written by a node of the part."""
    clone = model.clone()
    graph = clone.graph
    names = edit.Names(clone)
    values = {str(value.name): value for value in graph.inputs}
    values.update({str(value.name): value for node in graph for value in node.outputs})
    graph.outputs[:] = [values[name] for name in outputs]
    fed = [_fed(values[name], names) for name in inputs]
    graph.inputs[:] = fed
    edit.drop_dead(clone)
    graph.inputs[:] = [value for value in fed if value.uses()]
    return clone


def _fed(value: ir.Value, names: edit.Names) -> ir.Value:
    """What is fed in the place of ``value``: itself if it was an input before."""
    if value.is_graph_input():
        return value
    new = ir.Value(name=value.name, shape=value.shape, type=value.type)
    value.name = names.fresh(f"{value.name}_inner")
    value.replace_all_uses_with(new)
    return new


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, its bodies included; values of the bodies themselves are among them."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.GRAPH:
            body = attribute.as_graph()
            yield from body.outputs
            for inner in body.all_nodes():
                yield from (value for value in inner.inputs if value is not None)
