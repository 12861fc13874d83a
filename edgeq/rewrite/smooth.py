"""Apply smoothings: exact in real numbers, kinder to 8 bits (L6).

Where a tensor comes straight from a normalization that nothing else reads, its scale and bias absorb the division;
elsewhere (the residual stream reads it too) one Mul by the reciprocal goes before the products: K multiplications a row
against the K x N of the product behind it. Rows are divided behind that, and what the products give is multiplied back.
"""

from __future__ import annotations

from collections.abc import Iterable

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edgeq.analyse.smoothing import Smoothing
from edgeq.ir import edit, query


def smooth(model: ir.Model, smoothings: Iterable[Smoothing]) -> ir.Model:
    """(Model, smoothings) -> Model with the same results up to float rounding."""
    clone = model.clone()
    names = edit.Names(clone)
    nodes = {str(node.name): node for node in clone.graph}
    for smoothing in smoothings:
        readers = [nodes[name] for name in smoothing.readers]
        value = readers[0].inputs[0]
        if value is None:
            raise TypeError(f"{readers[0].name} reads nothing")
        if smoothing.alpha:
            if not _fold_into_norm(clone.graph, value, smoothing, names):
                _multiply(clone.graph, value, smoothing, readers, names)
            for node in readers:
                _scale_rows(clone.graph, node, smoothing, names)
        if smoothing.rows:
            _divide_rows(clone.graph, readers, names)
    edit.drop_dead(clone)
    return clone


def _fold_into_norm(graph: ir.Graph, value: ir.Value, smoothing: Smoothing, names: edit.Names) -> bool:
    """Divide the scale and bias of the normalization that writes ``value``, if the products alone read it."""
    norm = value.producer()
    alone = {str(node.name) for node in query.users(value)} == set(smoothing.readers)
    if norm is None or not alone or value.is_graph_output():
        return False
    factors = _factors(norm, smoothing.scale.size)
    for index in factors:
        array = query.constant(norm.inputs[index])
        if array is None:
            raise TypeError(f"input {index} of {norm.name} is not constant")
        name = names.fresh(f"{norm.inputs[index].name}_smoothed")  # type: ignore[union-attr]
        divided = (array / smoothing.scale).astype(array.dtype)
        norm.replace_input_with(index, edit.add_initializer(graph, name, divided))
    return bool(factors)


def _factors(node: ir.Node, channels: int) -> list[int]:
    """Inputs that are divided with the last axis of a normalization, or of the Mul that a written-out one ends in."""
    constants = [i for i, value in enumerate(node.inputs) if value is not None and query.dims(value) == (channels,)]
    constants = [index for index in constants if query.is_constant(node.inputs[index])]
    match node.op_type:
        case "LayerNormalization":
            inputs = [index for index in (1, 2) if index < len(node.inputs) and node.inputs[index] is not None]
            return inputs if inputs == constants else []
        case "RMSNormalization" | "Mul":
            return constants[:1]
    return []


def _multiply(
    graph: ir.Graph, value: ir.Value, smoothing: Smoothing, readers: list[ir.Node], names: edit.Names
) -> None:
    stem = names.fresh(f"{value.name}_smoothed")
    dtype = (value.dtype or ir.DataType.FLOAT).numpy()
    factor = edit.add_initializer(graph, names.fresh(f"{stem}_factor"), (1 / smoothing.scale).astype(dtype))
    node = edit.make_node("Mul", [value, factor], names.fresh(f"{stem}_Mul"), stem, like=value)
    producer = value.producer()
    if producer is None:
        graph.insert_before(next(iter(graph)), node)
    else:
        graph.insert_after(producer, node)
    for reader in readers:
        reader.replace_input_with(0, node.outputs[0])


def _divide_rows(graph: ir.Graph, readers: list[ir.Node], names: edit.Names) -> None:
    """Let ``readers`` multiply rows of magnitude 1, and multiply what comes out by each row's largest magnitude."""
    value = readers[0].inputs[0]
    if value is None:
        raise TypeError(f"{readers[0].name} reads nothing")
    stem, dtype = f"{value.name}_rows", value.dtype or ir.DataType.FLOAT
    made = list[ir.Node]()

    def add(op: str, what: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        name = names.fresh(f"{stem}_{what}")
        made.append(edit.make_node(op, inputs, f"{name}_{op}", name, attributes, dtype=dtype))
        return made[-1].outputs[0]

    axis = edit.add_initializer(graph, names.fresh(f"{stem}_axis"), np.array([-1], np.int64))
    tiny = np.array(ml_dtypes.finfo(dtype.numpy()).tiny, dtype.numpy())
    least = edit.add_initializer(graph, names.fresh(f"{stem}_least"), tiny)
    largest = add("Max", "largest", add("ReduceMax", "peak", add("Abs", "magnitude", value), axis, keepdims=1), least)
    even = add("Div", "even", value, largest)
    even.shape = value.shape
    producer = value.producer()
    if producer is None:
        graph.insert_before(next(iter(graph)), made)
    else:
        graph.insert_after(producer, made)
    for reader in readers:
        reader.replace_input_with(0, even)
        product = reader.outputs[0]
        stem = names.fresh(f"{product.name}_even")
        back = edit.make_node("Mul", [largest, largest], f"{stem}_Mul", names.fresh(f"{stem}_out"), like=product)
        graph.insert_after(reader, back)
        edit.take_over(product, back.outputs[0])
        product.name = stem
        back.replace_input_with(0, product)


def _scale_rows(graph: ir.Graph, node: ir.Node, smoothing: Smoothing, names: edit.Names) -> None:
    weight = query.constant(node.inputs[1])
    if weight is None:
        raise TypeError(f"{node.name} has no constant weight")
    scaled = (weight * smoothing.scale[:, None]).astype(weight.dtype)
    name = names.fresh(f"{node.inputs[1].name}_smoothed")  # type: ignore[union-attr]
    node.replace_input_with(1, edit.add_initializer(graph, name, scaled))
