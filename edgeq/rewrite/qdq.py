"""Insert QuantizeLinear/DequantizeLinear as a Plan and its Encodings say (L6).

Nothing is decided here. Codes are stored for every constant; activations get one Q and one DQ each: behind an integer
kernel every reader takes the DQ (the kernel writes codes only), behind a float producer only integer kernels do, so
float readers keep the exact value. Pixels that come as codes need no Q.

ONNX Runtime quantizes the weights of a float Conv, ConvTranspose or Gemm between a DQ and a Q by itself, with one scale
for all of them (its pass WeightBiasQuantization; MobileNetV2's first depthwise convolution "kept float" cost 4.9 dB).
It looks for a DQ with one scale, so such a node reads one that repeats the scale for each channel: the same numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_ir as ir

from edgeq.analyse.encode import Encodings, head_values
from edgeq.analyse.place import Plan
from edgeq.ir import edit, query
from edgeq.ir.pixels import codes_of
from edgeq.num.formats import Int
from edgeq.num.quant import Coded, QParams

U8 = ir.DataType.UINT8
SEIZED = ("Conv", "ConvTranspose", "Gemm")  # what the runtime's WeightBiasQuantization takes


def insert_qdq(model: ir.Model, plan: Plan, encodings: Encodings) -> ir.Model:
    """(Model, decision) -> QDQ model. Raises KeyError when the plan names what the model doesn't have."""
    clone = model.clone()
    names = edit.Names(clone)
    heads = {str(node.name): node for node in clone.graph}
    values = head_values(clone)
    readers = _integer_readers(plan, heads)
    integer_outputs = {
        str(value.name)
        for atom in plan.atoms
        if atom.name in plan.integer and atom.name not in plan.bare
        for value in atom.outputs
    }
    for name in plan.tensors:
        _quantize_tensor(
            clone.graph,
            values[name],
            encodings.activations[name],
            names,
            None if name in integer_outputs else readers.get(name, []),
        )
    for product in [node for node in clone.graph if node.op_type in SEIZED and str(node.name) not in plan.integer]:
        if _seized(product):
            _shield(product, names)
    stored: dict[tuple[str, ...], list[ir.Value]] = {}
    for (node, index), coded in encodings.constants.items():
        if node not in plan.integer:
            continue  # encodings of a larger plan serve its parts
        _quantize_constant(clone.graph, heads[node], index, coded, names, stored)
    integer_nodes = {str(node.name) for atom in plan.atoms if atom.name in plan.integer for node in atom.nodes}
    for (node, index), (codes, scales) in encodings.biases.items():
        if node not in integer_nodes:
            continue
        _quantize_bias(clone.graph, heads[node], index, codes, scales, names)
    edit.drop_dead(clone)
    return clone


def _integer_readers(plan: Plan, heads: dict[str, ir.Node]) -> dict[str, list[tuple[ir.Node, int]]]:
    """Tensor name -> the (node, input index) places where integer kernels read it."""
    readers: dict[str, list[tuple[ir.Node, int]]] = {}
    for atom in (atom for atom in plan.atoms if atom.name in plan.integer):
        wanted = {str(value.name) for value in atom.inputs}
        head = heads[atom.name]
        for index, value in enumerate(head.inputs):
            if value is not None and value.name in wanted and not query.is_constant(value):
                readers.setdefault(str(value.name), []).append((head, index))
    return readers


def _quantize_tensor(
    graph: ir.Graph, value: ir.Value, params: QParams, names: edit.Names, readers: list[tuple[ir.Node, int]] | None
) -> None:
    """value -> Q -> DQ. ``readers``: places that take the DQ; None means all of them, the graph's output included."""
    name = str(value.name)
    scale, zero = _parameters(graph, name, params, names)
    everywhere = readers is None
    places = list(value.uses()) if readers is None else readers
    q = edit.make_node(
        "QuantizeLinear",
        [value, scale, zero],
        names.fresh(f"{name}_QuantizeLinear"),
        names.fresh(f"{name}_quantized"),
        like=value,
        dtype=_dtype(params),
    )
    pixels = codes_of(value)
    known = pixels is not None and params.scale == 1 and params.zero_point == pixels[1] and _dtype(params) == U8
    dq = edit.make_node(
        "DequantizeLinear",
        [pixels[0] if known and pixels is not None else q.outputs[0], scale, zero],
        names.fresh(f"{name}_DequantizeLinear"),
        names.fresh(f"{name}_dequantized"),
        like=value,
    )
    producer = value.producer()
    if producer is None:
        first = next(iter(graph))
        graph.insert_before(first, [q, dq])
    else:
        graph.insert_after(producer, [q, dq])
    for node, index in places:
        node.replace_input_with(index, dq.outputs[0])
    if everywhere and value.is_graph_output():
        _hand_over_output(graph, value, dq.outputs[0], names)


def _seized(node: ir.Node) -> bool:
    """Whether the one reader of a product, behind Relu and Clip, is a Q."""
    while True:
        readers = list(node.outputs[0].uses())
        if len(readers) != 1 or node.outputs[0].is_graph_output():
            return False
        node = readers[0].node
        if node.op_type not in ("Relu", "Clip"):
            return node.op_type == "QuantizeLinear"


