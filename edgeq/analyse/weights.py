"""Which constant weights can be stored in another format, and their mapping on it (L5).

A scale belongs to an output channel, blocks are cut along what is summed: [K, N] of MatMul has one scale a column or
blocks of K, a table of Gather one a row or blocks of it, since rows are read alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from edgeq.errors import RecipeError, did_you_mean
from edgeq.ir import query
from edgeq.num.fit import fit_weight
from edgeq.num.quant import TENSOR, Coded, QParams, Quant, dequantize, quantize

Edge = tuple[str, int]

STORABLE = {"MatMul": 1, "Gemm": 1, "Conv": 1, "Gather": 0}  # op -> the input that is its weight
LEAST = 1024  # elements: below, tables and shapes to decode by take more than is saved


def storable(
    model: ir.Model, quant: Quant, ops: Collection[str], *, leave: Collection[str] = ()
) -> dict[Edge, QParams]:
    """(node, input) -> the mapping of its weight, in graph order, for nodes of the main graph that aren't in ``leave``.

    Weights with fewer elements than a block along their axis stay as they are. Raises RecipeError for an op that has no
    weight to store."""
    for op in ops:
        if op not in STORABLE:
            raise RecipeError(
                f"weights of {op!r} can't be stored in another format", hint=did_you_mean(op, [*STORABLE])
            )
    fitted: dict[tuple[str, int | None], QParams] = {}
    found = {}
    for node, value in _weights(model, ops):
        if node.name in leave:
            continue
        axis, shape = axis_of(node, quant), query.dims(value) or ()
        if quant.block > 0 and axis is not None and int(shape[axis] or 0) < quant.block:
            continue
        key = (str(value.name), axis)
        if key not in fitted:
            fitted[key] = fit_weight(_array(value), quant, axis)
        found[str(node.name), STORABLE[node.op_type]] = fitted[key]
    return found


def nearest(model: ir.Model, wanted: Mapping[Edge, QParams]) -> dict[Edge, Coded]:
    """Codes of weights, each element rounded by itself."""
    nodes = {str(node.name): node for node in model.graph}
    return {
        (name, index): Coded(params, quantize(_array(nodes[name].inputs[index]), params))
        for (name, index), params in wanted.items()
    }


def snr_db(model: ir.Model, coded: Mapping[Edge, Coded]) -> float:
    """Of all weights together: what they are over what their codes stand for is off."""
    nodes = {str(node.name): node for node in model.graph}
    signal, noise = 0.0, 0.0
    for (name, index), constant in coded.items():
        w = _array(nodes[name].inputs[index])
        signal += float(np.square(w, dtype=np.float64).sum())
        noise += float(np.square(dequantize(constant.codes, constant.params) - w, dtype=np.float64).sum())
    return 10 * math.log10(signal / noise) if signal and noise else math.inf


def _weights(model: ir.Model, ops: Collection[str]) -> Iterator[tuple[ir.Node, ir.Value]]:
    for node in model.graph:
        index = STORABLE.get(node.op_type)
        value = node.inputs[index] if index is not None and len(node.inputs) > index else None
        if node.op_type not in ops or value is None or not query.is_constant(value) or not query.is_float(value):
            continue
        shape = query.dims(value) or ()
        if len(shape) > 1 and math.prod(int(dim or 0) for dim in shape) >= LEAST:
            yield node, value


def axis_of(node: ir.Node, quant: Quant) -> int | None:
    """The axis that has a scale each or is cut in blocks."""
    rank = len(query.dims(node.inputs[STORABLE[node.op_type]]) or ())
    if node.op_type == "Gather":
        rows = int(query.attribute(node, "axis", 0)) % rank
        out, summed = rows, rank - 1 if rows != rank - 1 else rank - 2
    elif node.op_type == "Conv" or query.attribute(node, "transB", 0):
        out, summed = 0, 1
    else:
        out, summed = rank - 1, rank - 2
    if quant.block == TENSOR:
        return None
    return summed if quant.block > 0 else out


def _array(value: ir.Value | None) -> np.ndarray:
    array = query.constant(value)
    if array is None:
        raise TypeError("a weight is not constant")
    return array.astype(np.float32)
