"""How much noise a number format would put on a tensor, told from its statistics instead of by rounding it (L1).

Values that share a scale make a row. ``shape_of`` reads a tensor once and keeps how rows are filled: a histogram of
values over their row's largest, for each class of rows alike. ``snr_db`` integrates the squared distance to a format's
numbers over it, for each scale that ``fit`` would try. One shape serves all formats whose scales are shared alike.

The closed form for integers, ``10.8 + 20 log10(levels / crest)`` dB, takes rounding noise for uniform. That is off by
10 dB where a few large values leave most others at code 0, and floats and searched scales have no such form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from edgeq.num.fit import SHARES
from edgeq.num.formats import E4M3, E8M0, Float, Int
from edgeq.num.histogram import Histogram
from edgeq.num.minifloat import decode, largest
from edgeq.num.quant import QParams, Quant, code_range, mapping
from edgeq.num.scales import FACTORS

F64 = NDArray[np.float64]

LOSSLESS_DB = 150.0  # what no noise is called

_MANTISSA = 4  # bits of a bin's number: 16 bins an octave
_OCTAVES = 20  # below a row's largest value; what lies lower is taken for 0
_SIDE = (_OCTAVES << _MANTISSA) + 1  # bins of one sign
_FIRST = (127 - _OCTAVES) << _MANTISSA  # the lowest bin's number among all of float32's
_CRESTS, _SKEWS, _PHASES = 4, 16, 16  # classes an octave of crest factor; of skewness; of the largest value's mantissa
_LOWS = 64  # other ends of rows that have grids of their own
_OWN_DB = 9.0  # over the elements that share a scale: 0.6 dB for 16, 0.3 for 32, on normal and Laplace numbers
_CHUNK = 1 << 18  # elements a pass


@dataclass(frozen=True)
class Shape:
    """How the rows of a tensor are filled; each is turned so that its largest magnitude is positive.

    ``histogram`` f64[classes, bins]: squared largest values of the rows, summed over their elements in a bin. ``low``
    f64[classes]: the other end of a row over its largest, in [-1, 0]; ``phase`` f64[classes]: the largest value over
    the power of two below it, in [1, 2). ``power``: sum of squares; ``rows`` of ``columns`` elements, zeros aside."""

    histogram: F64
    low: F64
    phase: F64
    power: float
    rows: int
    columns: int

    @property
    def crest(self) -> float:
        """Largest magnitude over root mean square of the rows: what the noise of integers grows with; 1 for zeros."""
        return float(np.sqrt(self.histogram.sum() / self.power)) if self.power else 1.0


def shape_of(rows: NDArray[np.float32]) -> Shape:
    """Elements f32[rows, n] that share a scale a row -> Shape."""
    high, low = rows.max(1).astype(np.float64), rows.min(1).astype(np.float64)
    peak = np.maximum(high, -low)
    live = peak > 0
    if not live.all():
        rows, high, low, peak = rows[live], high[live], low[live], peak[live]
    turned = -low > high
    other = np.where(turned, -high, low)
    low = np.clip(other / peak, -1.0, 0.0)
    power = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    phase = 2 * np.frexp(peak)[0]
    crest = peak / np.sqrt(power / rows.shape[1])
    key = np.rint(np.log2(crest) * _CRESTS).astype(np.int64)
    key = (key * (_SKEWS + 1) + np.rint(-low * _SKEWS).astype(np.int64)) * _PHASES
    key += ((phase - 1) * _PHASES).astype(np.int64)
    _, classes = np.unique(key, return_inverse=True)
    factor = np.where(turned, -1.0, 1.0) / peak
    weight = np.bincount(classes, peak**2)
    return Shape(
        _histogram(rows, factor, classes, peak**2),
        np.bincount(classes, low * peak**2) / weight,
        np.bincount(classes, phase * peak**2) / weight,
        float(power.sum()),
        *rows.shape,
    )


def snr_db(shape: Shape, quant: Quant) -> float:
    """Signal over noise of a weight as ``fit.fit_weight`` maps it on ``quant``; 150 where nothing is lost.

    A class of rows gets the best scale of those tried for a row, and _OWN_DB what its rows gain by one of their own."""
    noise = 0.0
    keys, tried = _keys(shape, quant), 1
    for key in np.unique(keys):
        costs = _costs(quant, float(key))
        noise, tried = noise + float((costs @ shape.histogram[keys == key].T).min(0).sum()), len(costs)
    own = _OWN_DB / shape.columns * (1 - len(keys) / shape.rows) if tried > 2 else 0.0
    return decibel(shape.power, noise * 10 ** (-own / 10))


def range_snr_db(histogram: Histogram, params: QParams) -> float:
    """Signal over noise of an activation with this histogram under a mapping per tensor; 150 where nothing is lost.

    A bin's values are taken to be spread evenly over it; those of the fullest are 0 if it holds 0."""
    edges, counts = histogram.edges(), histogram.counts
    lo, hi = params.code_range
    grid = (np.arange(lo, hi + 1, dtype=np.float64) - float(params.zero_point)) * float(params.scale)
    low, high = edges[:-1].copy(), edges[1:].copy()
    zero = -histogram.first
    if 0 <= zero < counts.size and counts[zero] == counts.max():
        low[zero] = high[zero] = 0.0
    low[0], high[-1] = max(low[0], histogram.low), max(min(high[-1], histogram.high), low[-1])
    squares: F64 = (low * low + low * high + high * high) / 3
    return decibel(float(counts @ squares), float(counts @ _mean_errors(low, high, grid)))


