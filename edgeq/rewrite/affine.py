"""Fold per-channel scales and shifts into the weights behind them (L6).

``y = scale * x + shift`` is what BatchNormalization, Mul and Add by a constant, and re-parametrised blocks all are.
Behind a Conv, ConvTranspose, Gemm or MatMul it goes into that node's weight and bias, computed in float64 and stored in
the weight's dtype. For the other direction see ``forward``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.ir import query
from edgeq.rewrite.match import Edit, axes, each, finite, operands, producer, rank, read_once

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Affine:
    """``y = scale * x + shift`` along one axis of x, each f64[C] or f64[1]; None where it does nothing."""

    x: ir.Value
    scale: Vector | None
    shift: Vector | None


def _batch_norm(node: ir.Node) -> Affine | None:
    """BatchNormalization in inference with constant statistics, along axis 1."""
    parts = [query.constant(value) for value in node.inputs[1:5]]
    if query.attribute(node, "training_mode", 0) or node.inputs[0] is None or len(parts) != 4:
        return None
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return None
    vectors = [part.astype(np.float64) for part in parts if part is not None and part.ndim == 1]
    if len(vectors) != 4:
        return None
    gamma, beta, mean, variance = vectors
    scale = gamma / np.sqrt(variance + query.attribute(node, "epsilon", 1e-5))
    return Affine(node.inputs[0], scale, beta - mean * scale)


def _elementwise(node: ir.Node, axis: int) -> Affine | None:
    """Mul or Add by a constant that varies along ``axis`` only, counted from the end (-1 is the last)."""
    pair = operands(node)
    if pair is None or not query.is_float(pair[1]) or not _along(pair[1], axis):
        return None
    array = query.constant(pair[1])
    assert array is not None
    vector = array.reshape(-1).astype(np.float64)
    return Affine(pair[0], vector, None) if node.op_type == "Mul" else Affine(pair[0], None, vector)


def _along(constant: ir.Value, axis: int) -> bool:
    shape = query.dims(constant)
    if shape is None:
        return False
    return all(dim == 1 or index - len(shape) == axis for index, dim in enumerate(shape))


def _fold_affine(node: ir.Node, edit: Edit) -> bool:
    """Into the node behind: only its one reader may see the change."""
    source = node.inputs[0] if node.op_type == "BatchNormalization" else (operands(node) or (None,))[0]
    before = producer(source, *INTO)
    if before is None or source is None or before.graph is not node.graph or not read_once(source):
        return False
    weighed = producer(before.inputs[0], "MatMul") if before.op_type == "Add" else before
    if weighed is None or len(weighed.inputs) < 2 or not query.is_float(weighed.inputs[1]):
        return False
    if not query.is_constant(weighed.inputs[1]):
        return False
    axis = _channel_axis(weighed)
    if node.op_type == "BatchNormalization":
        affine = _batch_norm(node) if axis + _output_rank(weighed) == 1 else None
    else:
        affine = _elementwise(node, axis) if _fits(node, weighed) else None
    return affine is not None and INTO[before.op_type](node, before, affine, edit)


def _output_rank(node: ir.Node) -> int:
    """Rank of a weighing node's output, at least; 1 when nothing is known of a MatMul."""
    weight_rank = rank(node.inputs[1]) or 0
    if node.op_type != "MatMul":
        return weight_rank
    return rank(node.outputs[0]) or max(1, rank(node.inputs[0]) or 1)


def _fits(node: ir.Node, weighed: ir.Node) -> bool:
    """Whether the constant broadcasts onto the output without adding axes to it."""
    pair = operands(node)
    return pair is not None and (rank(pair[1]) or 0) <= _output_rank(weighed)


def _channel_axis(node: ir.Node) -> int:
    """Axis of the output channel, from the end."""
    return 1 - (rank(node.inputs[1]) or 0) if node.op_type in ("Conv", "ConvTranspose") else -1


