"""Which number format suits a tensor, and why: its values, what the target has kernels for, what the outputs feel (L5).

Noise is predicted from statistics (``num.predict``), never measured by rounding. Of formats of about the same size the
fastest way to run wins while its predicted noise is low enough, or no slower format has clearly less; an activation
whose node alone already harms the outputs stays float. Each choice carries the numbers that made it, in a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.analyse.footprint import Weight, weight_bytes
from edgeq.analyse.stats import Stats
from edgeq.analyse.weights import LEAST, STORABLE, axis_of
from edgeq.ir import query
from edgeq.num.fit import fit_range, params_of_range, scale_rows
from edgeq.num.formats import F32, Float
from edgeq.num.histogram import Histogram
from edgeq.num.predict import Shape, range_snr_db, shape_of, snr_db
from edgeq.num.quant import CHANNEL, Quant, parse_quant
from edgeq.target.record import Target

Runs = Literal["integer", "kernel", "rows", "load"]
WayOf = Callable[[ir.Node, Quant], Runs]

SIZES: dict[int, tuple[str, ...]] = {  # bits -> formats of about that size
    8: ("i8/channel", "i8/tensor", "mxint8", "f8e4m3/channel", "f8e4m3/tensor", "mxfp8"),
    6: ("mxfp6",),
    4: ("i4/channel", "i4/block32", "u4/block32/asym", "mxfp4", "nvfp4"),
}
TIERS: tuple[tuple[Runs, ...], ...] = (("integer",), ("kernel", "rows"), ("load",))  # fastest first
WORDS: dict[Runs, str] = {
    "integer": "in an integer kernel", "kernel": "kept as codes", "rows": "rows decoded as read",
    "load": "float once loaded",
}  # fmt: skip
ENOUGH_DB = 30.0  # of a weight: what a slower format would add is lost beside the noise of 8-bit activations
WORTH_DB = 3.0  # half the noise: below ENOUGH_DB a faster way may cost no more
CLOSE_DB = 0.5  # nearer than prediction can tell; fewer bits then win
SENSITIVE_DB = 20.0  # a node that alone leaves less than this on the outputs makes 1 % of noise by itself
OUTLIER = 4.0  # a channel stands out whose largest magnitude is so many times the median one
BARS = 48  # of a histogram that is shown


@dataclass(frozen=True)
class Distribution:
    """The values of a tensor. ``crest``: largest magnitude over root mean square; ``kurtosis``: 3 for normal ones;
    ``zeros``: their share. Of ``channels``, ``outliers`` have a largest magnitude beyond OUTLIER times the median one
    and the largest reaches ``reach`` times. ``bars``: counts between ``min`` and ``max``."""

    min: float
    max: float
    crest: float
    kurtosis: float
    zeros: float
    channels: int
    outliers: int
    reach: float
    bars: tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """A format a tensor could have: predicted signal over noise in dB, bytes, and the way it would run. ``method``: of
    an activation's range, which is ``low … high`` then."""

    format: str
    snr_db: float
    bits: float
    size_bytes: int
    runs: Runs
    method: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Advice:
    """What to do with a tensor. ``node`` reads it; ``format`` is the chosen one, ``f32`` for none; ``snr_db`` is
    predicted, ``alone_db`` measured: signal over noise of the outputs with that node alone quantized."""

    tensor: str
    kind: Literal["weight", "activation"]
    node: str
    op: str
    shape: tuple[int, ...]
    values: Distribution
    format: str
    snr_db: float | None
    why: str
    candidates: tuple[Candidate, ...] = ()
    alone_db: float | None = None


# --- weights ---------------------------------------------------------------------------------------------------------


