"""A histogram that grows with its data, exactly and in fixed memory (L1).

Bins are half open, ``[i * 2**exponent, (i + 1) * 2**exponent)`` for whole ``i``: borders lie on a grid that does not
depend on the data, so doubling the width merges pairs of bins without splitting any. Counts are therefore exact
whatever the order of the batches, and merging two histograms gives the one of all their values.

The window of bins follows the data (``first`` is the index of its first bin) instead of being symmetric about 0: a
one-sided tensor, as after a Relu, then spends no bin on values it never takes, and between half and all of the bins
are always in use. With 2048 bins the ranges found by squared error lie within 1 % of those found on the raw values
for 8 bits in either layout; the following window gives the same with half the bins.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

BINS = 2048
_LOWEST_EXPONENT = -149  # the smallest positive float32: the width of the bins while only zeros have been seen
_CHUNK = 1 << 14  # values at a time: what add makes of them stays in the cache, twice as fast as a whole tensor
_INDEX_BITS = 24  # float32's mantissa: bin numbers up to 2**24 are exact in it


class Histogram:
    """Counts f64[bins] of finite reals; ``low`` and ``high`` are the exact extremes seen (inf, -inf when empty)."""

    def __init__(self, bins: int = BINS) -> None:
        self.counts: NDArray[np.float64] = np.zeros(bins)
        self.exponent = _LOWEST_EXPONENT
        self.first = 0
        self.low, self.high = math.inf, -math.inf

    @property
    def width(self) -> float:
        """Width of a bin, a power of two."""
        return math.ldexp(1.0, self.exponent)

    def edges(self) -> NDArray[np.float64]:
        """Borders f64[bins + 1], ascending."""
        return (self.first + np.arange(self.counts.size + 1, dtype=np.float64)) * self.width

    def centres(self) -> NDArray[np.float64]:
        """Middles f64[bins], ascending."""
        return (self.first + np.arange(self.counts.size, dtype=np.float64) + 0.5) * self.width

    def add(self, x: NDArray[np.floating], weight: float = 1.0, *, within: tuple[float, float] | None = None) -> None:
        """Count every value of ``x``, any shape, f16, f32 or f64; ``weight`` times each: n, when ``x`` is every n-th
        value of a tensor. ``within`` are bounds of ``x`` where they are known, widest when they are its extremes.
        ValueError on NaN or infinity: filter them first."""
        if x.size == 0:
            return
        values = x.reshape(-1)
        self._cover(*(within or (float(values.min()), float(values.max()))))
        # A power of two multiplies exactly. Float32 suffices unless 2**-exponent leaves its normal range or is below 1:
        # there a tiny negative would underflow to 0 and land right of it.
        wide = x.dtype == np.float64 or not -125 < self.exponent <= 0
        dtype: type[np.floating] = np.float64 if wide else np.float32
        for start in range(0, values.size, _CHUNK):
            part = values[start : start + _CHUNK].astype(dtype, copy=False)
            index = np.floor(part * math.ldexp(1.0, -self.exponent)) - self.first
            self.counts += weight * np.bincount(index.astype(np.intp), minlength=self.counts.size)

    def merge(self, other: Histogram) -> None:
        """Count all that ``other`` counted too. ValueError when the numbers of bins differ."""
        if other.counts.size != self.counts.size:
            raise ValueError(f"can't merge {other.counts.size} bins into {self.counts.size}")
        if other.low <= other.high:
            self._cover(other.low, other.high)
            self.counts += other._counts_on(self.exponent, self.first)

    def to_arrays(self) -> dict[str, NDArray[np.float64]]:
        """All of the state as arrays: ``counts`` f64[bins] and ``grid`` f64[4] = exponent, first, low, high."""
        return {"counts": self.counts, "grid": np.array([self.exponent, self.first, self.low, self.high])}

    @classmethod
    def from_arrays(cls, counts: NDArray[np.float64], grid: NDArray[np.float64]) -> Histogram:
        """The inverse of ``to_arrays``."""
        histogram = cls(counts.size)
        histogram.counts = np.array(counts, dtype=np.float64)
        histogram.exponent, histogram.first = int(grid[0]), int(grid[1])
        histogram.low, histogram.high = float(grid[2]), float(grid[3])
        return histogram

    def _cover(self, low: float, high: float) -> None:
        """Move and widen the bins until they hold ``[low, high]`` besides all that was counted."""
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"values from {low} to {high}: a histogram takes finite values only")
        if low >= self.low and high <= self.high:
            return
        low, high = min(low, self.low), max(high, self.high)
        exponent, first = _grid(low, high, self.counts.size)
        self.counts = self._counts_on(exponent, first)
        self.exponent, self.first, self.low, self.high = exponent, first, low, high

    def _counts_on(self, exponent: int, first: int) -> NDArray[np.float64]:
        """The counts f64[bins] on a grid as wide or wider, whose window holds every occupied bin."""
        occupied = np.flatnonzero(self.counts)
        shift = min(exponent - self.exponent, 63)  # >> floors, as bins of negative index need; 63 leaves the sign
        index = ((occupied + self.first) >> shift) - first
        counts = np.bincount(index, weights=self.counts[occupied], minlength=self.counts.size)
        return counts.astype(np.float64, copy=False)  # numpy counts in int64 when nothing is occupied


def _grid(low: float, high: float, bins: int) -> tuple[int, int]:
    """Exponent of the narrowest bins that hold ``[low, high]``, and the index of the first of them."""
    exponent = max(math.frexp(max(abs(low), abs(high)))[1] - _INDEX_BITS, _LOWEST_EXPONENT)
    while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= bins:
        exponent += 1
    return exponent, math.floor(math.ldexp(low, -exponent))
