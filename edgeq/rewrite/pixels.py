"""A model that takes pictures as they are: normalisation and layout become part of it (L6).

``(pixel * scale - mean) / std`` is ``(pixel - m) * f`` with ``m = mean / scale`` and ``f = scale / std``. Where all
that reads the picture are convolutions, f goes into their weights, channel by channel. m goes into their biases if none
of them pads: a padded 0 stands for a normalised 0, which is the pixel m and no other, so in front of one that pads
``pixel - m`` is computed, and its zeros are right at every border. With a whole m, alike for all channels, that is the
pixel itself as a code with the zero point m, and quantization costs nothing there (``ir.pixels``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.errors import ModelError
from edgeq.ir import edit, query
from edgeq.run.preprocess import Preprocessing

F64 = NDArray[np.float64]


def picture_of(model: ir.Model) -> ir.Value:
    """The one fed input f32[n, ., ., .]. Raises ModelError where there is none, or several."""
    fed = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    found = [one for one in fed if one.dtype == ir.DataType.FLOAT and len(query.dims(one) or ()) == 4]
    if len(found) != 1:
        names = ", ".join(f"{value.name!r} {value.dtype} {value.shape}" for value in fed)
        raise ModelError(
            f"{len(found)} inputs could be pictures, expected one of float32 with 4 axes: {names}",
            hint="leave out --pixels",
        )
    return found[0]


def from_pixels(model: ir.Model, how: Preprocessing) -> ir.Model:
    """(Model of normalised pictures, how they were made) -> the same of uint8[n, h, w, c] pixels, by the same name."""
    clone = model.clone()
    graph, names, value = clone.graph, edit.Names(clone), picture_of(clone)
    dims, planes, name = list(value.shape or ()), how.layout == "NCHW", str(value.name)
    middle, factor = np.divide(how.mean, how.scale), np.divide(how.scale, how.std)
    middle = middle[:1] if np.ptp(middle) == 0 else middle
    convolutions = _convolutions(value) if planes else []
    if convolutions:
        bare = not any(map(_pads, convolutions))
        for node in convolutions:
            _scale(graph, node, factor, middle if bare else np.zeros(1), names)
        factor, middle = np.ones(1), np.zeros(1) if bare else middle
    value.name = names.fresh(f"{name}_normalised")
    fed = ir.Value(
        name=name, type=ir.TensorType(ir.DataType.UINT8),
        shape=ir.Shape([dims[0], dims[2], dims[3], dims[1]] if planes else dims),
    )  # fmt: skip
    graph.inputs[graph.inputs.index(value)] = fed
    made = _arithmetic(fed, middle, factor, planes, graph, names)
    made[-1].outputs[0].shape = ir.Shape(dims)
    graph.insert_before(graph[0], made)
    value.replace_all_uses_with(made[-1].outputs[0], replace_graph_outputs=True)
    edit.drop_dead(clone)
    return clone


def _arithmetic(
    fed: ir.Value, middle: F64, factor: F64, planes: bool, graph: ir.Graph, names: edit.Names
) -> list[ir.Node]:
    """The nodes from pixels to what the model reads."""
    made: list[ir.Node] = []

    def then(op: str, *more: ir.Value, dtype: ir.DataType, **attributes: Any) -> None:
        value, word = (made[-1].outputs[0] if made else fed), op.lower()
        node = names.fresh(f"{fed.name}_{op}")
        made.append(
            edit.make_node(op, [value, *more], node, names.fresh(f"{fed.name}_{word}"), attributes, dtype=dtype)
        )

    def constant(word: str, numbers: F64) -> ir.Value:
        shape = () if numbers.size == 1 else (-1, 1, 1) if planes else (-1,)
        return edit.add_initializer(graph, names.fresh(f"{fed.name}_{word}"), numbers.astype(np.float32).reshape(shape))

    if planes:
        then("Transpose", dtype=ir.DataType.UINT8, perm=[0, 3, 1, 2])
    then("Cast", dtype=ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
    if middle.any():
        then("Add", constant("shift", -middle), dtype=ir.DataType.FLOAT)
    if (factor != 1).any():
        then("Mul", constant("factor", factor), dtype=ir.DataType.FLOAT)
    return made


def _convolutions(value: ir.Value) -> list[ir.Node]:
    """All readers of a picture, if each is a Conv of all its channels with constant weights; else none."""
    readers = query.users(value)
    plain = [
        node
        for node in readers
        if node.op_type == "Conv" and node.inputs[0] is value and query.attribute(node, "group", 1) == 1
        and all(map(query.is_constant, (one for one in node.inputs[1:] if one is not None)))
    ]  # fmt: skip
    return plain if len(plain) == len(readers) and not value.is_graph_output() else []


def _pads(conv: ir.Node) -> bool:
    automatic = query.attribute(conv, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return automatic or any(query.attribute(conv, "pads", ()))


def _scale(graph: ir.Graph, conv: ir.Node, factor: F64, middle: F64, names: edit.Names) -> None:
    """Let ``conv`` compute of pixels what it computed of ``(pixels - middle) * factor``."""
    kernel = conv.inputs[1]
    weight = query.constant(kernel)
    assert kernel is not None and weight is not None
    shape = (1, -1, *[1] * (weight.ndim - 2))
    scaled = weight.astype(np.float64) * np.broadcast_to(factor, weight.shape[1]).reshape(shape)
    conv.replace_input_with(1, _stored(graph, names, f"{kernel.name}_pixels", scaled))
    if middle.any():
        bias = query.constant(conv.inputs[2]) if len(conv.inputs) > 2 else None
        shift = (scaled * np.broadcast_to(middle, weight.shape[1]).reshape(shape)).reshape(weight.shape[0], -1).sum(1)
        made = _stored(graph, names, f"{conv.name}_bias", (0.0 if bias is None else bias.astype(np.float64)) - shift)
        if len(conv.inputs) < 3:
            conv.resize_inputs(3)
        conv.replace_input_with(2, made)


def _stored(graph: ir.Graph, names: edit.Names, name: str, array: F64) -> ir.Value:
    return edit.add_initializer(graph, names.fresh(name), np.asarray(array, np.float32))
