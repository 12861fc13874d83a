"""Constant weights stored in a number format; activations stay float (L6).

Three ways, by what was measured on ONNX Runtime 1.32:

- ``kernel``: DequantizeLinear in front of a MatMul or Gemm that ONNX Runtime fuses into MatMulNBits. It wants integers
  of 2, 4 or 8 bits, [K, N], a DequantizeLinear and constants of its own: weights read twice are stored twice, those of
  a Gemm with transB = 1 are turned.
- ``rows``: a table is gathered as codes and its rows are decoded behind. 128 rows of 384 in 4 bits take 0.23 ms, where
  GatherBlockQuantized takes 0.39 ms and DequantizeLinear in front of the Gather 18 ms.
- ``load``: everything else is decoded by operators the runtime folds when it loads the model, since DequantizeLinear
  in front of a float kernel would run at each run. Small files, then, but float in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import onnx_ir as ir

from edgeq.errors import ModelError
from edgeq.ir import edit, query
from edgeq.num.formats import E4M3, E5M2, Int
from edgeq.num.quant import CHANNEL, TENSOR, Coded
from edgeq.rewrite.decode import Rows, Site, decoded, scales

Way = Literal["kernel", "rows", "load"]
Edge = tuple[str, int]

KERNEL_OPSETS = {2: 25, 4: 21, 8: 21}  # bits of integers MatMulNBits takes -> the opset whose DequantizeLinear has them
KERNEL_BLOCKS = (16, 32, 64, 128, 256)
OPSET = 13  # axes as inputs, bf16


def store_weights(model: ir.Model, coded: Mapping[Edge, Coded]) -> ir.Model:
    """(Model, (node, input) -> codes in the weight's shape) -> Model that computes with what the codes stand for.

    Raises ModelError where the model's opset is too low for a format."""
    clone = model.clone()
    names = edit.Names(clone)
    nodes = {str(node.name): node for node in clone.graph}
    first, opset = next(iter(clone.graph)), clone.opset_imports[""]
    shared: dict[object, ir.Value] = {}
    loaded: dict[object, ir.Value] = {}
    ways = ways_of(clone, coded)
    for name, index in sorted(coded, key=lambda edge: ways[edge] != "load"):  # while the first node is still there
        node, value, constant = nodes[name], nodes[name].inputs[index], coded[name, index]
        if value is None or not query.is_constant(value):
            raise TypeError(f"input {index} of {name} is not constant")
        _check_opset(constant, opset, name)
        stem = names.fresh(f"{value.name}_quantized")
        if ways[name, index] == "kernel":
            _before_kernel(Site(clone.graph, node, names, stem, shared), node, index, constant)
        elif ways[name, index] == "rows":
            _behind_gather(Site(clone.graph, node, names, stem, shared), node, constant)
        else:
            params = constant.params
            key = (value.name, str(params.quant), params.axis, constant.codes.tobytes(), params.scale.tobytes())
            if key not in loaded:
                site = Site(clone.graph, first, names, stem, shared)
                loaded[key] = _as(site, decoded(site, constant), value)
            node.replace_input_with(index, loaded[key])
    edit.drop_dead(clone)
    return clone


def ways_of(model: ir.Model, coded: Mapping[Edge, Coded]) -> dict[Edge, Way]:
    """How ``store_weights`` stores each."""
    nodes = {str(node.name): node for node in model.graph}
    opset = model.opset_imports[""]
    return {edge: way(nodes[edge[0]], edge[1], constant, opset) for edge, constant in coded.items()}


def way(node: ir.Node, index: int, coded: Coded, opset: int) -> Way:
    """How a weight is stored so that it runs best."""
    if node.op_type == "Gather" and index == 0 and _reads_rows(node, coded):
        return "rows"
    return "kernel" if _has_kernel(node, index, coded, opset) else "load"


def _reads_rows(node: ir.Node, coded: Coded) -> bool:
    axis, indices = query.attribute(node, "axis", 0), query.dims(node.inputs[1])
    whole = coded.params.quant.block <= 0 or coded.params.axis == 1
    return coded.codes.ndim == 2 and axis in (0, -2) and indices is not None and whole


def _has_kernel(node: ir.Node, index: int, coded: Coded, opset: int) -> bool:
    """Whether DequantizeLinear, MatMul or Gemm become one MatMulNBits."""
    quant, value = coded.params.quant, node.inputs[index]
    if not isinstance(quant.format, Int) or opset < KERNEL_OPSETS.get(quant.format.bits, 1 << 16):
        return False
    if node.op_type not in ("MatMul", "Gemm") or index != 1 or coded.codes.ndim != 2 or value is None:
        return False
    turned = bool(query.attribute(node, "transB", 0))
    out = 0 if turned else 1
    axis = {TENSOR: None, CHANNEL: out}.get(quant.block, 1 - out)
    fits = quant.block in (TENSOR, CHANNEL, *KERNEL_BLOCKS) and coded.params.axis == axis
    return fits and value.dtype == ir.DataType.FLOAT and (node.op_type == "MatMul" or _is_plain(node, coded, out))


def _is_plain(node: ir.Node, coded: Coded, out: int) -> bool:
    """Whether a Gemm is x W + b with b f32[out] or none."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    factors = [query.attribute(node, name, 1.0) for name in ("alpha", "beta")]
    vector = bias is None or (query.is_constant(bias) and query.dims(bias) == (coded.codes.shape[out],))
    return vector and factors == [1.0, 1.0] and not query.attribute(node, "transA", 0)


def _before_kernel(site: Site, node: ir.Node, index: int, coded: Coded) -> None:
    params, codes, form = coded.params, coded.codes, coded.params.quant.format
    if query.attribute(node, "transB", 0):
        axis = None if params.axis is None else 1 - params.axis  # a vector of scales a channel is its own transpose
        params = replace(params, scale=params.scale.T, zero_point=params.zero_point.T, axis=axis)
        codes = codes.T
        node.attributes.pop("transB")
    dtype = ir.DataType[f"{'INT' if isinstance(form, Int) and form.signed else 'UINT'}{form.bits}"]
    inputs = [site.constant("", codes.astype(dtype.numpy())), scales(site, params, 0)]
    if params.zero_point.any():
        inputs.append(site.constant("zero_point", params.zero_point.astype(dtype.numpy())))
    attributes = {} if params.axis is None else {"axis": params.axis}
    if params.quant.block > 0:
        attributes["block_size"] = params.quant.block
    real = site.node("DequantizeLinear", inputs, ir.DataType.FLOAT, **attributes)
    real.shape = ir.Shape(codes.shape)
    node.replace_input_with(index, real)


def _behind_gather(site: Site, node: ir.Node, coded: Coded) -> None:
    table, indices, output = node.inputs[0], node.inputs[1], node.outputs[0]
    if table is None or indices is None:
        raise TypeError(f"{node.name} gathers nothing")
    real = decoded(site, coded, Rows(indices, len(query.dims(indices) or ())))
    if table.dtype not in (None, ir.DataType.FLOAT):
        real = site.node("Cast", [real], table.dtype, to=table.dtype)
    edit.take_over(output, real)
    edit.remove_node(node)


def _as(site: Site, real: ir.Value, weight: ir.Value) -> ir.Value:
    """``real`` in the type of the weight it stands for."""
    if weight.dtype not in (None, ir.DataType.FLOAT):
        real = site.node("Cast", [real], weight.dtype, to=weight.dtype)
    real.shape = weight.shape
    return real


def _check_opset(coded: Coded, opset: int, name: str) -> None:
    needed = 19 if coded.params.quant.format in (E4M3, E5M2) or coded.params.quant.scale == E4M3 else OPSET
    if opset < needed:
        raise ModelError(
            f"{coded.params.quant} needs opset {needed}, the model of node {name!r} has {opset}",
            hint="read the model with a higher opset",
        )