def decibel(power: float, noise: float) -> float:
    """Signal over noise in dB, at most 150."""
    return float(min(10 * np.log10(power / noise), LOSSLESS_DB)) if power > 0 and noise > 0 else LOSSLESS_DB


def _histogram(rows: NDArray[np.float32], factor: F64, classes: NDArray[np.intp], weight: F64) -> F64:
    """f64[classes, bins]; ``factor`` f64[rows] brings a row's largest value to 1.

    A bin is what float32 numbers with the same sign, exponent and first bits of the mantissa have in common."""
    count = int(classes.max(initial=-1)) + 1
    found = np.zeros(count * 2 * _SIDE)
    chunk = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        bits = (rows[part] * factor[part, None]).astype(np.float32).view(np.uint32) >> (23 - _MANTISSA)
        magnitude = (bits & ((1 << (8 + _MANTISSA)) - 1)).astype(np.int64) - _FIRST
        index = np.clip(magnitude, 0, _SIDE - 1) + (bits >> (8 + _MANTISSA)) * _SIDE
        index += classes[part, None] * (2 * _SIDE)
        found += np.bincount(index.ravel(), np.repeat(weight[part], rows.shape[1]), minlength=found.size)
    return found.reshape(count, 2 * _SIDE)


def _edges() -> tuple[F64, F64]:
    """Lower and upper ends f64[bins] of the bins of both signs; the first of a side is 0 alone, the last 1 alone."""
    number = np.arange(_SIDE) + _FIRST
    ends = (1 + (number & ((1 << _MANTISSA) - 1)) / (1 << _MANTISSA)) * 2.0 ** ((number >> _MANTISSA) - 127)
    low, high = ends.copy(), np.append(ends[1:], 1.0)
    low[0] = high[0] = 0.0
    return np.concatenate([low, -high]), np.concatenate([high, -low])


_LOW, _HIGH = _edges()


@lru_cache(maxsize=1024)
def _costs(quant: Quant, key: float) -> F64:
    """Mean squared errors f64[grids, bins] of each grid that ``fit`` tries for rows whose largest value is 1."""
    grids, spread = _grids(quant, key)
    low, high = _LOW.copy(), _HIGH.copy()
    low[_SIDE - 1], high[_SIDE - 1] = 1 - spread, 1 + spread
    near = (grid[np.abs(grid) < 4] for grid in grids)  # farther ones are nobody's nearest, but cost digits
    return np.stack([_mean_errors(low, high, grid) for grid in near])


