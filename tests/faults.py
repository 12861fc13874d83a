"""Faults as they happen, put into copies of Q/DQ models; each tells the node that then computes otherwise."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.analyse.coverage import QDQ
from edgeq.ir import query


def quantized(model: ir.Model) -> list[str]:
    """The tensors that a QuantizeLinear behind a Conv, Gemm or MatMul encodes, in graph order."""
    found = []
    for node in model.graph:
        source = node.inputs[0].producer() if node.op_type == "QuantizeLinear" and node.inputs[0] is not None else None
        if source is not None and source.op_type in ("Conv", "Gemm", "MatMul"):
            found.append(str(node.inputs[0].name))  # type: ignore[union-attr]
    return found


def wrong_scale(model: ir.Model, tensor: str, factor: float = 1.3) -> tuple[str, ir.Model]:
    """The scale of a tensor's codes ``factor`` times too large, for all that write and read them."""
    clone, node = _quantizer(model, tensor)
    _set(node.inputs[1], lambda scale: scale * np.float32(factor))
    return _writer(node), clone


def wrong_zero_point(model: ir.Model, tensor: str, shift: int = 3) -> tuple[str, ir.Model]:
    clone, node = _quantizer(model, tensor)
    _set(node.inputs[2], lambda zero: zero + np.asarray(shift if zero < 128 else -shift, zero.dtype))
    return _writer(node), clone


def wrong_weight(model: ir.Model, tensor: str, channel: int) -> tuple[str, ir.Model]:
    """The codes of an output channel of the layer that writes ``tensor`` 127, 127, -127, -127 and so on: pairs of
    products that leave 16 bits, and sums that stay small."""
    clone, node = _quantizer(model, tensor)
    layer = _layer(node)
    decoded = layer.inputs[1].producer()  # type: ignore[union-attr]
    assert decoded is not None and decoded.op_type == "DequantizeLinear"

    def wild(codes: NDArray[np.generic]) -> NDArray[np.generic]:
        rows_first = layer.op_type == "Conv" or query.attribute(layer, "transB", 0)
        changed = np.moveaxis(codes.copy(), 0 if rows_first else -1, 0)  # [out, in, …]
        turns = np.where(np.arange(changed.shape[1]) // 2 % 2, -127, 127)
        changed[channel] = turns.reshape(-1, *[1] * (changed.ndim - 2))
        return np.moveaxis(changed, 0, 0 if rows_first else -1)

    _set(decoded.inputs[0], wild)
    return str(layer.name), clone


def _quantizer(model: ir.Model, tensor: str) -> tuple[ir.Model, ir.Node]:
    """A copy, and the node in it that writes the codes of a tensor."""
    clone = model.clone()
    for node in clone.graph:
        if node.op_type == "QuantizeLinear" and node.inputs[0] is not None and node.inputs[0].name == tensor:
            return clone, node
    raise AssertionError(f"{tensor} isn't quantized")


def _layer(node: ir.Node) -> ir.Node:
    """The node whose result a QuantizeLinear encodes, activations between them left out."""
    source = node.inputs[0].producer()  # type: ignore[union-attr]
    while source is not None and source.op_type in ("Relu", "Clip"):
        source = source.inputs[0].producer()  # type: ignore[union-attr]
    return node if source is None or source.op_type in QDQ else source


def _writer(node: ir.Node) -> str:
    return str(_layer(node).name)


def _set(value: ir.Value | None, change: object) -> None:
    assert value is not None and callable(change)
    value.const_value = ir.tensor(np.asarray(change(query.constant(value))), name=value.name)
