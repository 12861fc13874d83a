"""Questions about a graph that several layers ask: constants, shapes, work (L2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.ir.ops import OPS

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array of an initializer or Constant node, else None. A graph input with a default isn't constant."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def is_constant(value: ir.Value | None) -> bool:
    """Like ``constant``, without reading the data."""
    return value is not None and value.const_value is not None and not value.is_graph_input()


def is_float(value: ir.Value | None) -> bool:
    """Whether the value is known to be of a floating type."""
    return value is not None and value.dtype in FLOATS


def dims(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """Static shape with None for dynamic axes, or None where the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else None for dim in value.shape)


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """An attribute's plain value, or ``default``."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def out_axis(node: ir.Node) -> int | None:
    """Axis of the constant weight that is the output channel, negative ones resolved; None without a weight row."""
    row = OPS.get(node.op_type)
    if row is None or row.weight is None or row.out_axis is None:
        return None
    if node.op_type == "Gemm" and attribute(node, "transB", 0):
        return 0
    shape = dims(node.inputs[row.weight])
    return row.out_axis if row.out_axis >= 0 or shape is None else row.out_axis + len(shape)


def macs(node: ir.Node, output_shape: tuple[int, ...] | None) -> int:
    """Multiply-accumulates of one run, given the concrete output shape. 0 for ops that don't multiply."""
    if output_shape is None:
        return 0
    outputs = math.prod(output_shape)
    weight = dims(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.op_type in ("Conv", "ConvTranspose") and weight is not None and None not in weight:
        per_output = math.prod(int(dim or 1) for dim in weight[1:])  # in/group x kernel
        if node.op_type == "ConvTranspose":  # counted per input position: [in, out/group, kernel]
            strides = math.prod(attribute(node, "strides", [1]))
            per_output = int(weight[0] or 1) // attribute(node, "group", 1) * math.prod(int(d or 1) for d in weight[2:])
            per_output //= max(strides, 1)
        return outputs * per_output
    if node.op_type in ("MatMul", "Gemm"):
        inner = dims(node.inputs[0])
        if inner is None:
            return 0
        depth = inner[0 if node.op_type == "Gemm" and attribute(node, "transA", 0) else -1]
        if depth is None and weight is not None and len(weight) > 1:
            depth = weight[-1 if node.op_type == "Gemm" and attribute(node, "transB", 0) else -2]
        return outputs * int(depth or 0)
    return 0


def users(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value, each once, in no fixed order."""
    return list(dict.fromkeys(node for node, _ in value.uses()))


def nodes(model: ir.Model) -> Iterator[ir.Node]:
    """All nodes of the main graph and of every body in it."""
    yield from model.graph.all_nodes()


def is_control_flow(node: ir.Node) -> bool:
    """Whether a node holds bodies."""
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(isinstance(attr, ir.Attr) and attr.type in kinds for attr in node.attributes.values())
