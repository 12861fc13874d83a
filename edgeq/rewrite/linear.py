"""One form for every fully connected layer: weight constant, f32[in, out], second; bias f32[out] (L6).

Two axes -> Gemm with transB = 0 and alpha = beta = 1; more axes -> MatMul and Add. A Gemm is kept where its input has
two axes, instead of MatMul and Add everywhere, since ONNX Runtime 1.32 makes QGemm of it with and without a Q behind it
(logits stay float), where MatMul and Add without a Q become a float Gemm. Weight-only kernels (MatMulNBits) take
transB = 0 only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.ir import query
from edgeq.rewrite.match import Edit, each, finite, operands, producer, rank, read_once


def _straighten_gemm(node: ir.Node, edit: Edit) -> bool:
    """alpha goes into the constant weight, beta into the constant bias, transB into the weight's layout."""
    transposed = query.attribute(node, "transB", 0)
    alpha, beta = (float(query.attribute(node, name, 1.0)) for name in ("alpha", "beta"))
    kernel, shift = (*node.inputs, None)[1:3]
    weight, bias = query.constant(kernel), query.constant(shift)
    if weight is None or kernel is None or node.graph is None or (shift is not None and bias is None):
        return False
    # The transposed array is a view: a mapped weight is copied when the model is written, not before.
    straight = weight.T if transposed else weight
    straight = straight if alpha == 1 else straight * np.float64(alpha)
    vector = None if bias is None else _vector(bias, straight.shape[1], beta)
    if not finite(weight.dtype, *([] if alpha == 1 else [straight]), *([] if vector is None else [vector])):
        return False
    if shift is not None and vector is None:
        return False  # a bias that differs from row to row
    if not transposed and alpha == 1 and (bias is None or (beta == 1 and bias.shape == straight.shape[1:])):
        return False
    inputs = [node.inputs[0], kernel if straight is weight else edit.reweighed(kernel, straight)]
    if shift is not None and vector is not None:
        inputs.append(edit.reweighed(shift, vector))
    attributes = {"transA": 1} if query.attribute(node, "transA", 0) else {}
    edit.swap(node, [edit.node(node, "Gemm", inputs, attributes, like=node.outputs[0])])
    return True


def _vector(bias: NDArray[Any], channels: int, beta: float) -> NDArray[Any] | None:
    """A Gemm's bias as f32[out], or None when it isn't the same for every row."""
    if bias.size not in (1, channels) or (bias.ndim > 1 and bias.shape[-1] != bias.size):
        return None
    vector = np.broadcast_to(bias.reshape(-1), channels)
    return vector if beta == 1 else vector * np.float64(beta)


def _join_bias(node: ir.Node, edit: Edit) -> bool:
    """MatMul of two axes by a constant and the Add of a constant bias behind it -> Gemm."""
    pair = operands(node)
    matmul = producer(pair[0], "MatMul") if pair is not None and read_once(pair[0]) else None
    if pair is None or matmul is None or rank(matmul.inputs[0]) != 2 or rank(matmul.inputs[1]) != 2:
        return False
    weight, bias = matmul.inputs[1], query.constant(pair[1])
    if not query.is_constant(weight) or weight is None or bias is None or matmul.graph is not node.graph:
        return False
    channels = (query.dims(weight) or (0, 0))[1]
    vector = _vector(bias, int(channels or 0), 1.0) if bias.ndim <= 2 else None
    if vector is None or pair[1].dtype != weight.dtype or weight.dtype not in query.FLOATS:
        return False
    shift = pair[1] if bias.shape == vector.shape else edit.reweighed(pair[1], vector)
    gemm = edit.node(node, "Gemm", [matmul.inputs[0], weight, shift], like=node.outputs[0])
    edit.swap(node, [gemm], name=matmul.name)
    return True


straighten_gemms = each(_straighten_gemm, "Gemm")
join_biases = each(_join_bias, "Add")