def _into_biased(node: ir.Node, old: ir.Node, affine: Affine, edit: Edit) -> bool:
    """Conv, ConvTranspose or Gemm, which have a bias f32[out] of their own."""
    if old.op_type == "Gemm" and any(query.attribute(old, name, 1) != 1 for name in ("alpha", "beta")):
        return False  # not straightened, so its bias isn't a constant vector
    data, kernel, shift = (*old.inputs, None)[:3]
    moved = _moved(old, kernel, shift, affine)
    if moved is None or kernel is None or kernel.dtype is None or node.graph is None:
        return False
    weight, bias = moved
    kernel = kernel if affine.scale is None else edit.reweighed(kernel, weight)
    if shift is not None and rank(shift) == 1:
        shift = edit.reweighed(shift, bias)
    elif shift is not None or bias.any():
        shift = edit.constant(node.graph, f"{old.name}_bias", bias.astype(weight_dtype(kernel)))
    inputs = [data, kernel] if shift is None else [data, kernel, shift]
    new = edit.node(old, old.op_type, inputs, dict(old.attributes), like=node.outputs[0])
    edit.swap(node, [new], name=old.name)
    return True


def _into_matmul(node: ir.Node, matmul: ir.Node, affine: Affine, edit: Edit) -> bool:
    """MatMul without a bias. A shift stays an Add behind it, as ``linear`` wants it, so only a scale has to move."""
    kernel = matmul.inputs[1]
    moved = _moved(matmul, kernel, None, affine)
    if moved is None or affine.scale is None or kernel is None or node.graph is None:
        return False
    weight, bias = moved
    inputs = [matmul.inputs[0], edit.reweighed(kernel, weight)]
    scaled = edit.node(matmul, "MatMul", inputs, like=node.outputs[0])
    if affine.shift is None:
        edit.swap(node, [scaled], name=matmul.name)
        return True
    shift = edit.constant(node.graph, f"{matmul.name}_bias", bias.astype(weight_dtype(kernel)))
    edit.swap(node, [scaled, edit.node(node, "Add", [scaled.outputs[0], shift], like=node.outputs[0])])
    return True


def _into_matmul_and_bias(node: ir.Node, add: ir.Node, affine: Affine, edit: Edit) -> bool:
    """MatMul and the Add of a constant bias behind it: the scale goes into both, the shift into the bias."""
    pair, matmul = operands(add), producer(add.inputs[0], "MatMul")
    if pair is None or matmul is None or pair[0] is not add.inputs[0] or not read_once(pair[0]):
        return False
    kernel = matmul.inputs[1]
    moved = _moved(matmul, kernel, pair[1], affine) if (rank(pair[1]) or 0) <= 1 else None
    if moved is None or kernel is None:
        return False
    weight, bias = moved
    kernel = kernel if affine.scale is None else edit.reweighed(kernel, weight)
    product = edit.node(matmul, "MatMul", [matmul.inputs[0], kernel], like=node.outputs[0])
    shift = edit.reweighed(pair[1], bias)
    edit.swap(node, [product, edit.node(add, "Add", [product.outputs[0], shift], like=node.outputs[0])])
    return True


def _moved(
    old: ir.Node, kernel: ir.Value | None, shift: ir.Value | None, affine: Affine
) -> tuple[NDArray[Any], Vector] | None:
    """The weight and bias f64[out] of ``old`` that make it compute ``affine`` of what it computed."""
    weight = query.constant(kernel)
    if weight is None or (old.op_type == "MatMul" and weight.ndim != 2):
        return None
    grouped = query.attribute(old, "group", 1) if old.op_type == "ConvTranspose" else 1
    channels = weight.shape[query.out_axis(old) or 0] * grouped
    bias = moved_bias(shift, affine, channels)
    if bias is None:
        return None
    scaled = weight if affine.scale is None else _scaled(old, weight, np.broadcast_to(affine.scale, channels))
    return (scaled, bias) if finite(weight.dtype, scaled, bias) else None


def _scaled(old: ir.Node, weight: NDArray[Any], scale: Vector) -> NDArray[Any]:
    """``weight`` with each output channel times its ``scale`` f64[out]."""
    if old.op_type == "ConvTranspose":  # [in, out/group, ...]: each group of inputs has output channels of its own
        group = query.attribute(old, "group", 1)
        blocks = weight.reshape(group, -1, *weight.shape[1:])
        spread = scale.reshape(group, 1, -1, *(1,) * (weight.ndim - 2))
        return np.asarray(blocks * spread).reshape(weight.shape)
    shape = [1] * weight.ndim
    shape[query.out_axis(old) or 0] = -1
    return np.asarray(weight * scale.reshape(shape))


