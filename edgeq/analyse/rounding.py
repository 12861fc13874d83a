"""How to round the weights of MatMul, Gemm and Conv, by what these read in calibration (L5).

Layers are taken in graph order, in a few stages: what a stage reads is observed on the model in which all earlier ones
are rounded already, so that it makes up for their errors too. Of what a layer reads only second moments stay, summed as
samples stream by; every HELD_OUT-th sample is kept out of them to judge what was found. Convolutions are read at
positions drawn at random, and padded tokens are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.analyse.slices import Slices
from edgeq.analyse.smoothing import unpadded
from edgeq.analyse.weights import nearest
from edgeq.errors import RecipeError, SampleError, did_you_mean
from edgeq.ir import edit, query
from edgeq.num.clips import CLIPS
from edgeq.num.formats import Int
from edgeq.num.quant import CHANNEL, TENSOR, Coded, QParams, dequantize
from edgeq.num.rounding import DATA_FREE, ROUNDERS, Inputs
from edgeq.run.record import Array, Feed, Samples
from edgeq.run.session import run_session

Edge = tuple[str, int]  # node name, input index

STAGES = 4
HELD_OUT = 5  # every so many samples one is not learnt from
POSITIONS = 64  # of a convolution's output, a sample
ROWS = 512  # of any other layer's input, a sample
TAP_BYTES = 256 << 20  # of tapped tensors in a run
MOMENT_BYTES = 1 << 30  # of second moments in a stage

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Window:
    """How a convolution reads its input; ``pads`` (before, after) an axis, None: as ``same`` says. ``channels``: of a
    group, with those added so that they divide into blocks."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...] | None
    same: str
    group: int
    channels: int


@dataclass(frozen=True)
class Source:
    """Rows that layers read: a tensor, by a convolution's window or as they are."""

    tensor: str
    window: Window | None = None


@dataclass(frozen=True)
class Layer:
    """A weight with the places it is read at. ``turned``: it lies as [in, out]."""

    weight: F32
    params: QParams
    edges: tuple[Edge, ...]
    sources: tuple[Source, ...]
    turned: bool

    @property
    def window(self) -> Window | None:
        return self.sources[0].window

    @property
    def columns(self) -> int:
        """Of the weight as a matrix."""
        window = self.window
        if window is not None:
            return math.prod(window.kernel) * window.channels
        return int(self.weight.shape[0 if self.turned else 1])


def round_weights(
    model: ir.Model,
    wanted: Mapping[Edge, QParams],
    samples: Samples | None,
    *,
    rounding: str = "gptq",
    clip: str = "",
    stages: int = STAGES,
    centred: bool = False,
    threads: int = 2,
    done: Callable[[], None] = lambda: None,
) -> dict[Edge, Coded]:
    """Codes of the constants read at ``wanted``, by a name of ROUNDERS; ``done`` is called after each layer.

    ``centred``: layers' biases will make up for the mean error (the INT8 path's do), so what counts is how errors vary:
    moments are taken about the mean. Otherwise rounding spends its freedom on what a bias does for nothing.
    ``clip``: a name of CLIPS by which the scales of layers are fitted anew.

    What is no weight of a MatMul, Gemm or Conv, or mapped along another axis than these need, is rounded to nearest.
    Raises RecipeError for an unknown name or a float format that only nearest rounding knows, SampleError without
    samples where they are needed."""
    if rounding not in ROUNDERS:
        raise RecipeError(f"rounding={rounding} is not known", hint=did_you_mean(rounding, list(ROUNDERS)))
    if clip and clip not in CLIPS:
        raise RecipeError(f"clip={clip} is not known", hint=did_you_mean(clip, list(CLIPS)))
    nodes = {str(node.name): node for node in model.graph}
    layers = _layers(nodes, wanted)
    known = {edge for layer in layers for edge in layer.edges}
    if rounding == "nearest" and not clip:
        return nearest(model, wanted)
    found = nearest(model, {edge: params for edge, params in wanted.items() if edge not in known})
    floats = [layer for layer in layers if not isinstance(layer.params.quant.format, Int)]
    if floats:
        raise RecipeError(
            f"{clip or rounding} knows integers, not {floats[0].params.quant}", hint="use rounding=nearest"
        )
    blind = rounding in DATA_FREE and clip != "oscar"
    if not blind and (samples is None or len(samples) == 0):
        raise SampleError(f"rounding={rounding} needs calibration samples", hint="give some, or use hqq")
    current = with_codes(model, found)
    for stage in [layers] if blind else _stages(layers, stages):
        moments = {} if samples is None or blind else _observe(current, stage, samples, threads)
        coded: dict[Edge, Coded] = {}
        for layer in stage:
            inputs = _sum([moments[source] for source in layer.sources], centred) if moments else None
            matrix, params = _matrix(layer.weight, layer), _matrix_params(layer)
            result = ROUNDERS[rounding](matrix, CLIPS[clip](matrix, params, inputs) if clip else params, inputs)
            coded |= dict.fromkeys(layer.edges, _back(result, layer))
            done()
        found |= coded
        current = with_codes(current, coded)
    return found


