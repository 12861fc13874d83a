"""Fold per-channel scales and shifts into the weights around them (L6).

``y = scale * x + shift`` is what BatchNormalization, Mul and Add by a constant, and re-parametrised blocks all are.
Behind a Conv, ConvTranspose, Gemm or MatMul it goes into that node's weight and bias. In front of a Conv a scale goes
into the weight, since a padded 0 scaled is 0; a shift doesn't where the Conv pads, because the border would see 0 and
not the shift. Everything is computed in float64 and stored in the weight's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.ir import query
from edgeq.rewrite.match import Edit, each, finite, operands, producer, rank, read_once, scalar

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


def _into_conv(node: ir.Node, conv: ir.Node, affine: Affine, edit: Edit) -> bool:
    """W f32[out, in/group, ...] of Conv or f32[in, out/group, ...] of ConvTranspose, bias f32[out]."""
    weight = query.constant(conv.inputs[1])
    assert weight is not None
    group = query.attribute(conv, "group", 1)
    transposed = conv.op_type == "ConvTranspose"
    channels = weight.shape[1] * group if transposed else weight.shape[0]
    scaled = weight
    if affine.scale is not None:
        if affine.scale.size not in (1, channels):
            return False
        scale = np.broadcast_to(affine.scale, channels)
        spread = (group, 1, channels // group) if transposed else (channels,)
        blocks = (group, weight.shape[0] // group, *weight.shape[1:]) if transposed else weight.shape
        scale = scale.reshape(spread + (1,) * (weight.ndim - (2 if transposed else 1)))
        scaled = (weight.reshape(blocks) * scale).reshape(weight.shape)
    bias = _moved_bias(conv.inputs[2] if len(conv.inputs) > 2 else None, affine, channels)
    if bias is None or not finite(weight.dtype, scaled, bias):
        return False
    return _renew(node, conv, scaled, bias, affine, edit)


def _into_gemm(node: ir.Node, gemm: ir.Node, affine: Affine, edit: Edit) -> bool:
    """W f32[in, out] of a straightened Gemm (see ``linear``), bias f32[out]."""
    weight = query.constant(gemm.inputs[1])
    if weight is None or any(query.attribute(gemm, name, 1) != 1 for name in ("alpha", "beta")):
        return False
    channel = 0 if query.attribute(gemm, "transB", 0) else 1
    channels = weight.shape[channel]
    bias = _moved_bias(gemm.inputs[2] if len(gemm.inputs) > 2 else None, affine, channels)
    if bias is None or (affine.scale is not None and affine.scale.size not in (1, channels)):
        return False
    scale = np.ones(1) if affine.scale is None else affine.scale
    scaled = weight if affine.scale is None else weight * (scale[:, None] if channel == 0 and scale.size > 1 else scale)
    return finite(weight.dtype, scaled, bias) and _renew(node, gemm, scaled, bias, affine, edit)


def _moved_bias(bias: ir.Value | None, affine: Affine, channels: int) -> Vector | None:
    """``bias * scale + shift`` f64[channels], or None when the bias isn't a constant vector."""
    old = query.constant(bias)
    if bias is not None and (old is None or old.size not in (1, channels)):
        return None
    if old is not None and old.ndim > 1 and old.shape[-1] != old.size:
        return None
    moved = np.zeros(channels) if old is None else np.broadcast_to(old.reshape(-1).astype(np.float64), channels)
    for vector in (affine.scale, affine.shift):
        if vector is not None and vector.size not in (1, channels):
            return None
    moved = moved if affine.scale is None else moved * affine.scale
    return moved if affine.shift is None else moved + affine.shift