def _mean_errors(low: F64, high: F64, grid: F64) -> F64:
    """Mean squared distance f64[bins] to the nearest number of an ascending ``grid``, of values spread evenly over each
    ``[low, high]``; of the value itself where both are one."""
    borders = (grid[1:] + grid[:-1]) / 2
    inner = (borders[1:] - grid[1:-1]) ** 3 - (borders[:-1] - grid[1:-1]) ** 3  # three times the integral over a cell
    before = np.concatenate([[0.0, 0.0], np.cumsum(inner)])

    def integral(x: F64) -> F64:
        """Three times the integral from the first border to x."""
        cell = np.searchsorted(borders, x)
        start = borders[np.maximum(cell - 1, 0)]
        return np.asarray((x - grid[cell]) ** 3 - (start - grid[cell]) ** 3 + before[cell])

    width = high - low
    point = (low - grid[np.searchsorted(borders, low)]) ** 2
    spread = (integral(high) - integral(low)) / np.where(width > 0, 3 * width, 1.0)
    return np.where(width > 0, np.maximum(spread, 0.0), point)


def _keys(shape: Shape, quant: Quant) -> F64:
    """What the grids of a class depend on, f64[classes]: the other end, the largest value over a power of two, or 0."""
    if not quant.symmetric:
        return np.asarray(np.rint(shape.low * _LOWS) / _LOWS)
    if _by_powers(quant):
        return np.asarray((np.floor(shape.phase * _PHASES) + 0.5) / _PHASES)
    return np.zeros(len(shape.low))


def _by_powers(quant: Quant) -> bool:
    """Whether scales are powers of two: a row's largest value then lies anywhere in the upper half of the numbers."""
    return quant.scale == E8M0 or (isinstance(quant.format, Float) and quant.format.bits >= 16)


def _grids(quant: Quant, key: float) -> tuple[list[F64], float]:
    """The grids ``fit`` tries for rows of a key, whose largest value is 1, and how far it may be from that."""
    form = quant.format
    if not quant.symmetric:
        return list(_asymmetric(key, quant)), 0.0
    if _by_powers(quant):
        return [grid / key for grid in _of_powers(key, quant)], 0.5 / _PHASES / key
    if isinstance(form, Int) and form.bits <= 4 and quant.scale != E4M3:
        codes = np.arange(form.lo, form.hi + 1) * float(mapping(np.array(-1.0), np.array(1.0), quant)[0])
        return [grid * share for grid in (codes, -codes[::-1]) for share in SHARES], 0.0
    rounded = quant.scale == E4M3  # to 3 bits of mantissa
    few = rounded or (isinstance(form, Float) and form.bits <= 6)
    numbers = _numbers(quant)
    return [numbers / numbers[-1] * factor for factor in (FACTORS[quant.scale] if few else (1.0,))], 2.0**-5 * rounded


def _asymmetric(low: float, quant: Quant) -> Iterator[F64]:
    """Grids of rows that span ``[low, 1]``. Above 4 bits nothing is clipped: the lowest values of a class, which differ
    by more than a step, are within the codes of their rows."""
    lo, hi = code_range(quant)
    more = 0 if quant.format.bits <= 4 else (hi - lo) // _SKEWS
    for share in SHARES[::3] if quant.format.bits <= 4 else SHARES[:1]:
        scale, zero = mapping(np.array(low * share), np.array(share), quant)
        yield (np.arange(lo - more, hi + more + 1, dtype=np.float64) - float(zero)) * float(scale)


def _of_powers(peak: float, quant: Quant) -> Iterator[F64]:
    """Grids for rows whose largest value is ``peak``, in its unit: scales are powers of two, or 1 for 16 bits."""
    exact = float(mapping(np.array(-peak), np.array(peak), quant)[0])
    numbers = _numbers(quant)
    if quant.scale != E8M0:
        yield numbers
        return
    for factor in FACTORS[E8M0]:
        yield numbers * 2.0 ** np.ceil(np.log2(exact * factor))


def _numbers(quant: Quant) -> F64:
    """The numbers of a format at a scale of 1, ascending; of symmetric integers those used."""
    if isinstance(quant.format, Int):
        lo, hi = code_range(quant)
        return np.arange(lo, hi + 1, dtype=np.float64) - (lo + hi) // 2
    with np.errstate(invalid="ignore"):  # some codes are NaN
        reals = decode(np.arange(1 << quant.format.bits), quant.format).astype(np.float64)
    return np.unique(reals[np.abs(reals) <= largest(quant.format)])
