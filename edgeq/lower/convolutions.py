"""Integer convolutions in edgeq's own kernels: those with a channel a group, and those of few channels (L7).

``edgeq.kernels.DepthwiseConv`` and ``StemConv`` take what QLinearConv takes, with the channels of X and Y last, and
give its bits in a third to nine tenths of the time (measured: docs/targets.md). Their definition in the file is that
QLinearConv between two transpositions, which a runtime without the library runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.ir import query
from edgeq.rewrite.activation import clip_bounds
from edgeq.rewrite.match import Edit, each, producer, reader
from edgeq.target.kernels import DOMAIN

FEWEST_CHANNELS, MOST_TAPS = 16, 64  # native/convolution.hpp
FEW = 4  # channels of a picture
TO_LAST, FROM_LAST = (0, 2, 3, 1), (0, 3, 1, 2)
NEAR = 1e-5  # of a bias's scale: products of f32


def _by_channel(node: ir.Node, edit: Edit) -> bool:
    """``Q(Conv(DQ(x), DQ(w), DQ(b)))`` of a channel a group -> DepthwiseConv(x, w, b)."""
    shape = query.dims(node.inputs[1]) or (0, 0)
    return shape[1] == 1 and query.attribute(node, "group", 1) == shape[0] and _replace("DepthwiseConv", node, edit)


def _of_few_channels(node: ir.Node, edit: Edit) -> bool:
    """The same of at most 4 channels -> StemConv(x, w, b)."""
    shape = query.dims(node.inputs[1]) or (0, 0)
    return (shape[1] or FEW + 1) <= FEW and query.attribute(node, "group", 1) == 1 and _replace("StemConv", node, edit)


by_channel = each(_by_channel, "Conv")
of_few_channels = each(_of_few_channels, "Conv")


def _replace(op: str, node: ir.Node, edit: Edit) -> bool:
    x, w = (producer(value, "DequantizeLinear") for value in node.inputs[:2])
    q = _quantizes(node)
    if node.graph is not edit.model.graph or x is None or w is None or q is None or not _fits(node, x, w, q):
        return False  # the kernels want constants, which a body reads from outside
    bias = _bias(node, x, w)
    kernel = query.dims(w.inputs[0])
    if bias is None or kernel is None:
        return False
    biases = edit.constant(edit.model.graph, f"{node.name}_bias", bias)
    attributes = {
        "kernel_shape": kernel[2:], "strides": query.attribute(node, "strides", (1, 1)),
        "pads": query.attribute(node, "pads", (0, 0, 0, 0)), "group": query.attribute(node, "group", 1),
    }  # fmt: skip
    last = edit.node(q, "Transpose", [x.inputs[0]], {"perm": TO_LAST})
    inputs = [last.outputs[0], *x.inputs[1:3], *w.inputs[:3], *q.inputs[1:3], biases]
    conv = edit.node(q, op, inputs, attributes, domain=DOMAIN)
    first = edit.node(q, "Transpose", [conv.outputs[0]], {"perm": FROM_LAST}, like=q.outputs[0])
    for made, like in ((last, x.inputs[0]), (conv, q.outputs[0])):
        made.outputs[0].type = q.outputs[0].type
        made.outputs[0].shape = _last(like)
    edit.swap(q, [last, conv, first])
    conv.name = node.name  # whose work this is now
    if (function := _function(op, edit.opset)).identifier() not in edit.model.functions:
        edit.model.functions[function.identifier()] = function
    return True


def _quantizes(node: ir.Node) -> ir.Node | None:
    """The Q behind a node, or behind clips that its range makes needless."""
    after = reader(node.outputs[0], "QuantizeLinear", "Clip", "Relu")
    if after is None or after.op_type == "QuantizeLinear":
        return after
    q = reader(after.outputs[0], "QuantizeLinear")
    bounds, params = clip_bounds(after), None if q is None else _per_tensor(q)
    if q is None or bounds is None or params is None:
        return None
    (scale, zero), info = params, np.iinfo(np.uint8)
    low, high = (round(float(np.clip(bound / scale, -1e6, 1e6))) + zero for bound in bounds)
    return q if low <= info.min and high >= info.max else None


def _fits(node: ir.Node, x: ir.Node, w: ir.Node, q: ir.Node) -> bool:
    """Whether the kernels take a convolution: 8-bit codes, two axes, nothing dilated."""
    weights, shape = w.inputs[0], query.dims(w.inputs[0])
    zeros = query.constant(w.inputs[2]) if len(w.inputs) > 2 else None
    if _per_tensor(x) is None or _per_tensor(q) is None or shape is None or len(shape) != 4 or None in shape:
        return False
    channels, _, height, width = (int(dim or 0) for dim in shape)
    scales = query.constant(w.inputs[1])
    return bool(
        (weights is not None and query.is_constant(weights) and weights.dtype == ir.DataType.INT8)
        and (scales is not None and (scales.size == 1 or query.attribute(w, "axis", 1) == 0))
        and (zeros is not None and not zeros.any())
        and channels >= FEWEST_CHANNELS
        and height * width <= MOST_TAPS
        and query.attribute(node, "auto_pad", "NOTSET") == "NOTSET"
        and all(step == 1 for step in query.attribute(node, "dilations", (1, 1)))
    )  # fmt: skip


def _per_tensor(node: ir.Node) -> tuple[float, int] | None:
    """Scale and zero point of a Q or DQ of u8 that has one of each."""
    if len(node.inputs) < 3:
        return None
    scale, zero = query.constant(node.inputs[1]), query.constant(node.inputs[2])
    if scale is None or zero is None or scale.size != 1 or zero.size != 1 or zero.dtype != np.uint8:
        return None
    return float(scale.item()), int(zero.item())


def _bias(node: ir.Node, x: ir.Node, w: ir.Node) -> NDArray[np.int32] | None:
    """Codes of the bias, in steps of the sum; zeros without one, None for one in other steps."""
    shape = query.dims(w.inputs[0])
    assert shape is not None
    channels = int(shape[0] or 0)
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return np.zeros(channels, np.int32)
    dq = producer(node.inputs[2], "DequantizeLinear")
    codes, found, steps, weights = (
        query.constant(value)
        for value in ((dq.inputs[0], dq.inputs[1]) if dq is not None else (None, None)) + (x.inputs[1], w.inputs[1])
    )
    if codes is None or found is None or steps is None or weights is None or codes.dtype != np.int32:
        return None
    return codes if np.allclose(found, steps * weights, rtol=NEAR, atol=0) else None


def _last(value: ir.Value | None) -> ir.Shape | None:
    """The shape of pictures with their channels last: the runtime infers none behind a kernel of ours."""
    return None if value is None or value.shape is None else ir.Shape([value.shape[axis] for axis in TO_LAST])


def _function(op: str, opset: int) -> ir.Function:
    """A convolution as ONNX has it."""
    names = ("X", "x_scale", "x_zero_point", "W", "w_scale", "w_zero_point", "y_scale", "y_zero_point", "B")
    inputs = [ir.Value(name=name) for name in names]
    words: Sequence[tuple[str, ir.AttributeType]] = (
        ("kernel_shape", ir.AttributeType.INTS), ("strides", ir.AttributeType.INTS), ("pads", ir.AttributeType.INTS),
        ("group", ir.AttributeType.INT),
    )  # fmt: skip
    first = ir.node("Transpose", [inputs[0]], {"perm": FROM_LAST})
    references: list[Any] = [ir.RefAttr(name, name, kind) for name, kind in words]
    conv = ir.Node("", "QLinearConv", [first.outputs[0], *inputs[1:]], references, num_outputs=1)
    last = ir.node("Transpose", [conv.outputs[0]], {"perm": TO_LAST})
    for value, name in zip((first.outputs[0], conv.outputs[0], last.outputs[0]), ("x", "y", "Y"), strict=True):
        value.name = name
    graph = ir.Graph(inputs, [last.outputs[0]], nodes=[first, conv, last], opset_imports={"": opset}, name=op)
    return ir.Function(DOMAIN, op, graph=graph, attributes=[ir.Attr(name, kind, None) for name, kind in words])
