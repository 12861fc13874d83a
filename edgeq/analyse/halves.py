"""Which nodes compute in 16-bit floats (f16, bf16), and why the others stay float32 (L5).

Three facts hold a node in f32: ONNX or the provider has no such kernel, a constant it reads loses its value in 16 bits,
or a tensor it reads or writes does, by what calibration saw. What may be narrow then gets there by one minimum cut: a
tensor between the two worlds costs a cast, a node in f32 what it moves more, instead of a pair of casts around each
node that stays. Constants of masks (-3.4e38) are cut at half the format's largest number: a score or a second mask can
be added without reaching infinity, whose rows give NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.analyse.cut import Network
from edgeq.analyse.stats import HUGE, MASK, Stats
from edgeq.ir import query
from edgeq.ir.narrow import is_f32, slots, why_not
from edgeq.ir.part import reads
from edgeq.num.formats import BF16, F16, Float
from edgeq.num.minifloat import STORED, largest

DTYPES = {F16: ir.DataType.FLOAT16, BF16: ir.DataType.BFLOAT16}
HEADROOM = 2.0  # how much further than calibration saw a tensor may reach
LOSS = 0.01  # of itself: what a constant, a tensor's typical value or a divisor may be off by
BOUNDS = frozenset({"Clip", "Min", "Max"})  # a constant beyond the format bounds nothing there, nor does its largest
DIVISORS = {"Div": 1, "Reciprocal": 0, "Log": 0, "Sqrt": 0, "Pow": 0}  # op -> the input whose small values count
# Prices in bytes. A cast reads 4 and writes 2 an element, an f32 tensor takes 2 more than a narrow one; a kernel more
# takes as long as some thousand bytes, and a product is what narrow floats are for: no cast is worth one.
CAST_BYTES, WIDER_BYTES, KERNEL_BYTES, PRODUCT_BYTES = 6, 2, 4096, 1 << 24


@dataclass(frozen=True)
class Halves:
    """The decision. ``nodes`` compute in ``form``; ``kept``: node with f32 -> why it stays; ``bounds``: constant -> the
    magnitude it is cut at."""

    form: Float
    nodes: frozenset[str]
    kept: Mapping[str, str]
    bounds: Mapping[str, float]


def incapable(model: ir.Model, form: Float) -> dict[str, str]:
    """Nodes that read or write f32 and have to, by ONNX -> why."""
    found = {}
    for node in model.graph:
        if why := why_not(node, DTYPES[form], model.opset_imports[""]):
            found[str(node.name)] = why
    return found


def taps(model: ir.Model) -> list[str]:
    """Every f32 tensor of the main graph that is computed or fed."""
    written = (value for node in model.graph for value in node.outputs)
    fed = (value for value in model.graph.inputs if value.name not in model.graph.initializers)
    return [str(value.name) for value in (*fed, *written) if is_f32(value) and value.name]


def constants(model: ir.Model, form: Float) -> tuple[dict[str, str], dict[str, float]]:
    """(Node -> why a constant it reads holds it in f32, constant -> the magnitude it is cut at)."""
    kept, bounds = {}, {}
    for value, array, readers in _constants(model):
        beyond = np.abs(array[np.isfinite(array)])
        beyond = beyond[beyond > largest(form)]
        if beyond.size and all(node.op_type in BOUNDS for node in readers):
            bounds[str(value.name)] = largest(form)
        elif beyond.size and _masks(array, form):
            bounds[str(value.name)] = largest(form) / 2
        elif beyond.size:
            kept.update(_all(readers, f"constant {value.name!r} holds {beyond.max():.3g}, beyond {_top(form)}"))
        elif (lost := _lost(array, form)) > LOSS:
            kept.update(_all(readers, f"constant {value.name!r} would be off by {lost:.0%} in {form}"))
    return kept, bounds


def ranges(model: ir.Model, stats: Mapping[str, Stats], form: Float, bounds: Mapping[str, float]) -> dict[str, str]:
    """Node -> which tensor beside it isn't held by the format, by what calibration saw."""
    kept: dict[str, str] = {}
    masks = _masked(model, bounds)
    values = {str(value.name): value for value in _values(model)}
    for name, seen in stats.items():
        value = values[name]
        around = [node for node in (value.producer(), *query.users(value)) if node is not None]
        why = _unheld(seen, form, value in masks)
        if not why and any(_divides(node, value) for node in around):
            why = _too_small(seen, form)
        if why:
            kept.update(_all(around, f"{name!r} {why}"))
    return kept


def decide(
    model: ir.Model,
    form: Float,
    kept: Mapping[str, str],
    bounds: Mapping[str, float],
    shapes: Mapping[str, tuple[int, ...]],
) -> Halves:
    """The cheapest assignment that leaves the nodes ``kept`` in f32."""
    dtype, opset = DTYPES[form], model.opset_imports[""]
    free = {node: found for node in model.graph if node.name not in kept and any(found := slots(node, dtype, opset))}
    network = Network()
    vertex = {node: network.vertex() for node in free}
    for node, (inputs, outputs) in free.items():
        network.edge(Network.SOURCE, vertex[node], _wider(node, inputs, outputs, shapes))
    for value in _values(model):
        narrow = [vertex[node] for node, index in value.uses() if index in free.get(node, ((), ()))[0]]
        wide = any(index not in free.get(node, ((), ()))[0] for node, index in value.uses()) or value.is_graph_output()
        producer = value.producer()
        written = producer is not None and value.index() in free.get(producer, ((), ()))[1]
        price = float(KERNEL_BYTES + CAST_BYTES * _elements(value, shapes))
        if is_f32(value):
            start = vertex[producer] if written and producer is not None else Network.SINK
            network.entering(start, narrow, price)
            if written:
                network.leaving(start, [*narrow, *([Network.SINK] if wide else [])], price)
    side = network.source_side()
    nodes = frozenset(str(node.name) for node in free if vertex[node] in side)
    alone = {str(node.name): "casts around it would cost more than it gains" for node in free if node.name not in nodes}
    touching = {str(node.name) for node in model.graph if any(map(is_f32, (*node.inputs, *node.outputs)))}
    return Halves(form, nodes, {name: why for name, why in {**alone, **kept}.items() if name in touching}, bounds)


