"""How sure a measured value is: confidence intervals of means, of paired differences and of latency ratios (L1).

Closed forms where they cover well at any size (Wilson for shares, Bonett and Price for paired shares, Student for
other means) instead of resampling everything: they are deterministic and exact about small samples, where a percentile
bootstrap is too narrow. Laps drift together with temperature and clock, so their ratio is resampled in blocks.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]

_RESAMPLES = 2000  # ends of a 95 % interval then vary by less than a tenth of its width between seeds
_FEWEST_FOR_STUDENT = 3  # the quantile's expansion is right to 1 % from two degrees of freedom on, to 11 % at one


class Interval(NamedTuple):
    """A value and its bounds at the level asked for; None where too few or non-finite values can't bound it."""

    value: float
    low: float | None
    high: float | None


def interval_mean(values: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of [n] values: Wilson's interval when all are 0 or 1, else Student's. ValueError without values."""
    x = _one_axis(values)
    if np.isin(x, (0.0, 1.0)).all():
        return _wilson(x, level)
    return _student(x, level)


def interval_paired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of ``a - b``, both [n] and of the same samples: a drop where ``a`` is the reference's score.

    0/1 scores take Bonett and Price's interval (2012), which stays open when no sample changed sides, unlike McNemar's:
    "no drop in 20 images" is no proof of no drop. Others take Student's. ValueError when the lengths differ."""
    x, y = _one_axis(a), _one_axis(b)
    if x.size != y.size:
        raise ValueError(f"{x.size} values can't be paired with {y.size}")
    if not np.isin([x, y], (0.0, 1.0)).all():
        return _student(x - y, level)
    n, lost, won = x.size, int(np.sum(x > y)), int(np.sum(x < y))
    value = (lost - won) / n
    p_lost, p_won = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    middle = p_lost - p_won
    half = _z(level) * math.sqrt((p_lost + p_won - middle**2) / (n + 2))
    return Interval(value, max(min(middle - half, value), -1.0), min(max(middle + half, value), 1.0))


def interval_ratio(laps_a: ArrayLike, laps_b: ArrayLike, level: float = 0.95, seed: int = 0) -> Interval:
    """``median(a) / median(b)`` of interleaved laps [n] each: lap i of both ran one after the other.

    Percentile interval of a circular block bootstrap: pairs of laps stay together and so do ``2 n**(1/3)`` neighbours.
    ValueError when the numbers of laps differ or a lap isn't positive and finite."""
    a, b = _one_axis(laps_a), _one_axis(laps_b)
    if a.size != b.size:
        raise ValueError(f"{a.size} laps can't be paired with {b.size}")
    if not (np.isfinite([a, b]).all() and min(a.min(), b.min()) > 0):
        raise ValueError("laps have to be positive and finite")
    value = float(np.median(a) / np.median(b))
    if a.size < 2:
        return Interval(value, None, None)
    block = min(a.size, math.ceil(2 * a.size ** (1 / 3)))
    starts = np.random.default_rng(seed).integers(a.size, size=(_RESAMPLES, -(-a.size // block)))
    laps = ((starts[:, :, None] + np.arange(block)) % a.size).reshape(_RESAMPLES, -1)[:, : a.size]
    ratios = np.median(a[laps], axis=1) / np.median(b[laps], axis=1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _one_axis(values: ArrayLike) -> F64:
    x = np.asarray(values, dtype=np.float64).reshape(-1)
    if x.size == 0:
        raise ValueError("no values to measure")
    return x


def _z(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)


def _t(level: float, freedom: int) -> float:
    """Student's two-sided quantile by its expansion in 1 / freedom (Abramowitz and Stegun 26.7.5)."""
    z = _z(level)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))


def _student(x: F64, level: float) -> Interval:
    value = float(x.mean())
    if x.size < _FEWEST_FOR_STUDENT or not math.isfinite(value):
        return Interval(value, None, None)
    half = _t(level, x.size - 1) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Interval(value, value - half, value + half)


def _wilson(x: F64, level: float) -> Interval:
    n, share, z = x.size, float(x.mean()), _z(level)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share)))
