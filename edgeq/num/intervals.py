"""How sure a measured value is: confidence intervals of means and of paired differences (L1).

Closed forms that cover well at any size (Wilson for shares, Bonett and Price for paired shares, Student for other
means) instead of a bootstrap: they are deterministic, and honest about few samples, where its percentiles are too
close together. Latency ratios have their own in ``run.timing``, which knows how laps take turns.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]

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
