"""How far the channels of tensors can be moved towards 0 for nothing (L5).

A tensor that is quantized has one scale and one zero point, so channels that lie apart widen its range and each gets
fewer steps. Between convolutions the constant part of a channel needs no steps at all: the first one leaves it out of
its bias, and the second, which would have multiplied it by its weights, adds that product to its own (high-bias
absorption: Nagel et al. 2019, arXiv 1906.04721, 4.1.3; channel-wise shifting: Wei et al. 2023, arXiv 2304.09145, 4.1).

The second must not be padded, since zeros it puts around an image would have to be moved too. Where nothing stands
between, or sums of such tensors do, each channel is moved by its mean: means add up, so a stream of sums stays
consistent whatever joins it, and results are exact. Behind a Relu a channel moves by what it never falls below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.analyse.stats import Channels, Stats
from edgeq.ir import query

MARGIN = 0.1  # of a channel's spread, that it may yet fall below what calibration saw behind a Relu
TINY = 1e-30
LEAST = 1.05  # factor that all ranges around a tensor must shrink by together

F32 = NDArray[np.float32]


def movable(model: ir.Model) -> dict[str, ir.Value]:
    """Tensors f[n, C, …] that can be moved, by name: those of convolutions, of Relus behind one, and sums of these,
    as long as nothing reads them that can't take it up."""
    return _consistent({str(value.name): value for node in model.graph for value in _written(node)})


def unbounded(found: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
    """Those of ``movable`` with no Relu about them, which can move any way."""
    writers = {name: value.producer() for name, value in found.items()}
    return _consistent({n: found[n] for n, node in writers.items() if node is not None and node.op_type != "Relu"})


def _consistent(found: dict[str, ir.Value]) -> dict[str, ir.Value]:
    """Those whose writers and readers go along."""
    while lost := [name for name, value in found.items() if not _held(value, found)]:
        found = {name: value for name, value in found.items() if name not in set(lost)}
    return found


def _written(node: ir.Node) -> list[ir.Value]:
    """The output of a node that could move it.

    Not that of a depthwise one: behind a Relu most of it is exactly 0, which a shift would put between two codes
    (BlazeFace lost 0.4 dB, though all ranges shrank)."""
    value = node.outputs[0]
    known = value.shape is not None and len(value.shape) > 2 and isinstance(value.shape[1], int)
    if not known or value.is_graph_output():
        return []
    conv = _alone_before(node) if node.op_type == "Relu" else node
    dense = conv is not None and _constant(conv) and query.attribute(conv, "group", 1) == 1
    return [value] if node.op_type == "Add" or dense else []


def _alone_before(relu: ir.Node) -> ir.Node | None:
    """What writes the input of a Relu that nothing else reads."""
    before = relu.inputs[0]
    alone = before is not None and len(query.users(before)) == 1 and not before.is_graph_output()
    return before.producer() if before is not None and alone else None


def _constant(node: ir.Node) -> bool:
    """Whether a node is a convolution whose weight and bias are constants, or that has no bias."""
    return node.op_type == "Conv" and all(query.is_constant(value) for value in node.inputs[1:] if value is not None)


def _held(value: ir.Value, found: Mapping[str, ir.Value]) -> bool:
    """Whether a tensor's writer and all its readers go along, as far as ``found`` is right."""
    writer = value.producer()
    if writer is not None and writer.op_type == "Add" and not _summed(writer, found):
        return False
    return all(_takes(reader, value, found) for reader in query.users(value))


def _summed(node: ir.Node, found: Mapping[str, ir.Value]) -> bool:
    """Whether a sum's operands and result are all movable and of one shape a channel."""
    values = [*node.inputs, *node.outputs]
    shapes = {query.dims(value) for value in values}
    return len(shapes) == 1 and all(value is not None and str(value.name) in found for value in values)


def _takes(reader: ir.Node, value: ir.Value, found: Mapping[str, ir.Value]) -> bool:
    if reader.op_type == "Conv":
        return _constant(reader) and reader.inputs[0] is value and not _padded(reader)
    if reader.op_type == "Relu":
        return str(reader.outputs[0].name) in found
    return reader.op_type == "Add" and _summed(reader, found)


def _padded(node: ir.Node) -> bool:
    same = query.attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return same or any(query.attribute(node, "pads", ()))


def search(model: ir.Model, found: Mapping[str, ir.Value], stats: Mapping[str, Stats]) -> dict[str, F32]:
    """Tensor -> how far f32[C] to move its channels down, for all that are worth it. ``stats``: of ``found``."""
    seen = _consistent({name: value for name, value in found.items() if stats[name].channels is not None})
    shifts: dict[str, F32] = {}
    for node in model.graph:  # in its order: sums come behind what they add
        name = str(node.outputs[0].name)
        if name in seen:
            shifts[name] = _shift(node, shifts, stats)
    worth: dict[str, F32] = {}
    for names in _streams(model, shifts):
        ranges = [name for name in names if not _behind(seen[name])]
        if math.prod(_shrinking(stats[name].channels, shifts[name]) for name in ranges) >= LEAST:
            worth.update({name: shifts[name] for name in names})
    return worth


def _shift(node: ir.Node, shifts: Mapping[str, F32], stats: Mapping[str, Stats]) -> F32:
    if node.op_type == "Add":
        first, second = (shifts[str(value.name)] for value in node.inputs if value is not None)
        return first + second
    value = node.outputs[0]
    relu = value if node.op_type == "Relu" else _behind(value)
    channels = stats[str((relu or value).name)].channels
    if channels is None:
        raise TypeError(f"{value.name} has no channels")
    if relu is None:
        return channels.mean.astype(np.float32)
    return np.maximum(channels.low - MARGIN * (channels.high - channels.low), np.float32(0))


def _behind(value: ir.Value) -> ir.Value | None:
    """The output of the Relu that reads a value, if one does."""
    return next((reader.outputs[0] for reader in query.users(value) if reader.op_type == "Relu"), None)


def _shrinking(channels: Channels | None, shift: F32) -> float:
    """The factor by which a tensor's range, 0 within it, gets smaller."""
    if channels is None:
        return 1.0
    return _width(channels.low, channels.high) / max(_width(channels.low - shift, channels.high - shift), TINY)


def _width(low: F32, high: F32) -> float:
    return max(float(high.max(initial=0.0)) - float(low.min(initial=0.0)), TINY)


def _streams(model: ir.Model, shifts: Mapping[str, F32]) -> list[list[str]]:
    """The names of ``shifts``, those together that sums and Relus tie to each other."""
    of = {name: [name] for name in shifts}
    for node in model.graph:
        if node.op_type in ("Add", "Relu") and str(node.outputs[0].name) in shifts:
            joined = [name for value in (*node.inputs, *node.outputs) if value for name in of[str(value.name)]]
            joined = list(dict.fromkeys(joined))
            of.update(dict.fromkeys(joined, joined))
    return list({id(names): names for names in of.values()}.values())