def _shield(node: ir.Node, names: edit.Names) -> None:
    """Let a float product read its codes through a DQ that has the scale once for each channel."""
    value, weight = node.inputs[0], query.dims(node.inputs[1])
    dq = value.producer() if value is not None else None
    if dq is None or dq.op_type != "DequantizeLinear" or dq.graph is None or not query.is_constant(node.inputs[1]):
        return
    scale, zero = (query.constant(source) for source in dq.inputs[1:3])
    channels = _channels(node, weight)
    if scale is None or zero is None or scale.ndim or channels is None or channels < 2:
        return
    stem = f"{dq.outputs[0].name}_channels"
    inputs = [
        edit.add_initializer(dq.graph, names.fresh(f"{stem}_{what}"), np.repeat(array, channels))
        for what, array in (("scale", scale), ("zero_point", zero))
    ]
    new = edit.make_node(
        "DequantizeLinear", [dq.inputs[0], *inputs], names.fresh(f"{stem}_DequantizeLinear"), names.fresh(stem),
        {"axis": 1}, like=dq.outputs[0],
    )  # fmt: skip
    dq.graph.insert_after(dq, new)
    node.replace_input_with(0, new.outputs[0])


def _channels(node: ir.Node, weight: tuple[int | None, ...] | None) -> int | None:
    """Size of axis 1 of what a product reads; None where it isn't known."""
    if weight is None or (node.op_type == "Gemm" and query.attribute(node, "transA", 0)):
        return None
    if node.op_type == "Conv":
        return None if weight[1] is None else weight[1] * query.attribute(node, "group", 1)
    return weight[1] if node.op_type == "Gemm" and query.attribute(node, "transB", 0) else weight[0]


def _hand_over_output(graph: ir.Graph, value: ir.Value, new: ir.Value, names: edit.Names) -> None:
    """The graph's output keeps its name though another node writes it now."""
    name = str(value.name)
    value.name = names.fresh(f"{name}_raw")
    new.name = name
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = new


def _quantize_constant(
    graph: ir.Graph,
    node: ir.Node,
    index: int,
    coded: Coded,
    names: edit.Names,
    stored: dict[tuple[str, ...], list[ir.Value]],
) -> None:
    """``stored``: codes, scale and zero point by constant and codes, so that shared weights are shared as codes."""
    value, params = node.inputs[index], coded.params
    if value is None:
        raise TypeError(f"{node.name} has no input {index}")
    codes = coded.codes.astype(_dtype(params).numpy())
    key = (str(value.name), str(params.quant), str(params.axis), _digest(params.scale), _digest(codes))
    if key not in stored:
        name = names.fresh(f"{value.name}_quantized")
        stored[key] = [edit.add_initializer(graph, name, codes), *_parameters(graph, name, params, names)]
    _dequantize(graph, node, index, stored[key], params.axis, names)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def _quantize_bias(
    graph: ir.Graph, node: ir.Node, index: int, codes: np.ndarray, scales: np.ndarray, names: edit.Names
) -> None:
    value = node.inputs[index]
    if value is None:
        raise TypeError(f"{node.name} has no bias")
    name = names.fresh(f"{value.name}_quantized")
    stored = edit.add_initializer(graph, name, codes.astype(np.int32))
    scale = edit.add_initializer(graph, names.fresh(f"{name}_scale"), scales.astype(np.float32))
    zero = edit.add_initializer(graph, names.fresh(f"{name}_zero_point"), np.zeros(scales.shape, np.int32))
    _dequantize(graph, node, index, [stored, scale, zero], 0 if scales.ndim else None, names)


def _dequantize(
    graph: ir.Graph,
    node: ir.Node,
    index: int,
    inputs: list[ir.Value],
    axis: int | None,
    names: edit.Names,
) -> None:
    """Put a DQ of stored codes before input ``index`` of ``node``. Each reader has its own: shared ones don't fuse."""
    attributes = {} if axis is None else {"axis": axis}
    before = node.inputs[index]
    stem = str(inputs[0].name)
    dq = edit.make_node(
        "DequantizeLinear",
        inputs,
        names.fresh(f"{stem}_DequantizeLinear"),
        names.fresh(f"{stem}_dequantized"),
        attributes,
        like=inputs[0],
        dtype=before.dtype if before is not None else None,
    )
    graph.insert_before(node, dq)
    node.replace_input_with(index, dq.outputs[0])


def _parameters(graph: ir.Graph, stem: str, params: QParams, names: edit.Names) -> tuple[ir.Value, ir.Value]:
    scale = edit.add_initializer(graph, names.fresh(f"{stem}_scale"), params.scale.astype(np.float32))
    zero = params.zero_point.astype(_dtype(params).numpy())
    return scale, edit.add_initializer(graph, names.fresh(f"{stem}_zero_point"), zero)


def _dtype(params: QParams) -> ir.DataType:
    form = params.quant.format
    if not isinstance(form, Int):
        raise TypeError(f"{params.quant} has no integer codes")
    return ir.DataType[f"{'INT' if form.signed else 'UINT'}{form.bits}"]