def broken(model: ir.Model, chosen: Halves, before: Mapping[str, Stats], after: Mapping[str, Stats]) -> dict[str, str]:
    """Nodes that must be f32 too -> why: ``after`` shows NaN or infinity where ``before`` didn't. Of those tensors the
    first ones tell: their node or, where that is f32 already, the narrow ones nearest above it."""
    wrong = {
        name
        for name, seen in after.items()
        if seen.nan_count + seen.inf_count and not before[name].nan_count + before[name].inf_count
    }
    found: dict[str, str] = {}
    for node in model.graph:
        first = next((value.name for value in node.outputs if value.name in wrong), None)
        if first is not None and not any(value is not None and value.name in wrong for value in node.inputs):
            found.update(_all(_narrow_above(node, chosen), f"{first!r} would be no number in {chosen.form}"))
    return found


def _narrow_above(node: ir.Node, chosen: Halves) -> list[ir.Node]:
    """The node or, on each way up from it, the first one that is narrow."""
    found, stack, seen = [], [node], {node}
    while stack:
        one = stack.pop()
        if one.name in chosen.nodes:
            found.append(one)
            continue
        above = {value.producer() for value in one.inputs if value is not None} - seen
        stack += [other for other in above if other is not None]
        seen |= {other for other in above if other is not None}
    return found


def _wider(
    node: ir.Node, inputs: tuple[int, ...], outputs: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> float:
    """What a node costs more in f32."""
    moved = [node.inputs[index] for index in inputs] + [node.outputs[index] for index in outputs]
    work = query.macs(node, shapes.get(str(node.outputs[0].name)))
    own = PRODUCT_BYTES if work else KERNEL_BYTES // 4
    return float(own + work + WIDER_BYTES * sum(_elements(value, shapes) for value in moved if value is not None))


def _elements(value: ir.Value, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return math.prod(shapes.get(str(value.name), (1,)))


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from (value for value in model.graph.inputs if value.name not in model.graph.initializers)
    for node in model.graph:
        yield from node.outputs


def _constants(model: ir.Model) -> Iterator[tuple[ir.Value, NDArray[np.float32], list[ir.Node]]]:
    for value in model.graph.initializers.values():
        if is_f32(value) and query.is_constant(value) and value.const_value is not None and value.uses():
            yield value, value.const_value.numpy(), query.users(value)


def _all(nodes: list[ir.Node], why: str) -> dict[str, str]:
    return {str(node.name): why for node in nodes}


def _top(form: Float) -> str:
    return f"{form}'s {largest(form):g}"


def _masks(array: NDArray[np.float32], form: Float) -> bool:
    """Whether what lies beyond the format says "attend nowhere" or "no limit"."""
    beyond = array[np.isfinite(array) & (np.abs(array) > largest(form))]
    return bool(((beyond <= MASK) | (beyond >= HUGE)).all())


def _lost(array: NDArray[np.float32], form: Float) -> float:
    """By which share of itself a constant changes."""
    exact = array[np.isfinite(array)].astype(np.float64)
    change = exact.astype(STORED[form]).astype(np.float64) - exact
    power = float(np.square(exact).sum())
    return math.sqrt(float(np.square(change).sum()) / power) if power else 0.0


def _step(form: Float) -> float:
    """Distance of the format's smallest numbers."""
    return float(ml_dtypes.finfo(STORED[form]).smallest_subnormal)


def _unheld(seen: Stats, form: Float, mask: bool) -> str:
    """Why a tensor can't be narrow. ``mask``: its huge negative values come from constants that are cut."""
    low = 0.0 if mask and seen.min <= MASK else seen.min
    peak = max(-low, seen.max, 0.0) if seen.count else 0.0
    if seen.inf_count:
        return "holds values beyond 1e30"
    if seen.mask_count and not mask:
        return f"holds masks that are no constants, beyond {_top(form)}"
    if peak * HEADROOM > largest(form):
        return f"reaches {peak:.3g}, {_top(form)} is less than {HEADROOM:g} times that"
    usual = math.sqrt(seen.sum2 / seen.count) if seen.count else 0.0
    if 0 < usual < _step(form) / math.sqrt(12) / LOSS:  # uniform rounding noise
        return f"holds values of {usual:.3g}, which {form} rounds in steps of {_step(form):.3g}"
    return ""


def _divides(node: ir.Node, value: ir.Value) -> bool:
    index = DIVISORS.get(node.op_type)
    return index is not None and index < len(node.inputs) and node.inputs[index] is value


def _too_small(seen: Stats, form: Float) -> str:
    """Why a divisor can't be narrow: its smallest values would become 0, or be off."""
    sizes = np.abs(seen.sample[seen.sample != 0])
    least = float(sizes.min()) if sizes.size else math.inf
    if least < _step(form) / 2 / LOSS:
        return f"comes as near to 0 as {least:.3g}, which {form} rounds in steps of {_step(form):.3g}"
    return ""


def _masked(model: ir.Model, bounds: Mapping[str, float]) -> set[ir.Value]:
    """Values that something below a cut constant may reach."""
    found: set[ir.Value] = set()
    for node in model.graph:
        if any(value in found or value.name in bounds for value in reads(node)):
            found.update(node.outputs)
    return found
