"""Which convolutions to even out the channels between, and by how much (L5).

Where nothing but Relu, Clip from 0 or nothing at all stands between two convolutions, channel c may be multiplied by
``s_c > 0`` in the first and divided in the second (cross-layer equalization: Nagel et al. 2019, arXiv 1906.04721, 4.1).
There it evens out weights, as ``by_weights`` does for a target that gives a weight one scale. ``search`` is for weights
with a scale a channel, which takes ``s_c`` up for nothing in the first convolution and in a depthwise second, and what
gains is the tensor between: it has one scale, and small channels are brought up to the large ones. A dense second
convolution pays with coarser weights for the channels that were small, so there only a part of the way is gone.

A Clip stays where it is, so a channel brought up meets it earlier: only as far as twice what calibration saw of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.analyse.stats import Stats
from edgeq.ir import query

DENSE_SHARE = 0.3  # exponent of the way gone before a dense convolution; 0.6 lost what 0.3 won on MobileNetV2
MARGIN = 2.0  # times what calibration saw of a channel must still pass below a Clip
MOST = 4.0  # a channel is raised by: beyond, rare values of channels that calibration hardly saw would be cut
LEAST = 1.05  # the largest raise of a pair that is worth another weight
WIDEST = 100.0  # factor either way of a channel that is evened out by weights
ROUNDS, SETTLED = 20, 1e-3  # over all pairs, since a convolution may be second of one and first of the next

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """Two convolutions, by name, and the ``tensor`` f[n, C, …] that the second alone reads. ``top``: of a Clip between,
    inf without one. ``depthwise``: each channel has its own weights in the second."""

    first: str
    second: str
    tensor: str
    top: float
    depthwise: bool


@dataclass(frozen=True)
class Equalization:
    """Multiply channels of ``pair.first`` by ``scale`` f32[C], all positive, and divide those of ``pair.second``."""

    pair: Pair
    scale: F32


def pairs(model: ir.Model) -> list[Pair]:
    """Every pair of the main graph, in its order."""
    return [pair for node in model.graph if node.op_type == "Conv" for pair in _pair(node)]


def _pair(first: ir.Node) -> Iterator[Pair]:
    value, top = first.outputs[0], np.inf
    reader = _only_reader(value)
    if reader is not None and reader.op_type in ("Relu", "Clip"):
        top = _top(reader)
        value, reader = reader.outputs[0], _only_reader(reader.outputs[0])
    if reader is None or reader.op_type != "Conv" or reader.inputs[0] is not value or top <= 0:
        return
    if not all(_weighted(node) for node in (first, reader)):
        return
    channels, shape = (query.dims(first.inputs[1]) or (0,))[0], query.dims(reader.inputs[1]) or (0, 0)
    depthwise = query.attribute(reader, "group", 1) == channels and shape[1] == 1 and channels != 1
    if depthwise or query.attribute(reader, "group", 1) == 1:
        yield Pair(str(first.name), str(reader.name), str(value.name), float(top), depthwise)


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = query.users(value)
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _top(node: ir.Node) -> float:
    """Up to where an activation passes a value on unchanged; 0 for one that doesn't commute with a positive factor."""
    if node.op_type == "Relu":
        return np.inf
    low, high = (query.constant(value) for value in (*node.inputs, None, None)[1:3])
    if low is None or low.item() != 0 or (high is None and len(node.inputs) > 2 and node.inputs[2] is not None):
        return 0.0
    return np.inf if high is None else float(high.item())


def _weighted(node: ir.Node) -> bool:
    """Whether weight and bias are constants, or there is no bias."""
    return all(query.is_constant(value) for value in node.inputs[1:] if value is not None)


def search(found: list[Pair], stats: Mapping[str, Stats]) -> list[Equalization]:
    """What to do about the pairs whose channels differ. ``stats``: of their tensors."""
    chosen = []
    for pair in found:
        channels = stats[pair.tensor].channels
        if channels is not None and (scale := _scale(pair, channels.absmax)).max(initial=1.0) >= LEAST:
            chosen.append(Equalization(pair, scale))
    return chosen


def by_weights(model: ir.Model, found: list[Pair]) -> list[Equalization]:
    """What to do about the pairs where a weight has one scale: channel c has the same largest weight in both of a pair
    afterwards, ``sqrt(r1_c r2_c)`` of what they were.

    A Clip between pins the channels that reach it, which then set the scale as before, so those pairs are left out."""
    free = [pair for pair in found if not np.isfinite(pair.top)]
    nodes = {str(node.name): node for node in model.graph}
    sizes = {name: _sizes(nodes[name]) for pair in free for name in (pair.first, pair.second)}
    scales = [np.ones(len(sizes[pair.first])) for pair in free]
    for _ in range(ROUNDS):
        steps = [_evened(pair, sizes, scale) for pair, scale in zip(free, scales, strict=True)]
        if max((float(np.abs(np.log(step)).max()) for step in steps), default=0.0) < SETTLED:
            break
    evened = [Equalization(pair, scale.astype(np.float32)) for pair, scale in zip(free, scales, strict=True)]
    return [one for one in evened if max(one.scale.max(), 1 / one.scale.min()) >= LEAST]


def _sizes(node: ir.Node) -> F64:
    """The largest magnitude over the kernel of a convolution's weight, f64[out, in/group]."""
    array = query.constant(node.inputs[1])
    if array is None:
        raise TypeError(f"the weight of {node.name} is not constant")
    return np.asarray(np.abs(array.astype(np.float64)).reshape(*array.shape[:2], -1).max(axis=2))


def _evened(pair: Pair, sizes: dict[str, F64], scale: F64) -> F64:
    """One step f64[C] of a pair, taken in ``sizes`` and ``scale``."""
    first, second = sizes[pair.first], sizes[pair.second]
    r1 = first.max(axis=1)
    r2 = second.reshape(len(r1), -1).max(axis=1) if pair.depthwise else second.max(axis=0)
    live = (r1 > 0) & (r2 > 0)
    step = np.sqrt(np.where(live, r2, 1.0) / np.where(live, r1, 1.0))
    step = np.clip(scale * step, 1 / WIDEST, WIDEST) / scale
    scale *= step
    first *= step[:, None]
    second /= np.repeat(step, len(second) // len(step))[:, None] if pair.depthwise else step
    return step


def _scale(pair: Pair, peaks: F32) -> F32:
    """f32[C] from 1 to MOST; 1 for a channel that was 0 throughout calibration."""
    largest = float(peaks.max(initial=0.0))
    live = np.where(peaks > 0, peaks, largest)
    wanted = np.full_like(live, 1.0) if largest == 0 else largest / live
    raised = np.minimum(wanted ** (1.0 if pair.depthwise else DENSE_SHARE), MOST)
    if np.isfinite(pair.top) and largest > 0:
        raised = np.minimum(raised, pair.top / (MARGIN * live))
    return np.maximum(raised, 1.0).astype(np.float32)