def with_codes(model: ir.Model, coded: Mapping[Edge, Coded]) -> ir.Model:
    """A clone that computes with what the codes stand for, in float."""
    clone = model.clone()
    names = edit.Names(clone)
    nodes = {str(node.name): node for node in clone.graph}
    for (name, index), constant in coded.items():
        value = nodes[name].inputs[index]
        dtype = query.constant(value).dtype  # type: ignore[union-attr]
        real = dequantize(constant.codes, constant.params).astype(dtype)
        fresh = names.fresh(f"{value.name}_rounded")  # type: ignore[union-attr]
        nodes[name].replace_input_with(index, edit.add_initializer(clone.graph, fresh, real))
    return clone


def _weight(nodes: Mapping[str, ir.Node], edge: Edge) -> F32:
    array = query.constant(nodes[edge[0]].inputs[edge[1]])
    if array is None:
        raise TypeError(f"input {edge[1]} of {edge[0]} is not constant")
    return array.astype(np.float32)


# --- layers as matrices ----------------------------------------------------------------------------------------------


def _layers(nodes: Mapping[str, ir.Node], wanted: Mapping[Edge, QParams]) -> list[Layer]:
    """In graph order. Readers of one weight that is mapped and lies the same for all of them are one layer."""
    place = {name: index for index, name in enumerate(nodes)}
    found: dict[tuple[Any, ...], Layer] = {}
    for edge in sorted(wanted, key=lambda edge: place[edge[0]]):
        node, params = nodes[edge[0]], wanted[edge]
        source, turned = _source(node, params), node.op_type != "Conv" and not query.attribute(node, "transB", 0)
        if edge[1] != 1 or source is None or params.axis not in _axes(node, params, turned):
            continue
        weight = node.inputs[1]
        key = (str(weight.name), turned, source.window, params.scale.tobytes(), str(params.quant))  # type: ignore[union-attr]
        if key in found:
            layer = found[key]
            found[key] = replace(layer, edges=(*layer.edges, edge), sources=(*layer.sources, source))
        else:
            found[key] = Layer(_weight(nodes, edge), params, (edge,), (source,), turned)
    return list(found.values())


def _axes(node: ir.Node, params: QParams, turned: bool) -> tuple[int | None, ...]:
    """The axes along which a layer's weight can be mapped."""
    if params.quant.block == TENSOR:
        return (None,)
    out = 1 if turned else 0
    rank = len(query.dims(node.inputs[1]) or ())
    axis = out if params.quant.block == CHANNEL else 1 - out
    return (axis, axis - rank)


def _source(node: ir.Node, params: QParams) -> Source | None:
    """What a layer's rows are; None for what is no layer."""
    if len(node.inputs) < 2 or node.inputs[0] is None or query.is_constant(node.inputs[0]):
        return None
    shape = query.dims(node.inputs[1]) or ()
    if node.op_type == "Conv":
        return Source(str(node.inputs[0].name), _window(node, tuple(int(dim or 0) for dim in shape), params))
    plain = node.op_type == "MatMul" or (node.op_type == "Gemm" and not query.attribute(node, "transA", 0))
    return Source(str(node.inputs[0].name)) if plain and len(shape) == 2 else None


