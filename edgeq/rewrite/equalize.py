"""Apply equalizations: exact in real numbers, up to where a Clip between cuts (L6)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.analyse.equalizing import Equalization
from edgeq.ir import edit, query


def equalize(model: ir.Model, equalizations: Iterable[Equalization]) -> ir.Model:
    """(Model, equalizations) -> Model with the same results up to float rounding."""
    clone = model.clone()
    names = edit.Names(clone)
    nodes = {str(node.name): node for node in clone.graph}
    for found in equalizations:
        first, second = nodes[found.pair.first], nodes[found.pair.second]
        _multiply(clone.graph, first, 1, found.scale, names)
        if len(first.inputs) > 2 and first.inputs[2] is not None:
            _multiply(clone.graph, first, 2, found.scale, names)
        rows = (query.dims(second.inputs[1]) or (0,))[0] or 0
        divisor = np.asarray(1 / found.scale, np.float32)
        repeated = np.repeat(divisor, rows // divisor.size)  # a depthwise one may write several a channel
        _multiply(clone.graph, second, 1, repeated if found.pair.depthwise else divisor[None, :], names)
    edit.drop_dead(clone)
    return clone


def _multiply(graph: ir.Graph, node: ir.Node, index: int, factor: NDArray[np.float32], names: edit.Names) -> None:
    """Multiply a constant along its first axes. Other readers keep theirs."""
    value = node.inputs[index]
    array = query.constant(value)
    if value is None or array is None:
        raise TypeError(f"input {index} of {node.name} is not constant")
    spread = factor.reshape(*factor.shape, *[1] * (array.ndim - factor.ndim))
    scaled = (array * spread).astype(array.dtype)
    node.replace_input_with(index, edit.add_initializer(graph, names.fresh(f"{value.name}_equalized"), scaled))