def _renew(node: ir.Node, old: ir.Node, weight: NDArray[Any], bias: Vector, affine: Affine, edit: Edit) -> bool:
    """Put ``old`` with its new weight and bias where ``node`` stands, under the name of ``old``."""
    data, kernel, shift = (*old.inputs, None)[:3]
    assert kernel is not None and node.graph is not None
    kernel = kernel if affine.scale is None else edit.reweighed(kernel, weight)
    if shift is not None and shift.shape is not None and len(shift.shape) == 1:
        shift = edit.reweighed(shift, bias)
    elif shift is not None or bias.any():
        assert kernel.dtype is not None
        shift = edit.constant(node.graph, f"{old.name}_bias", bias.astype(kernel.dtype.numpy()))
    inputs = [data, kernel] if shift is None else [data, kernel, shift]
    attributes = {name: attribute.value for name, attribute in old.attributes.items()}
    new = edit.node(old, old.op_type, inputs, attributes, like=node.outputs[0])
    edit.swap(node, [new], name=old.name)
    return True


def _into_matmul(node: ir.Node, matmul: ir.Node, affine: Affine, edit: Edit) -> bool:
    """W f32[in, out]. A shift stays an Add behind it, as ``linear`` wants it, so only a scale has to move."""
    weight = query.constant(matmul.inputs[1])
    if weight is None or weight.ndim != 2 or affine.scale is None or affine.scale.size not in (1, weight.shape[1]):
        return False
    scaled = weight * affine.scale
    shifts = affine.shift is not None and affine.shift.size in (1, weight.shape[1])
    if not finite(weight.dtype, scaled) or (affine.shift is not None and not shifts):
        return False
    kernel = matmul.inputs[1]
    assert kernel is not None and node.graph is not None
    product = edit.node(matmul, "MatMul", [matmul.inputs[0], edit.reweighed(kernel, scaled)], like=node.outputs[0])
    if affine.shift is None:
        edit.swap(node, [product], name=matmul.name)
        return True
    bias = edit.constant(node.graph, f"{matmul.name}_bias", affine.shift.astype(weight.dtype))
    edit.swap(node, [product, edit.node(node, "Add", [product.outputs[0], bias], like=node.outputs[0])])
    return True


def _into_biased(node: ir.Node, add: ir.Node, affine: Affine, edit: Edit) -> bool:
    """MatMul and the Add of a constant bias behind it: the scale goes into both, the shift into the bias."""
    pair = operands(add)
    matmul = producer(add.inputs[0], "MatMul")
    if pair is None or matmul is None or pair[0] is not add.inputs[0] or not read_once(pair[0]):
        return False
    weight = query.constant(matmul.inputs[1])
    if weight is None or weight.ndim != 2 or (rank(pair[1]) or 0) > 1 or pair[0].producer() is not matmul:
        return False
    bias = _moved_bias(pair[1], affine, weight.shape[1])
    scaled = weight if affine.scale is None else weight * affine.scale
    if bias is None or scaled.shape != weight.shape or not finite(weight.dtype, scaled, bias):
        return False
    kernel = matmul.inputs[1]
    assert kernel is not None
    kernel = kernel if affine.scale is None else edit.reweighed(kernel, scaled)
    product = edit.node(matmul, "MatMul", [matmul.inputs[0], kernel], like=node.outputs[0])
    vector = edit.reweighed(pair[1], bias)
    edit.swap(node, [product, edit.node(add, "Add", [product.outputs[0], vector], like=node.outputs[0])])
    return True


INTO = {
    "Conv": _into_conv,
    "ConvTranspose": _into_conv,
    "Gemm": _into_gemm,
    "MatMul": _into_matmul,
    "Add": _into_biased,
}
"""What a scale or shift can be folded into; Add stands for MatMul with a bias behind it."""


def _split_batch_norm(node: ir.Node, edit: Edit) -> bool:
    """What no weight took becomes Mul and Add, for which targets have integer kernels."""
    affine, axes = _batch_norm(node), rank(node.inputs[0])
    if affine is None or axes is None or affine.scale is None or affine.shift is None or node.graph is None:
        return False
    dtype = node.inputs[1].dtype if node.inputs[1] is not None else None
    if dtype is None or axes < 2 or not finite(dtype.numpy(), affine.scale, affine.shift):
        return False
    shape = (-1,) + (1,) * (axes - 2)
    scale, shift = (
        edit.constant(node.graph, f"{node.name}_{what}", vector.reshape(shape).astype(dtype.numpy()))
        for what, vector in (("scale", affine.scale), ("shift", affine.shift))
    )
    scaled = edit.node(node, "Mul", [affine.x, scale], like=node.outputs[0])
    edit.swap(node, [scaled, edit.node(node, "Add", [scaled.outputs[0], shift], like=node.outputs[0])])
    return True