def _window(node: ir.Node, shape: tuple[int, ...], params: QParams) -> Window:
    kernel, ones = shape[2:], [1] * (len(shape) - 2)
    same = str(query.attribute(node, "auto_pad", "NOTSET"))
    pads = query.attribute(node, "pads", [0] * 2 * len(kernel))
    block = max(params.quant.block, 1)
    return Window(
        kernel,
        tuple(query.attribute(node, "strides", ones)),
        tuple(query.attribute(node, "dilations", ones)),
        None if same.startswith("SAME") else tuple(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True)),
        same,
        int(query.attribute(node, "group", 1)),
        -(-shape[1] // block) * block,
    )


def _matrix(values: NDArray[Any], layer: Layer) -> NDArray[Any]:
    """A weight, or what has a value a block of it, as [out, in]; a convolution's columns are kernel by channels."""
    if layer.window is None:
        return np.ascontiguousarray(values.T) if layer.turned else values
    last = np.moveaxis(values, 1, -1)
    if values.shape == layer.weight.shape:
        last = np.pad(last, [(0, 0)] * (last.ndim - 1) + [(0, layer.window.channels - last.shape[-1])])
    return last.reshape(len(last), -1)


def _tensor(matrix: NDArray[Any], layer: Layer, channels: int) -> NDArray[Any]:
    """``_matrix`` undone; ``channels``: how many the tensor has."""
    if layer.window is None:
        return np.ascontiguousarray(matrix.T) if layer.turned else matrix
    last = matrix.reshape(len(matrix), *layer.window.kernel, -1)
    return np.ascontiguousarray(np.moveaxis(last[..., :channels], -1, 1))


def _matrix_params(layer: Layer) -> QParams:
    """The mapping in matrix form: per channel along axis 0, per block along axis 1."""
    params = layer.params
    if params.quant.block <= TENSOR:
        return replace(params, axis=None if params.quant.block == TENSOR else 0)
    scale, zero = (_matrix(values, layer) for values in (params.scale, params.zero_point))
    return replace(params, scale=scale, zero_point=zero, axis=1)


def _back(coded: Coded, layer: Layer) -> Coded:
    """Codes and mapping of the matrix -> of the weight."""
    params = coded.params
    if params.quant.block > TENSOR:
        blocks = layer.params.scale.shape[1]
        scale, zero = (_tensor(values, layer, blocks) for values in (params.scale, params.zero_point))
        params = replace(params, scale=scale, zero_point=zero)
    return Coded(replace(params, axis=layer.params.axis), _tensor(coded.codes, layer, layer.weight.shape[1]))


def _stages(layers: Sequence[Layer], count: int) -> Iterator[list[Layer]]:
    """At most ``count`` runs of layers, more where their moments would take too much memory."""
    size, stage, bytes_ = -(-len(layers) // max(count, 1)), list[Layer](), 0
    for layer in layers:
        groups = layer.window.group if layer.window else 1
        needed = 8 * groups * layer.columns**2
        if stage and (len(stage) == size or bytes_ + needed > MOMENT_BYTES):
            yield stage
            stage, bytes_ = [], 0
        stage.append(layer)
        bytes_ += needed
    if stage:
        yield stage


# --- what layers read ------------------------------------------------------------------------------------------------


@dataclass
class _Moments:
    """Sums of x x^T f32[g, in, in] with their rows: of samples learnt from, of those held out."""

    sums: list[F32 | None] = field(default_factory=lambda: [None, None])
    totals: list[F32 | None] = field(default_factory=lambda: [None, None])  # of x, f32[g, in]
    rows: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, X: F32, held: bool) -> None:
        """X f32[g, n, in]."""
        for sums, new in ((self.sums, X.transpose(0, 2, 1) @ X), (self.totals, X.sum(axis=1))):
            known = sums[held]
            sums[held] = new if known is None else np.add(known, new, out=known)
        self.rows[held] += X.shape[1]


