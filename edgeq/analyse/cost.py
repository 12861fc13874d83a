"""What a model's nodes cost: multiply-accumulates and bytes, at concrete shapes (L5).

Shapes come from ONNX's inference fed with one sample's real dimensions, instead of from the dynamic dimensions a model
declares; what inference can't tell is read off one run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from edgeq.ir import query
from edgeq.ir.verify import infer_shapes
from edgeq.run.record import Array
from edgeq.run.session import open_session, run_session

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_RECURRENT = ("LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class Cost:
    """Of one run of a node: multiply-accumulates, bytes of its constants, bytes of activations read and written."""

    macs: int
    weight_bytes: int
    activation_bytes: int


def costs(model: ir.Model, shapes: Shapes) -> dict[str, Cost]:
    """Cost by node name, bodies included; what has no known shape counts 0."""
    return {str(node.name): _cost(node, shapes) for node in query.nodes(model)}


def concrete_shapes(model: ir.Model, feed: Mapping[str, Array]) -> dict[str, Shape]:
    """Shapes of all values of the main graph for this feed, by name; of bodies as far as inference knows."""
    known = inferred_shapes(model, feed)
    unknown = {str(value.name) for node in model.graph for value in node.outputs if value.name} - known.keys()
    return known | (_measured_shapes(model, unknown, feed) if unknown else {})


def inferred_shapes(model: ir.Model, feed: Mapping[str, Array]) -> dict[str, Shape]:
    """The shapes ONNX's inference finds when the inputs have the feed's, by value name. Nothing is run."""
    clone = model.clone()
    for value in clone.graph.inputs:
        if (array := feed.get(str(value.name))) is not None:
            value.shape = ir.Shape(array.shape)
    for value in clone.graph.outputs:
        value.shape = None  # declared with the dynamic dimensions
    found: dict[str, Shape] = {}
    for graph in infer_shapes(clone).graphs():
        values = [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]
        for value in values:
            shape = _static(value)
            if shape is not None and value.name:
                found[value.name] = shape
    return found


def _measured_shapes(model: ir.Model, names: set[str], feed: Mapping[str, Array]) -> dict[str, Shape]:
    clone = model.clone()
    asked = [value for node in clone.graph for value in node.outputs if value.name in names]
    for value in asked:
        value.shape = None
    clone.graph.outputs.extend(value for value in asked if not value.is_graph_output())
    outputs = run_session(open_session(clone, level="basic"), feed, [str(value.name) for value in asked])
    return {name: array.shape for name, array in outputs.items() if hasattr(array, "shape")}  # a sequence has none


def _static(value: ir.Value | None) -> Shape | None:
    found = query.dims(value)
    if found is None or None in found:
        return None
    return tuple(int(dim) for dim in found if dim is not None)


def _cost(node: ir.Node, shapes: Shapes) -> Cost:
    constants = [value for value in node.inputs if query.is_constant(value)]
    moved = [value for value in node.inputs if value is not None and value not in constants]
    return Cost(
        macs=_macs(node, shapes),
        weight_bytes=sum(value.const_value.nbytes for value in constants if value and value.const_value is not None),
        activation_bytes=sum(_bytes(value, shapes) for value in (*moved, *node.outputs)),
    )


def _bytes(value: ir.Value, shapes: Shapes) -> int:
    shape = _shape(value, shapes)
    if shape is None:
        return 0
    bits = value.dtype.bitwidth if value.dtype not in (None, ir.DataType.STRING) else 32
    return -(-math.prod(shape) * bits // 8)


def _shape(value: ir.Value | None, shapes: Shapes) -> Shape | None:
    """Concrete where a run told, else as declared."""
    return None if value is None else shapes.get(str(value.name), _static(value))


def _macs(node: ir.Node, shapes: Shapes) -> int:
    """Multiply-accumulates; those whose count the output's shape doesn't give are counted from the inputs' here."""
    inputs = [_shape(value, shapes) for value in node.inputs]
    output = _shape(node.outputs[0], shapes) if node.outputs else None
    first, second = (*inputs, None, None)[:2]
    if node.op_type == "ConvTranspose" and first is not None and second is not None:
        return math.prod(first) * math.prod(second[1:])  # each input value meets [out/group, kernel]
    if node.op_type in ("MatMul", "Gemm") and first and output is not None:
        transposed = node.op_type == "Gemm" and query.attribute(node, "transA", 0)
        return math.prod(output) * first[0 if transposed else -1]
    if node.op_type in _RECURRENT and first is not None:
        steps = first[0] * first[1]  # of each sequence, each batch row: both weights [directions, gates, …] once
        return steps * sum(math.prod(shape) for shape in inputs[1:3] if shape is not None)
    return query.macs(node, output)