def _fold_forward(conv: ir.Node, edit: Edit) -> bool:
    """A scalar ``s * x + t`` in front of a Conv goes into it; where it pads, only s does and ``x + t/s`` stays."""
    changed = False
    while (step := _step_forward(conv, edit)) is not None:
        conv, changed = step, True
    return changed


def _step_forward(conv: ir.Node, edit: Edit) -> ir.Node | None:
    before, weight = producer(conv.inputs[0], "Mul", "Add"), query.constant(conv.inputs[1])
    if before is None or weight is None or before.graph is not conv.graph or not read_once(before.outputs[0]):
        return None
    pair = operands(before)
    number = scalar(pair[1]) if pair is not None else None
    if pair is None or number is None or not _keeps_rank(pair) or not query.is_float(pair[1]):
        return None
    if before.op_type == "Mul":
        return _scaled_input(conv, pair[0], weight * np.float64(number), None, edit)
    if not _pads(conv):
        shift = weight.reshape(weight.shape[0], -1).astype(np.float64).sum(1) * number
        return _scaled_input(conv, pair[0], weight, shift, edit)
    return _shift_first(conv, before, pair[0], number, edit)


def _keeps_rank(pair: tuple[ir.Value, ir.Value]) -> bool:
    return (rank(pair[1]) or 0) <= (rank(pair[0]) or 1)


def _pads(conv: ir.Node) -> bool:
    automatic = query.attribute(conv, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return automatic or any(query.attribute(conv, "pads", ()))


def _scaled_input(
    conv: ir.Node, data: ir.Value, weight: NDArray[Any], shift: Vector | None, edit: Edit
) -> ir.Node | None:
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    moved = _moved_bias(bias, Affine(data, None, shift), weight.shape[0])
    kernel = conv.inputs[1]
    if moved is None or kernel is None or kernel.dtype is None or conv.graph is None:
        return None
    if not finite(kernel.dtype.numpy(), weight, moved):
        return None
    if shift is None:
        kernel = edit.reweighed(kernel, weight)
    elif bias is None:
        bias = edit.constant(conv.graph, f"{conv.name}_bias", moved.astype(kernel.dtype.numpy()))
    else:
        bias = edit.reweighed(bias, moved)
    attributes = {name: attribute.value for name, attribute in conv.attributes.items()}
    inputs = [data, kernel] if bias is None else [data, kernel, bias]
    new = edit.node(conv, "Conv", inputs, attributes, like=conv.outputs[0])
    edit.swap(conv, [new])
    return new


def _shift_first(conv: ir.Node, add: ir.Node, source: ir.Value, shift: float, edit: Edit) -> ir.Node | None:
    """``Conv(s * x + t)`` -> ``Conv'(x + t/s)`` with s in the weight, for a Conv that pads."""
    scaled = producer(source, "Mul")
    pair = operands(scaled) if scaled is not None and read_once(source) and scaled.graph is conv.graph else None
    factor = scalar(pair[1]) if pair is not None else None
    weight, kernel = query.constant(conv.inputs[1]), conv.inputs[1]
    if pair is None or not factor or weight is None or kernel is None or kernel.dtype is None or conv.graph is None:
        return None
    if not _keeps_rank(pair) or not np.isfinite(np.float32(shift / factor)):
        return None
    ratio = np.array(shift / factor, kernel.dtype.numpy())
    constant = edit.constant(conv.graph, f"{add.name}_shift", ratio)
    moved = edit.node(add, "Add", [pair[0], constant], like=add.outputs[0])
    conv.graph.insert_before(conv, moved)
    new = _scaled_input(conv, moved.outputs[0], weight * np.float64(factor), None, edit)
    if new is None:
        edit.erase(moved.outputs)
    return new


fold_affine = each(_fold_affine, "BatchNormalization", "Mul", "Add")
split_batch_norm = each(_split_batch_norm, "BatchNormalization")
fold_forward = each(_fold_forward, "Conv")