def _sum(moments: Sequence[_Moments], centred: bool) -> Inputs:
    """What a layer reads in all its places."""
    learnt, held = ([m for m in moments if m.sums[part] is not None] for part in (0, 1))
    if not learnt:
        raise SampleError("calibration has no row for a layer", hint="use samples that are not all padding")
    H, judge = _mean(learnt, 0, centred), _mean(held, 1, centred) if held else None
    return Inputs(H, sum(m.rows[0] for m in learnt), judge)


def _mean(moments: Sequence[_Moments], part: int, centred: bool) -> F32:
    """2/n of the sums of n rows, about 0 or about the mean, f32[g, in, in]."""
    rows = sum(m.rows[part] for m in moments)
    sums, totals = (np.sum([getattr(m, name)[part] for m in moments], axis=0) for name in ("sums", "totals"))
    mean = totals.astype(np.float64) / rows
    about = mean[:, :, None] * mean[:, None, :] if centred else 0.0
    return np.asarray(2 * (sums / rows - about), np.float32)


def _observe(model: ir.Model, stage: Sequence[Layer], samples: Samples, threads: int) -> dict[Source, _Moments]:
    """Second moments of all a stage reads; a source of several layers is observed once."""
    moments = {source: _Moments() for layer in stage for source in layer.sources}
    slices = Slices(model, list(dict.fromkeys(source.tensor for source in moments)), TAP_BYTES, threads)
    for index in range(len(samples)):
        feed, held = samples.read(index), index % HELD_OUT == HELD_OUT - 1
        for session, names in slices.of(feed):
            computed = [name for name in names if name not in feed]
            outputs = run_session(session, feed, computed) if session is not None else {}
            slices.learn(outputs)
            outputs.update((name, feed[name]) for name in names if name in feed)
            for source in (source for source in moments if source.tensor in outputs):
                moments[source].add(_rows(outputs[source.tensor], feed, source.window, index), held)
    return moments


def _rows(array: Array, feed: Feed, window: Window | None, index: int) -> F32:
    """Rows f32[g, n, in] that a layer multiplies, at most so many a sample."""
    if window is not None:
        return _patches(array.astype(np.float32, copy=False), window, np.random.default_rng(index))
    rows = unpadded(array, feed)
    return rows[None, :: -(-len(rows) // ROWS) or 1]


def _patches(x: F32, window: Window, draw: np.random.Generator) -> F32:
    """Patches f32[g, n, kernel * channels] of x [batch, g * channels, ...] at random positions of the output."""
    pads, spans = (
        _pads(x.shape[2:], window),
        [d * (k - 1) + 1 for d, k in zip(window.dilations, window.kernel, strict=True)],
    )
    padded = np.pad(x, [(0, 0), (0, 0), *pads])
    sizes = [(n - span) // s + 1 for n, span, s in zip(padded.shape[2:], spans, window.strides, strict=True)]
    count = len(x) * math.prod(sizes)
    picks = draw.choice(count, min(POSITIONS, count), replace=False)
    batch, *places = np.unravel_index(picks, (len(x), *sizes))
    corners = [place * stride for place, stride in zip(places, window.strides, strict=True)]
    taps = []
    for offset in np.ndindex(*window.kernel):
        where = [c + o * d for c, o, d in zip(corners, offset, window.dilations, strict=True)]
        taps.append(padded[(batch, slice(None), *where)])  # [n, g * channels]
    patches = np.stack(taps, 1).reshape(len(picks), len(taps), window.group, -1)
    patches = np.pad(patches, [(0, 0)] * 3 + [(0, window.channels - patches.shape[-1])])
    return np.ascontiguousarray(patches.transpose(2, 0, 1, 3).reshape(window.group, len(picks), -1))


def _pads(extents: tuple[int, ...], window: Window) -> tuple[tuple[int, int], ...]:
    if window.pads is not None:
        return window.pads
    found = []
    for n, k, s, d in zip(extents, window.kernel, window.strides, window.dilations, strict=True):
        needed = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        less, more = needed // 2, needed - needed // 2
        found.append((more, less) if window.same == "SAME_LOWER" else (less, more))
    return tuple(found)
