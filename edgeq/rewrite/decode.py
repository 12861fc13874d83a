"""Stored codes -> real numbers by operators every ONNX runtime has (L6).

Codes of 8 bits and more are stored in their own type and cast; smaller ones are packed in bytes, which index a table of
the numbers they hold. What depends on constants alone is folded when ONNX Runtime loads the model, so it costs load
time and nothing later: on 1.32, MatMul by a 1024 x 1024 weight in f8e4m3 takes 0.16 ms behind Cast and Mul, as in
float, and 1.8 ms behind DequantizeLinear, which isn't folded but runs each time. Where ``rows`` of a table are gathered
first, only these are decoded, at each run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.ir import edit
from edgeq.num.formats import BF16, E4M3, E5M2, F16, F32, Float, Format, Int
from edgeq.num.minifloat import STORED, decode
from edgeq.num.packing import group, pack
from edgeq.num.quant import TENSOR, Coded, QParams, scale_codes

TYPED = (F16, BF16, E4M3, E5M2)  # floats stored in a type that ONNX Runtime casts
GATHERED = (F16, BF16)  # those of them that it gathers


@dataclass(frozen=True)
class Site:
    """Where nodes and constants go. ``stem`` begins their names; ``shared`` holds constants that weights share."""

    graph: ir.Graph
    before: ir.Node
    names: edit.Names
    stem: str
    shared: dict[Any, ir.Value] = field(default_factory=dict)

    def node(
        self, op: str, inputs: Sequence[ir.Value], dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        """A new node's output; its type is that of the first input unless told."""
        name = self.names.fresh(f"{self.stem}_{op}")
        output = self.names.fresh(f"{self.stem}_{op.lower()}")
        made = edit.make_node(op, inputs, name, output, attributes, dtype=dtype or inputs[0].dtype)
        self.graph.insert_before(self.before, made)
        return made.outputs[0]

    def constant(self, word: str, array: NDArray[Any]) -> ir.Value:
        return edit.add_initializer(self.graph, self.names.fresh(f"{self.stem}_{word}" if word else self.stem), array)

    def common(self, word: str, array: NDArray[Any]) -> ir.Value:
        """A constant that all weights of a model share by its content."""
        key = (word, str(array.dtype), array.shape, array.tobytes())
        if key not in self.shared:
            self.shared[key] = edit.add_initializer(self.graph, self.names.fresh(word), array)
        return self.shared[key]


@dataclass(frozen=True)
class Rows:
    """Rows of a table to be decoded: those at ``indices``, which have ``rank`` axes."""

    indices: ir.Value
    rank: int


