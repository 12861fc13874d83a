"""A model as text, one line a node, for dumps and golden tests (L2).

ONNX's own printers show types a reader doesn't need or hide constants he does; this form is short enough for a test to
hold it whole. It is written only, never parsed: the file format is ONNX.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

INLINE_ELEMENTS = 6
"""Constants up to so many elements are shown by value."""


def to_text(model: ir.Model) -> str:
    """Inputs, initializers, nodes and outputs in graph order; bodies are indented under their node."""
    return "\n".join(_graph_lines(model.graph, ""))


def _graph_lines(graph: ir.Graph, indent: str) -> Iterator[str]:
    for value in graph.inputs:
        yield f"{indent}in  {_typed(value)}"
    for value in graph.initializers.values():
        yield f"{indent}w   {_typed(value)}{_contents(value)}"
    for node in graph:
        yield indent + node_text(node)
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield f"{indent}  {attribute.name}:"
                yield from _graph_lines(attribute.as_graph(), indent + "    ")
    yield f"{indent}out " + ", ".join(_typed(value) for value in graph.outputs)


def node_text(node: ir.Node) -> str:
    """``y = Conv(x, w, b) {pads=[1, 1, 1, 1]}``; an absent input is ``-``, a foreign domain stands before the op."""
    inputs = ", ".join("-" if value is None else value.name or "" for value in node.inputs)
    outputs = ", ".join(value.name or "-" for value in node.outputs)
    op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    attributes = ", ".join(
        f"{name}={_attribute(attribute)}"
        for name, attribute in sorted(node.attributes.items())
        if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    )
    return f"{outputs} = {op}({inputs})" + (f" {{{attributes}}}" if attributes else "")


def _attribute(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        return str(attribute.as_tensor().numpy().tolist())
    value = attribute.value
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _typed(value: ir.Value) -> str:
    dtype = "?" if value.dtype is None else value.dtype.short_name()
    shape = "..." if value.shape is None else ",".join(str(dim) for dim in value.shape)
    return f"{value.name} {dtype}[{shape}]"


def _contents(value: ir.Value) -> str:
    tensor = value.const_value
    if tensor is None or tensor.size > INLINE_ELEMENTS or tensor.dtype == ir.DataType.STRING:
        return ""
    return " = " + np.array2string(tensor.numpy(), precision=6, separator=", ").replace("\n", "")