def moved_bias(bias: ir.Value | None, affine: Affine, channels: int) -> Vector | None:
    """``bias * scale + shift`` f64[channels], or None when one of them isn't a constant vector of that size."""
    old = query.constant(bias)
    if bias is not None and (old is None or (old.ndim > 1 and old.shape[-1] != old.size)):
        return None
    start = np.zeros(channels) if old is None else old.reshape(-1).astype(np.float64)
    if any(vector is not None and vector.size not in (1, channels) for vector in (start, affine.scale, affine.shift)):
        return None
    scaled = start if affine.scale is None else start * affine.scale
    shifted = scaled if affine.shift is None else scaled + affine.shift
    return np.broadcast_to(shifted, channels)


def weight_dtype(value: ir.Value) -> np.dtype[Any]:
    """The numpy dtype of a constant."""
    assert value.dtype is not None
    return value.dtype.numpy()


INTO = {
    "Conv": _into_biased,
    "ConvTranspose": _into_biased,
    "Gemm": _into_biased,
    "MatMul": _into_matmul,
    "Add": _into_matmul_and_bias,
}
"""What a scale or shift can be folded into; Add stands for MatMul with a bias behind it."""


def _split_batch_norm(node: ir.Node, edit: Edit) -> bool:
    """What no weight took becomes Mul and Add, for which targets have integer kernels."""
    affine, count = _batch_norm(node), rank(node.inputs[0])
    if affine is None or count is None or affine.scale is None or affine.shift is None or node.graph is None:
        return False
    dtype = None if affine.x.dtype is None else affine.x.dtype.numpy()
    if dtype is None or count < 2 or not finite(dtype, affine.scale, affine.shift):
        return False
    shape = (-1,) + (1,) * (count - 2)
    scale, shift = (
        edit.constant(node.graph, f"{node.name}_{what}", vector.reshape(shape).astype(dtype))
        for what, vector in (("scale", affine.scale), ("shift", affine.shift))
    )
    scaled = edit.node(node, "Mul", [affine.x, scale], like=node.outputs[0])
    edit.swap(node, [scaled, edit.node(node, "Add", [scaled.outputs[0], shift], like=node.outputs[0])])
    return True


def _add_before_squeeze(node: ir.Node, edit: Edit) -> bool:
    """``Squeeze(Conv) + c`` -> ``Squeeze(Conv + c)``: how 1-D convolutions come from TensorFlow, whose bias then goes
    into the Conv."""
    pair = operands(node)
    squeeze = producer(pair[0], "Squeeze") if pair is not None and read_once(pair[0]) else None
    conv = None if squeeze is None else producer(squeeze.inputs[0], "Conv", "ConvTranspose")
    over, count = (axes(squeeze) if squeeze is not None else None), rank(conv.outputs[0] if conv is not None else None)
    array = None if pair is None else query.constant(pair[1])
    if pair is None or squeeze is None or conv is None or over is None or count is None or array is None:
        return False
    if not read_once(conv.outputs[0]) or squeeze.graph is not node.graph or array.ndim > count - len(over):
        return False
    wide = array.reshape((1,) * (count - len(over) - array.ndim) + array.shape)
    for axis in sorted(axis % count for axis in over):
        wide = np.expand_dims(wide, axis)
    added = edit.node(node, "Add", [conv.outputs[0], edit.reweighed(pair[1], wide)], like=conv.outputs[0])
    inputs = [added.outputs[0], *squeeze.inputs[1:]]
    edit.swap(node, [added, edit.node(squeeze, "Squeeze", inputs, dict(squeeze.attributes), like=node.outputs[0])])
    return True


fold_affine = each(_fold_affine, "BatchNormalization", "Mul", "Add")
add_before_squeeze = each(_add_before_squeeze, "Add")
split_batch_norm = each(_split_batch_norm, "BatchNormalization")
