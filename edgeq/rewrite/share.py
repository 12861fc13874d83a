"""Compute once what is computed twice, store once what is stored twice (L6).

onnx-ir has passes for both; this one walks nodes and bodies once, leaves random ops and ops with bodies alone, and
never renames a tensor that the caller's model shares.
"""

from __future__ import annotations

import hashlib
from typing import Any

import onnx_ir as ir

from edgeq.rewrite.match import Edit

RANDOM = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout")
)
"""Ops whose result may differ from run to run (Dropout: in training mode)."""


PLAIN = frozenset(getattr(ir.AttributeType, name) for name in ("FLOAT", "INT", "STRING", "FLOATS", "INTS", "STRINGS"))
"""Attribute types whose values can be compared as they are."""


HEAD = 64
"""Elements by which weights are told apart before they are read whole."""


def merge_initializers(model: ir.Model, keep: frozenset[str]) -> list[str]:
    """Initializers with equal dtype, shape and bytes become one. Returns names of those that went."""
    merged = []
    for graph in model.graphs():
        for alike in _alike(graph, keep):
            seen: dict[bytes, ir.Value] = {}
            for value, tensor in alike:
                first = seen.setdefault(hashlib.sha256(tensor.tobytes()).digest(), value)
                if first is not value:
                    name = str(value.name)
                    value.replace_all_uses_with(first)
                    del graph.initializers[name]
                    merged.append(name)
    return merged


def _alike(graph: ir.Graph, keep: frozenset[str]) -> list[list[tuple[ir.Value, ir.TensorProtocol]]]:
    """Groups of two and more initializers with equal dtype, shape and first elements: a large model has few."""
    groups: dict[Any, list[tuple[ir.Value, ir.TensorProtocol]]] = {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING or name in keep:
            continue
        if not value.is_graph_output() and not value.is_graph_input():
            key = (tensor.dtype, tuple(tensor.shape.numpy()), tensor.numpy().flat[:HEAD].tobytes())
            groups.setdefault(key, []).append((value, tensor))
    return [group for group in groups.values() if len(group) > 1]


def merge_nodes(model: ir.Model, keep: frozenset[str]) -> list[str]:
    """Nodes of one graph with the same op, attributes and inputs become one. Returns names of those that went."""
    edit, merged = Edit(model), []
    for graph in model.graphs():
        seen: dict[Any, ir.Node] = {}
        for node in tuple(graph):
            key = _key(node)
            if key is None or node.name in keep:
                continue
            first = seen.setdefault(key, node)
            if first is not node and _replace(node, first, edit):
                merged.append(node.name or "")
    return merged


def _replace(node: ir.Node, first: ir.Node, edit: Edit) -> bool:
    if len(node.outputs) == 1:
        return edit.bypass(node, first.outputs[0])
    if any(value.is_graph_output() for value in node.outputs):
        return False
    for value, same in zip(node.outputs, first.outputs, strict=True):
        if value.uses() and not same.name:  # an output the first doesn't compute
            return False
    for value, same in zip(node.outputs, first.outputs, strict=True):
        value.replace_all_uses_with(same)
    return edit.erase(node.outputs)


def _key(node: ir.Node) -> Any:
    """Equal for nodes that compute the same; None for those that may not be merged."""
    if node.op_type in RANDOM:
        return None
    attributes = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) or attribute.is_ref():
            return None
        value = attribute.value
        if attribute.type == ir.AttributeType.TENSOR:
            value = (value.dtype, tuple(value.shape.numpy()), value.tobytes())
        elif attribute.type not in PLAIN:
            return None
        attributes.append((name, value))
    inputs = tuple(None if value is None else id(value) for value in node.inputs)
    return (node.domain, node.op_type, node.overload, inputs, tuple(attributes), len(node.outputs))