def weights(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    """The constant weights of the main graph, each once, with the first node that reads it."""
    seen: set[str] = set()
    for node in model.graph:
        index = STORABLE.get(node.op_type)
        value = node.inputs[index] if index is not None and len(node.inputs) > index else None
        if value is None or not query.is_constant(value) or not query.is_float(value) or str(value.name) in seen:
            continue
        shape = query.dims(value) or ()
        elements = math.prod(int(dim or 0) for dim in shape)
        if len(shape) > 1 and elements:
            seen.add(str(value.name))
            yield node, value


def weight_advice(
    node: ir.Node, value: ir.Value, target: Target, way_of: WayOf, *, bits: int, alone_db: float | None = None
) -> Advice:
    """Advice on a constant; ``way_of`` says how a node would run with its weight in a format. ``bits``: of SIZES."""
    array = query.constant(value)
    if array is None:
        raise TypeError(f"{value.name!r} is not constant")
    w = array.astype(np.float32)
    rows = scale_rows(w, Quant(target.weights.format, CHANNEL), axis_of(node, Quant(target.weights.format, CHANNEL)))
    values = describe(w, rows)
    shapes = _shapes(w, node)
    found = {size: _candidates(w, node, rows, shapes, target, way_of, size) for size in SIZES}
    if alone_db is not None and alone_db < SENSITIVE_DB:
        found = {size: [c for c in group if c.runs != "integer"] for size, group in found.items()}
    size = bits if found[bits] else 8  # too few elements to store, but an integer kernel may take them
    clauses = [sentence(group, values, shapes, each) for each, group in found.items() if each in (size, 4) and group]
    best = choose(found[size]) if found[size] else None
    everything = tuple(candidate for group in found.values() for candidate in group)
    why = "; ".join(clauses) or f"stays float: {w.size} elements are too few to store in another format"
    return Advice(
        str(value.name), "weight", str(node.name), node.op_type, w.shape, values, best.format if best else "f32",
        best.snr_db if best else None, why + _felt(alone_db), everything, alone_db,
    )  # fmt: skip


def _felt(alone_db: float | None) -> str:
    """What the outputs say, where it decides."""
    if alone_db is None or alone_db >= SENSITIVE_DB:
        return ""
    return f"; its node stays float: alone in integers it leaves {alone_db:.1f} dB on the outputs"


def _shapes(w: NDArray[np.float32], node: ir.Node) -> dict[int, Shape]:
    """Block -> Shape, for the blocks of SIZES that fit."""
    found = {}
    for block in sorted({parse_quant(text).block for group in SIZES.values() for text in group}):
        quant = Quant(F32, block)
        axis = axis_of(node, quant)
        if block <= 0 or (w.size >= LEAST and axis is not None and w.shape[axis] >= block):
            found[block] = shape_of(scale_rows(w, quant, axis))
    return found


def _candidates(
    w: NDArray[np.float32], node: ir.Node, rows: NDArray[np.float32], shapes: Mapping[int, Shape], target: Target,
    way_of: WayOf, size: int,
) -> list[Candidate]:  # fmt: skip
    """Formats of a size that fit the weight. Below LEAST elements only what an integer kernel takes saves anything."""
    own = (str(target.weights),) if target.weights.format.bits == size else ()
    found = []
    for text in dict.fromkeys((*own, *SIZES[size])):
        quant = parse_quant(text)
        runs = way_of(node, quant)
        if quant.block in shapes and (w.size >= LEAST or runs == "integer"):
            stored = weight_bytes(Weight(*rows.shape), quant)
            found.append(Candidate(text, snr_db(shapes[quant.block], quant), quant.bits, stored, runs))
    return found


def choose(found: Sequence[Candidate]) -> Candidate:
    """The best of candidates of about the same size: the fastest way that is good enough, then the least noise, then
    the fewest bits among those as good as equal."""
    least = min(ENOUGH_DB, max(candidate.snr_db for candidate in found) - WORTH_DB)
    for tier in TIERS:
        group = [candidate for candidate in found if candidate.runs in tier]
        top = max((candidate.snr_db for candidate in group), default=-math.inf)
        if top >= least:
            close = [candidate for candidate in group if candidate.snr_db >= top - CLOSE_DB]
            return min(close, key=lambda candidate: (candidate.bits, -candidate.snr_db))
    raise ValueError("no candidates")


def sentence(found: Sequence[Candidate], values: Distribution, shapes: Mapping[int, Shape], size: int) -> str:
    """Why ``choose`` takes what it takes, in numbers."""
    best = choose(found)
    words = [f"{size} bits: {best.format} {best.snr_db:.1f} dB, {WORDS[best.runs]}"]
    words.extend(filter(None, (_per_tensor(best, found, values), _rival(best, found, shapes))))
    return "; ".join(words)


def _per_tensor(best: Candidate, found: Sequence[Candidate], values: Distribution) -> str:
    """What one scale for all would do instead of one a channel."""
    coarse = best.format.replace("/channel", "/tensor")
    other = next((c for c in found if c.format == coarse and coarse != best.format), None)
    if other is None:
        return ""
    if other.snr_db > best.snr_db - 1:
        return f"per tensor {other.snr_db:.1f} dB, since its channels are alike"
    if values.outliers:
        reason = _outliers(values)
    else:
        reason = f"the largest of {values.channels} channels reaches {values.reach:.2g}x the median"
    return f"per tensor {other.snr_db:.1f} dB because {reason}"


def _outliers(values: Distribution) -> str:
    reach = "reaches" if values.outliers == 1 else "reach up to"
    return f"{values.outliers} of {values.channels} channels {reach} {values.reach:.3g}x the median"


def _rival(best: Candidate, found: Sequence[Candidate], shapes: Mapping[int, Shape]) -> str:
    """The best candidate of the other kind. The noise of integers grows with the crest factor of what shares a scale,
    that of floats doesn't, so one crest factor makes them equal."""
    others = [c for c in found if _is_float(c) != _is_float(best)]
    if not others:
        return ""
    other = max(others, key=lambda candidate: candidate.snr_db)
    gain = best.snr_db - other.snr_db
    whole = other if _is_float(best) else best
    crest = shapes[parse_quant(whole.format).block].crest
    even = crest * 10 ** ((whole.snr_db - (best if whole is other else other).snr_db) / 20)
    side = "below" if crest < even else "above"
    if gain > 0:
        return f"beats {other.format} {other.snr_db:.1f}: crest {crest:.3g} is {side} {even:.3g}"
    return f"{other.format} has {other.snr_db:.1f} in {other.bits:.4g} bits, {WORDS[other.runs]}"


def _is_float(candidate: Candidate) -> bool:
    return isinstance(parse_quant(candidate.format).format, Float)


# --- activations -----------------------------------------------------------------------------------------------------


def activation_advice(
    name: str, stats: Stats, node: ir.Node, target: Target, *, product: bool, left_float: str = "",
    alone_db: float | None = None,
) -> Advice:  # fmt: skip
    """Advice on an activation that ``node`` reads. ``product``: it is multiplied by a matrix, where its largest values
    carry the result; ``left_float``: why no integer kernel may have it."""
    values = describe_stats(stats)
    found = tuple(_ranges(stats, target.activations)) if stats.count else ()
    if not left_float and alone_db is not None and alone_db < SENSITIVE_DB:
        left_float = f"{node.name} alone in integers leaves {alone_db:.1f} dB on the outputs"
    if left_float or not found:
        why = f"stays float: {left_float or 'calibration saw no value of it'}"
        return Advice(name, "activation", str(node.name), node.op_type, stats.shape, values, "f32", None, why, found,
                      alone_db)  # fmt: skip
    best = _best_range(found, product)
    why = _range_sentence(best, found, values, product)
    return Advice(
        name, "activation", str(node.name), node.op_type, stats.shape, values, best.format, best.snr_db, why, found,
        alone_db,
    )  # fmt: skip


def _ranges(stats: Stats, quant: Quant) -> Iterator[Candidate]:
    """The range of each method, whole first."""
    for method in ("minmax", "mse", "percentile"):
        low, high = fit_range(method, stats.histogram, stats.min, stats.max, quant)
        predicted = range_snr_db(stats.histogram, params_of_range(low, high, quant))
        size = math.ceil(math.prod(stats.shape) * quant.bits / 8)
        yield Candidate(str(quant), predicted, quant.bits, size, "integer", method, low, high)


def _best_range(found: Sequence[Candidate], product: bool) -> Candidate:
    whole, best = found[0], max(found, key=lambda candidate: candidate.snr_db)
    return whole if product or best.snr_db < whole.snr_db + CLOSE_DB else best


def _range_sentence(best: Candidate, found: Sequence[Candidate], values: Distribution, product: bool) -> str:
    whole, tightest = found[0], max(found, key=lambda candidate: candidate.snr_db)
    if best is not whole:
        cut = _cut(best, values)
        return f"{best.format} with the range clipped at {cut}: {best.snr_db:.1f} instead of {whole.snr_db:.1f} dB"
    words = f"{best.format} over the whole range: {best.snr_db:.1f} dB"
    if product and tightest.snr_db >= whole.snr_db + CLOSE_DB:
        words += (
            f"; not clipped at {_cut(tightest, values)} ({tightest.snr_db:.1f}): products need their largest values"
        )
    if product and values.outliers:
        words += f"; {_outliers(values)}: the step smooth moves them into the weights"
    return words


def _cut(clipped: Candidate, values: Distribution) -> str:
    """``3.1 of 9.4``: the end that loses more."""
    low, high = clipped.low or 0.0, clipped.high or 0.0
    if values.max - high >= low - values.min:
        return f"{high:.3g} of {values.max:.3g}"
    return f"{low:.3g} of {values.min:.3g}"


# --- distributions ---------------------------------------------------------------------------------------------------


def describe(w: NDArray[np.float32], rows: NDArray[np.float32]) -> Distribution:
    """Of a constant; ``rows`` f32[channels, n] are its values by channel."""
    low, high = float(w.min()), float(w.max())
    rms = math.sqrt(float(np.square(w, dtype=np.float64).mean()))
    centred = np.square(w - w.mean(dtype=np.float64), dtype=np.float64)
    variance = float(centred.mean())
    kurtosis = float(np.square(centred).mean()) / variance**2 if variance else math.nan
    bars, _ = np.histogram(w, BARS, (low, high)) if high > low else (np.array([w.size]), None)
    zeros = float((w == 0).mean())
    return _distribution(low, high, rms, kurtosis, zeros, np.abs(rows).max(1), bars)


def describe_stats(stats: Stats) -> Distribution:
    """Of an activation. Zeros are counted in the sample, moments in the histogram."""
    if not stats.count:
        return _distribution(0.0, 0.0, 0.0, math.nan, 0.0, np.zeros(0), np.zeros(1))
    centres, counts = stats.histogram.centres(), stats.histogram.counts
    total = counts.sum()
    mean = float(centres @ counts / total)
    variance = float((centres - mean) ** 2 @ counts / total)
    kurtosis = float((centres - mean) ** 4 @ counts / total) / variance**2 if variance else math.nan
    peaks = np.zeros(0) if stats.channels is None else stats.channels.absmax
    rms = math.sqrt(stats.sum2 / stats.count)
    zeros = float((stats.sample == 0).mean())
    return _distribution(stats.min, stats.max, rms, kurtosis, zeros, peaks, _coarse(stats.histogram))


def _coarse(histogram: Histogram) -> NDArray[np.float64]:
    """Counts f64[BARS] between the extremes."""
    if histogram.high <= histogram.low:
        return np.array([histogram.counts.sum()])
    place = (histogram.centres() - histogram.low) / (histogram.high - histogram.low) * BARS
    index = np.clip(place.astype(np.intp), 0, BARS - 1)
    return np.bincount(index, histogram.counts, minlength=BARS).astype(np.float64)


def _distribution(
    low: float, high: float, rms: float, kurtosis: float, zeros: float, peaks: NDArray[np.floating],
    bars: NDArray[np.generic],
) -> Distribution:  # fmt: skip
    median = float(np.median(peaks)) if peaks.size else 0.0
    reach = float(peaks.max()) / median if median else 1.0
    outliers = int((peaks > OUTLIER * median).sum()) if median else 0
    crest = max(abs(low), abs(high)) / rms if rms else 1.0
    counts = tuple(round(float(count)) for count in bars)
    return Distribution(low, high, crest, kurtosis, zeros, int(peaks.size), outliers, reach, counts)
