"""How much of a tensor's range is worth representing: four answers from one histogram (L1).

A method takes the histogram, the exact extremes widened to hold 0 (``lo < hi``) and the mapping, and returns a range;
``fit.fit_range`` checks what goes in and out. Each search evaluates all candidates of a stage as one [candidates, bins]
array instead of prefix sums over bins: the cost is the same (2 ms for 200 x 2048), any error power works, and the
mapping evaluated is to the letter the one that is deployed.

Widths above 8 bits keep the whole range: their rounding error is so far below any clipping that searching only harms,
and their steps are finer than the histogram's bins.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import RecipeError
from edgeq.num.histogram import Histogram
from edgeq.num.quant import Quant, code_range, mapping, steps

F64 = NDArray[np.float64]
Range = tuple[float, float]

_CANDIDATES = 50  # shares of an end tried a stage


def minmax_range(histogram: Histogram, lo: float, hi: float, quant: Quant) -> Range:  # noqa: ARG001  one signature
    """All of it: nothing is clipped."""
    return lo, hi


def percentile_range(histogram: Histogram, lo: float, hi: float, quant: Quant, *, percentile: float = 0.9999) -> Range:
    """The share ``percentile`` of the values; what is left out is halved between the ends, or all above 0 (below it)
    where the tensor is one-sided. Borders are interpolated inside a bin."""
    if _keeps_everything(quant):
        return lo, hi
    if not 0.0 < percentile <= 1.0:
        raise RecipeError(f"percentile is {percentile}, a share in (0, 1] is needed", hint="0.9999 keeps 99.99 %")
    out = (1.0 - percentile) / (1.0 if lo == 0.0 or hi == 0.0 else 2.0)
    return (
        lo if lo == 0.0 else _quantile(histogram, out),
        hi if hi == 0.0 else _quantile(histogram, 1.0 - out),
    )


def mse_range(histogram: Histogram, lo: float, hi: float, quant: Quant, *, power: float = 2.0) -> Range:
    """The range with the least sum of ``|error| ** power``; never worse than the whole range on this histogram.

    Both ends shrink together or either alone, then each over its whole extent (Silu and Gelu have a short dense
    negative side that must not shrink with the positive one), then both nearby, in pairs, because the zero point is
    rounded and so ties them. A power above 2 weighs clipped outliers more: 2.4 is TensorRT's."""
    if _keeps_everything(quant):
        return lo, hi
    occupied = histogram.counts > 0
    centres, counts = histogram.centres()[occupied], histogram.counts[occupied]

    def choose(shares_lo: F64, shares_hi: F64) -> tuple[F64, F64]:
        """The best pair of shares of lo and hi, each [1]; the first pair is the best known and stands on a tie."""
        a, b = np.broadcast_arrays(shares_lo, shares_hi)
        errors = _errors(centres, counts, a * lo, b * hi, quant, power)
        too_fine = (b * hi - a * lo) < histogram.width * steps(quant)  # a step below a bin's width can't be judged
        errors[1:][too_fine[1:]] = np.inf
        best = [int(errors.argmin())]
        return a[best], b[best]

    joint = _shrinking(histogram, lo, hi, quant)
    alone, whole = np.linspace(1.0, 0.0, _CANDIDATES), np.ones(_CANDIDATES)
    if quant.symmetric or lo == 0.0 or hi == 0.0:  # one number decides
        a, b = choose(joint, joint)
        near = np.append(1.0, np.linspace(0.95, 1.05, _CANDIDATES))
        a, b = choose(np.minimum(a * near, 1.0), np.minimum(b * near, 1.0))
    else:
        a, b = choose(np.concatenate([joint, whole, alone]), np.concatenate([joint, alone, whole]))
        a, b = choose(np.append(a, alone), b)
        a, b = choose(a, np.append(b, alone))
        near_lo, near_hi = (np.append(1.0, v) for v in np.meshgrid(*[np.linspace(0.97, 1.03, 7)] * 2))
        a, b = choose(np.minimum(a * near_lo, 1.0), np.minimum(b * near_hi, 1.0))
    return float(a[0] * lo), float(b[0] * hi)


