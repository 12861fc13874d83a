"""Apply absorptions: the constant part of channels moves from one convolution's bias to the next one's (L6)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.ir import edit, query


def absorb(model: ir.Model, shifts: Mapping[str, NDArray[np.float32]]) -> ir.Model:
    """(Model, tensor -> f32[C] its channels move down by) -> Model with the same results up to float rounding, where no
    Relu cuts what is moved below 0. ``shifts`` as ``analyse.absorbing`` finds them: consistent at every node."""
    clone = model.clone()
    names = edit.Names(clone)
    for node in clone.graph:
        if node.op_type != "Conv":
            continue
        moved = [shifts.get(str(value.name)) for value in (node.inputs[0], node.outputs[0]) if value is not None]
        if any(shift is not None for shift in moved):
            _rebias(clone.graph, node, moved[0], moved[1], names)
    edit.drop_dead(clone)
    return clone


def _rebias(
    graph: ir.Graph, node: ir.Node, read: NDArray[np.float32] | None, written: NDArray[np.float32] | None,
    names: edit.Names,
) -> None:  # fmt: skip
    """Let a convolution add what its input was moved by, and leave out what its output is."""
    weight = query.constant(node.inputs[1])
    if weight is None:
        raise TypeError(f"the weight of {node.name} is not constant")
    old = query.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    bias = np.zeros(len(weight)) if old is None else old.astype(np.float64)
    if read is not None:
        group = query.attribute(node, "group", 1)
        inputs = np.repeat(read.reshape(group, -1), len(weight) // group, axis=0)  # a row of inputs an output channel
        bias += (weight.astype(np.float64).reshape(*weight.shape[:2], -1).sum(axis=2) * inputs).sum(axis=1)
    if written is not None:
        bias -= written
    value = edit.add_initializer(graph, names.fresh(f"{node.name}_absorbed"), bias.astype(weight.dtype))
    node.resize_inputs(3)
    node.replace_input_with(2, value)