def decoded(site: Site, coded: Coded, rows: Rows | None = None) -> ir.Value:
    """The real f32 weight in the shape of its codes; of codes [rows, columns] ``rows``, [*indices, columns]."""
    params, codes = coded.params, _blocked(coded.codes, coded.params)
    real = _reals(site, "", codes, params.quant.format, rows)
    apart = (
        rows if rows is not None and params.axis is not None and (params.quant.block > 0 or params.axis == 0) else None
    )
    if isinstance(params.quant.format, Int) and params.zero_point.any():
        zero = np.unique(params.zero_point)
        offset = (
            site.constant("zero_point", zero.astype(np.float32).reshape(()))
            if len(zero) == 1
            else _reals(site, "zero_point", spread(params.zero_point, params, codes.ndim), params.quant.format, apart)
        )
        real = site.node("Sub", [real, offset])
    if params.scale.ndim or params.scale != 1:
        real = site.node("Mul", [real, scales(site, params, codes.ndim, apart)])
    if params.quant.block > 0:
        axis = params.axis or 0
        shape = list(coded.codes.shape)
        whole = [*shape[:axis], -(-shape[axis] // params.quant.block) * params.quant.block, *shape[axis + 1 :]]
        real = _reshaped(site, real, whole, rows)
        if whole != shape:
            at = axis if rows is None else rows.rank + axis - 1
            real = _sliced(site, real, shape[axis], at)
    return real


def scales(site: Site, params: QParams, rank: int, rows: Rows | None = None) -> ir.Value:
    """The f32 scales of a mapping, in a shape that broadcasts against its blocked codes of ``rank`` axes; for
    DequantizeLinear, which wants the mapping's own shape, ``rank`` is 0."""
    stored = scale_codes(params) if params.quant.scale != F32 else params.scale
    shaped = spread(stored, params, rank) if rank else stored
    found = _reals(site, "scale", shaped, params.quant.scale, rows)
    if params.quant.scale == E4M3:
        found = site.node("Mul", [found, site.constant("tensor_scale", np.array(params.tensor_scale, np.float32))])
    return found


def spread(values: NDArray[Any], params: QParams, rank: int) -> NDArray[Any]:
    """A scale or zero point in a shape that broadcasts against blocked codes of ``rank`` axes."""
    if params.quant.block == TENSOR or params.axis is None:
        return values
    if params.quant.block > 0:
        return np.expand_dims(values, params.axis + 1)
    return values.reshape([-1 if axis == params.axis else 1 for axis in range(rank)])


def _blocked(codes: NDArray[np.integer], params: QParams) -> NDArray[np.integer]:
    """Codes with the axis that is cut in blocks as two, [blocks, elements]; a short last block is filled with 0."""
    block, axis = params.quant.block, params.axis
    if block <= 0 or axis is None:
        return codes
    padding = [(0, -codes.shape[axis] % block if at == axis else 0) for at in range(codes.ndim)]
    return np.pad(codes, padding).reshape(*codes.shape[:axis], -1, block, *codes.shape[axis + 1 :])


def _reals(site: Site, word: str, codes: NDArray[Any], form: Format, rows: Rows | None) -> ir.Value:
    """Codes of a format (f32 as they are), any shape -> f32 of that shape, or rows gathered from its first axis."""
    if form == F32:
        return _gathered(site, site.constant(word, codes), rows)
    if isinstance(form, Int) and form.bits >= 8:
        typed = codes.astype(f"{'i' if form.signed else 'u'}{form.bits // 8}")
        return site.node("Cast", [_gathered(site, site.constant(word, typed), rows)], ir.DataType.FLOAT, to=1)
    if isinstance(form, Float) and form in (TYPED if rows is None else GATHERED):
        typed = codes.astype(f"u{form.bits // 8}").view(STORED[form])
        return site.node("Cast", [_gathered(site, site.constant(word, typed), rows)], ir.DataType.FLOAT, to=1)
    lead = codes.shape[:1] if rows is not None else ()
    flat = codes.reshape(*lead, -1)
    found = _unpacked(site, _gathered(site, site.constant(word, pack(flat, form.bits)), rows), form)
    if flat.shape[-1] % group(form.bits)[0]:
        whole = -(-flat.shape[-1] // group(form.bits)[0]) * group(form.bits)[0]
        found = _reshaped(site, found, [*lead, whole], rows)
        found = _sliced(site, found, flat.shape[-1], rows.rank if rows is not None else 0)
    return _reshaped(site, found, codes.shape, rows)


def _unpacked(site: Site, packed: ir.Value, form: Format) -> ir.Value:
    """uint8[..., groups, bytes] -> f32, as many elements as codes are packed. A byte of whole codes indexes the numbers
    it holds, a group of three bytes is taken apart by division first."""
    count, size = group(form.bits)
    index = site.node("Cast", [packed], ir.DataType.INT32, to=ir.DataType.INT32)
    if size > 1:
        weights = site.common("packed_bytes", (256 ** np.arange(size)).astype(np.int32))
        last = site.common("last_axis", np.array([-1]))
        index = site.node("ReduceSum", [site.node("Mul", [index, weights]), last], keepdims=1)
        places = site.common(f"places_{form}", (2 ** (form.bits * np.arange(count))).astype(np.int32))
        index = site.node("Div", [index, places])
        index = site.node("Mod", [index, site.common(f"codes_{form}", np.array(1 << form.bits, np.int32))])
        table = _numbers(form)
    else:
        every = np.arange(256)[:, None] >> (form.bits * np.arange(count)) & ((1 << form.bits) - 1)
        table = _numbers(form)[every]
    return site.node("Gather", [site.common(f"numbers_{form}", table), index])


def _numbers(form: Format) -> NDArray[np.float32]:
    """f32[2**bits]: what each code stands for, by its bits."""
    codes = np.arange(1 << form.bits, dtype=np.int32)
    if isinstance(form, Float):
        return decode(codes, form)
    negative = codes >> (form.bits - 1) if form.signed else np.zeros_like(codes)
    return (codes - (negative << form.bits)).astype(np.float32)


def _gathered(site: Site, stored: ir.Value, rows: Rows | None) -> ir.Value:
    return stored if rows is None else site.node("Gather", [stored, rows.indices], axis=0)


def _reshaped(site: Site, value: ir.Value, shape: Sequence[int], rows: Rows | None) -> ir.Value:
    """To ``shape``, whose first axis is the rows' where these were gathered."""
    dims = list(shape) if rows is None else [*[0] * rows.rank, *shape[1:]]
    return site.node("Reshape", [value, site.common("shape", np.array(dims, np.int64))])


def _sliced(site: Site, value: ir.Value, end: int, axis: int) -> ir.Value:
    bounds = [site.common("bound", np.array([number], np.int64)) for number in (0, end, axis)]
    return site.node("Slice", [value, *bounds])