def entropy_range(histogram: Histogram, lo: float, hi: float, quant: Quant) -> Range:
    """The range whose quantized distribution diverges least (Kullback-Leibler) from the clipped one.

    As TensorRT's calibrator: P is the histogram inside the range with the clipped mass on its outermost bins, Q the
    unclipped part merged into a level's bins and spread evenly over those that are occupied. Zero is represented
    without error, so its bin counts no more than the fuller of its neighbours. Few samples mislead this method."""
    if _keeps_everything(quant):
        return lo, hi
    counts = _without_zeros(histogram)
    occupied = counts > 0
    centres, counts = histogram.centres()[occupied], counts[occupied]
    shares = _shrinking(histogram, lo, hi, quant, 4 * _CANDIDATES)
    best = _divergences(centres, counts, lo * shares, hi * shares, quant).argmin()
    return float(lo * shares[best]), float(hi * shares[best])


def _keeps_everything(quant: Quant) -> bool:
    return quant.format.bits > 8


def _shrinking(histogram: Histogram, lo: float, hi: float, quant: Quant, count: int = _CANDIDATES) -> F64:
    """Shares f64[count] of a range from 1 down to where a step is as narrow as a bin: less can't be judged."""
    return np.geomspace(1.0, min(1.0, histogram.width * steps(quant) / (hi - lo)), count)


def _errors(centres: F64, counts: F64, lo: F64, hi: F64, quant: Quant, power: float) -> F64:
    """Sum f64[candidates] of ``|error| ** power`` of values at ``centres`` f64[bins], for each range lo, hi."""
    scale, zero = (values[:, None] for values in mapping(lo, hi, quant))
    code_lo, code_hi = code_range(quant)
    error = centres / scale
    np.rint(error, out=error)
    np.clip(error, code_lo - zero, code_hi - zero, out=error)
    error *= scale
    error -= centres
    return (error * error if power == 2.0 else np.abs(error) ** power) @ counts


def _divergences(centres: F64, counts: F64, lo: F64, hi: F64, quant: Quant) -> F64:
    """Kullback-Leibler divergences f64[candidates] of the ranges lo, hi; ``counts`` are positive. inf below two bins.

    With p and q before normalisation, T their sums: KL = (sum p log p - sum p log q) / T_p - log T_p + log T_q, where
    q is constant (mass / occupied bins) inside a level, so that both sums are differences of prefix sums."""
    scale, zero = (values[:, None] for values in mapping(lo, hi, quant))
    borders = (np.arange(*code_range(quant)) + 0.5 - zero) * scale
    first, last = np.searchsorted(centres, lo), np.searchsorted(centres, hi, "right")
    ends = first[:, None], last[:, None]
    bins = np.concatenate([ends[0], np.clip(np.searchsorted(centres, borders), *ends), ends[1]], axis=1)
    mass_before, own_before = (np.concatenate([[0.0], np.cumsum(v)]) for v in (counts, _x_log_x(counts)))
    mass, size = np.diff(mass_before[bins]), np.diff(bins)
    log_q = np.log(np.where(size > 0, mass, 1.0) / np.maximum(size, 1))
    below, above = mass_before[first], mass_before[-1] - mass_before[last]  # what the range clips
    rows, outer = np.arange(lo.size), size.shape[1] - 1
    lowest, highest = (size > 0).argmax(1), outer - (size > 0)[:, ::-1].argmax(1)
    cross = (mass * log_q).sum(1) + below * log_q[rows, lowest] + above * log_q[rows, highest]
    own = own_before[last] - own_before[first]
    for bin_, clipped in ((np.minimum(first, counts.size - 1), below), (np.maximum(last, 1) - 1, above)):
        own += _x_log_x(counts[bin_] + clipped) - _x_log_x(counts[bin_])
    total, inside = counts.sum(), np.maximum(mass_before[last] - mass_before[first], 1.0)
    return np.where(last - first < 2, np.inf, (own - cross) / total + np.log(inside / total))


def _x_log_x(x: F64) -> F64:
    return x * np.log(x)


def _without_zeros(histogram: Histogram) -> F64:
    """Counts f64[bins] in which the bin that holds 0 has no more than the fuller of its neighbours."""
    counts, zero = histogram.counts.copy(), -histogram.first
    if 0 <= zero < counts.size:
        neighbours = np.append(counts[max(zero - 1, 0) : zero], counts[zero + 1 : zero + 2])
        counts[zero] = min(counts[zero], neighbours.max(initial=0.0))
    return counts


def _quantile(histogram: Histogram, share: float) -> float:
    """The value below which ``share`` of the counts lie, counts being spread evenly inside a bin."""
    cumulated = np.cumsum(histogram.counts)
    wanted = share * cumulated[-1]
    index = int(np.searchsorted(cumulated, wanted))
    inside = (wanted - cumulated[index]) / histogram.counts[index] + 1.0
    return float((histogram.first + index + inside) * histogram.width)
