"""Biases that make up for what quantization shifts, layer by layer (L5).

``encode`` takes off each bias what rounding the weights adds on average. What clipped and rounded inputs, and all
earlier layers, add besides is seen here: each layer runs in float and, on what the quantized layers before it write,
quantized, and its bias takes up the difference (empirical bias correction: Nagel et al. 2019, arXiv 1906.04721, 4.2).
Errors count where the activation behind the layer doesn't cut, since elsewhere a bias changes nothing.

Both streams of values are kept at the cuts of ``segments``, so that a layer costs a run of its own segment up to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.analyse.encode import Edge, Encodings
from edgeq.analyse.place import Atom
from edgeq.analyse.segments import Segment
from edgeq.analyse.sensitivity import Job, Session, only
from edgeq.analyse.smoothing import unpadded
from edgeq.ir import query
from edgeq.ir.ops import OPS
from edgeq.ir.part import part
from edgeq.num.fit import bias_limit
from edgeq.num.shifts import shift
from edgeq.run.record import Array, Feed

POSITIONS = 256  # of a layer's output, a sample
CHANNELS_AT_1 = ("Conv", "ConvTranspose")

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Layer:
    """An atom with an int32 bias at ``edge``. ``tap``: what it writes in front of its activation, which passes on what
    lies between ``low`` and ``high``."""

    atom: Atom
    edge: Edge
    tap: str
    low: float
    high: float


def corrected(job: Job, done: Callable[[], None] = lambda: None) -> Encodings:
    """``job.encodings`` with biases corrected in graph order; ``done`` is called after each layer. As many of the
    samples are used as the byte budget holds."""
    stream, encodings = _Stream(job), job.encodings
    with ThreadPoolExecutor(job.threads) as pool:
        for index, segment in enumerate(job.segments):
            for layer in _layers(job, segment):
                errors = list(pool.map(stream.errors(layer, segment, encodings), range(len(stream.feeds))))
                encodings = _shifted(encodings, layer, shift(errors))
                done()
            if index + 1 < len(job.segments):
                stream.advance(pool, index, encodings)
    return encodings


def layers_of(job: Job) -> list[Layer]:
    """All that ``corrected`` corrects."""
    return [layer for segment in job.segments for layer in _layers(job, segment)]


def _layers(job: Job, segment: Segment) -> Iterator[Layer]:
    for atom in job.plan.atoms:
        if atom.name not in segment.atoms or atom.name not in job.plan.integer or atom.bias is None:
            continue
        node, index = atom.bias
        if (str(node.name), index) in job.encodings.biases:
            yield Layer(atom, (str(node.name), index), str(node.outputs[0].name), *_bounds(atom.nodes[-1]))


def _bounds(last: ir.Node) -> tuple[float, float]:
    """What an activation passes on unchanged."""
    if last.op_type == "Relu":
        return 0.0, np.inf
    if last.op_type != "Clip":
        return -np.inf, np.inf
    low, high = (query.constant(value) for value in (*last.inputs, None, None)[1:3])
    return -np.inf if low is None else float(low.item()), np.inf if high is None else float(high.item())


def _shifted(encodings: Encodings, layer: Layer, shifts: F32) -> Encodings:
    """Codes that would leave what ``fit_bias`` keeps free for sums of products stay."""
    codes, scales = encodings.biases[layer.edge]
    moved = codes + np.rint(shifts / scales.astype(np.float64))
    weight = query.constant(layer.atom.head.inputs[OPS[layer.atom.head.op_type].weight or 1])
    limit = bias_limit(0 if weight is None else weight.size // codes.size)
    kept = np.where(np.abs(moved) <= limit, moved, codes).astype(np.int32)
    return replace(encodings, biases={**encodings.biases, layer.edge: (kept, scales)})


class _Stream:
    """Samples on their way through the segments, in float and quantized."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.inputs = [str(value.name) for value in job.model.graph.inputs]
        live = max((segment.live_bytes for segment in job.segments), default=0)
        feed = sum(array.nbytes for array in job.samples.read(0).values())
        count = min(len(job.samples), max(job.byte_budget // max(2 * live + feed, 1), 2))
        self.feeds = [job.samples.read(index) for index in range(count)]
        self.exact: list[Feed] = list(self.feeds)
        self.quantized: list[Feed] = list(self.feeds)

    def errors(self, layer: Layer, segment: Segment, encodings: Encodings) -> Callable[[int], F32]:
        """Sample -> what is missing at a layer's tap f32[positions, C], NaN where the activation cuts."""
        sub = part(self.job.model, [*segment.reads, *self.inputs], [layer.tap])
        inside = frozenset(str(node.name) for node in sub.graph) & self.job.plan.integer.keys()
        plan = only(replace(self.job.plan, bare=self.job.plan.bare | {layer.atom.name}), inside)
        exact, found = self._open(sub), self._open(self.job.insert(sub, plan, encodings))

        def error(place: int) -> F32:
            arrays = exact.run(self.exact[place])[layer.tap], found.run(self.quantized[place])[layer.tap]
            want, got = (_rows(array, layer, self.feeds[place], place) for array in arrays)
            missing = np.clip(want, layer.low, layer.high) - got
            return np.where((got > layer.low) & (got < layer.high), missing, np.float32(np.nan))

        return error

    def advance(self, pool: ThreadPoolExecutor, index: int, encodings: Encodings) -> None:
        """Run the segment ``index`` and forget what nothing behind it reads."""
        job, segment = self.job, self.job.segments[index]
        if segment.writes:
            plain = part(job.model, [*segment.reads, *self.inputs], segment.writes)
            inside = segment.atoms & job.plan.integer.keys()
            quantized = job.insert(plain, only(job.plan, inside), encodings) if inside else plain
            for values, model in ((self.exact, plain), (self.quantized, quantized)):
                for place, found in enumerate(pool.map(self._open(model).run, values)):
                    values[place] = {**values[place], **found}
        alive = {*self.inputs, *job.segments[index + 1].reads}
        for values in (self.exact, self.quantized):
            values[:] = [{name: array for name, array in one.items() if name in alive} for one in values]

    def _open(self, model: ir.Model) -> Session:
        return Session(model, self.job.target)


def _rows(array: Array, layer: Layer, feed: Feed, place: int) -> F32:
    """[..., C] at most so many positions of an output, the same ones for a sample in float and quantized."""
    if layer.atom.head.op_type in CHANNELS_AT_1:
        rows = np.moveaxis(array, 1, -1).reshape(-1, array.shape[1])
    else:
        rows = unpadded(array, feed)
    if len(rows) > POSITIONS:
        rows = rows[np.random.default_rng(place).choice(len(rows), POSITIONS, replace=False)]
    return rows.astype(np.float32)
