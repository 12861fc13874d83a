"""What calibration remembers of a tensor: Stats, of fixed size however many values it has seen (L5).

Every range method is fitted from this one record, instead of from kept activations, so memory does not depend on the
number of samples. Extremes and sums count every value; the histogram and the reservoir see a subset of large tensors.
After ``DETAILED`` samples the histogram takes a quarter as many values of each, weighted alike, and channels are
counted in every fourth: counting takes as long as running the model, and means and shapes of distributions are known
by then. All parts are mergeable: two halves of the data merged say what one pass over both would have said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.num.histogram import Histogram

Arrays = dict[str, NDArray[Any]]

RESERVOIR = 1 << 13  # values kept raw per tensor
HISTOGRAM_ELEMENTS = 1 << 15  # values of one tensor of one detailed sample that enter the histogram: 1e6 in all
DETAILED, THEN_EVERY = 32, 4  # samples counted in full detail; afterwards a quarter of it tells as much
HUGE = 1e30  # no activation; -3.4e38 is how exporters write "attend nowhere"
MASK, PLAIN = -1e6, 1e4  # values below MASK beside a tensor otherwise within PLAIN are such a constant too (-1e9)
SETTLED = 0.01  # a range that grows by less than this share of itself has settled

_FLOATS = ("min", "max", "sum", "sum2")
_CHANNELS = ("sum", "low", "high", "count")
_COUNTS = ("count", "samples", "nan_count", "inf_count", "mask_count", "settled")


class Reservoir:
    """A uniform sample of at most ``RESERVOIR`` values, independent of how the data is split into batches.

    Every value gets a random key and the smallest keys stay, so reservoirs merge exactly. Only keys that can stay are
    drawn: the smallest of n uniform keys arrive like a Poisson process of rate n, and the sample's index fixes that
    process whatever the reservoir already holds.
    """

    def __init__(self, values: NDArray[np.float32] | None = None, keys: NDArray[np.float32] | None = None) -> None:
        self._values = np.zeros(0, np.float32) if values is None else values
        self._keys = np.zeros(0, np.float32) if keys is None else keys
        self._limit = math.inf  # no key at or above it can stay
        self._trim()

    def add(self, values: NDArray[np.float32], index: int) -> None:
        """Offer f32[n] of sample ``index``."""
        arrivals, places = _arrivals(index)
        count = min(int(np.searchsorted(arrivals, self._limit * values.size)), values.size)
        keys = (arrivals[:count] / values.size).astype(np.float32)
        self._join(values[(places[:count] * values.size).astype(np.intp)], keys)

    def merge(self, other: Reservoir) -> None:
        """Take in another reservoir's values."""
        self._join(other._values, other._keys)

    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Values and their keys, both f32[at most RESERVOIR]."""
        self._trim()
        return self._values, self._keys

    def _join(self, values: NDArray[np.float32], keys: NDArray[np.float32]) -> None:
        self._values, self._keys = np.concatenate([self._values, values]), np.concatenate([self._keys, keys])
        if self._keys.size > RESERVOIR * 5 // 4:  # not at each call: sorting out is the costly part
            self._trim()

    def _trim(self) -> None:
        if self._keys.size > RESERVOIR:
            stay = np.argpartition(self._keys, RESERVOIR)[:RESERVOIR]
            self._values, self._keys = self._values[stay], self._keys[stay]
        if self._keys.size == RESERVOIR:
            self._limit = float(self._keys.max())


@lru_cache(maxsize=4)
def _arrivals(index: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For sample ``index``: arrivals of a Poisson process of rate 1 and places in [0, 1), both f64[RESERVOIR].

    All tensors of a sample share them, since drawing them for each cost as much as the histograms."""
    rng = np.random.default_rng(index)
    return np.cumsum(rng.exponential(size=RESERVOIR)), rng.random(RESERVOIR)


@dataclass(frozen=True)
class Channels:
    """Per channel: ``sum`` f64[C], the extremes ``low`` and ``high`` f32[C], and how many values, ``count`` i64[C]."""

    sum: NDArray[np.float64]
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    count: NDArray[np.int64]

    @property
    def absmax(self) -> NDArray[np.float32]:
        """f32[C]; 0 where nothing was seen."""
        return np.maximum(-self.low, self.high)

    @property
    def mean(self) -> NDArray[np.float64]:
        """f64[C]; 0 where nothing was seen."""
        return self.sum / np.maximum(self.count, 1)

    def joined(self, other: Channels | None) -> Channels | None:
        """Both together; None when the numbers of channels differ, since then the axis isn't one of channels."""
        if other is None or other.sum.size != self.sum.size:
            return None
        low, high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        return Channels(self.sum + other.sum, low, high, self.count + other.count)


@dataclass
class Stats:
    """One tensor over the samples ``add`` saw. Values that no format should hold are counted apart and left out:
    NaN, infinities (``inf_count``) and the huge negative constants of masks (``mask_count``, -inf included).

    ``count`` is of values; ``settled`` is the number of samples after which the range grew by less than 1 % at a time.
    ``channels`` is None for a tensor without a channel axis or with a varying number of channels. ``shape`` is the
    largest seen, ``elements`` bounds what one sample adds to the histogram and to ``sum2``.
    """

    elements: int = HISTOGRAM_ELEMENTS
    min: float = math.inf
    max: float = -math.inf
    sum: float = 0.0
    sum2: float = 0.0
    count: int = 0
    samples: int = 0
    nan_count: int = 0
    inf_count: int = 0
    mask_count: int = 0
    settled: int = 0
    shape: tuple[int, ...] = ()
    histogram: Histogram = field(default_factory=Histogram)
    reservoir: Reservoir = field(default_factory=Reservoir)
    channels: Channels | None = None

    @property
    def sample(self) -> NDArray[np.float32]:
        """A uniform sample of the values, f32[at most RESERVOIR], in no order."""
        return self.reservoir.arrays()[0]

    @property
    def mean(self) -> float:
        """Mean of all values; 0 before the first."""
        return self.sum / self.count if self.count else 0.0

    def add(self, x: NDArray[np.floating], index: int, axis: int | None = -1) -> None:
        """Take in the tensor of sample ``index``: any shape, any float dtype, channels along ``axis`` (negative)."""
        if x.size == 0:
            return
        with np.errstate(invalid="ignore", over="ignore"):  # what is NaN or infinite is counted below
            view = _by_channel(np.ascontiguousarray(x, np.float32), axis)
            low, high = float(view.min()), float(view.max())
        values, counts = view.reshape(-1), np.full(view.shape[1], view.shape[0] * view.shape[2])
        if not (low > MASK and high < HUGE):  # so written that NaN fails it
            usable = self._screen(view)
            values, counts, view = view[usable], usable.sum(axis=(0, 2)), np.where(usable, view, np.float32(0))
            low, high = float(values.min(initial=math.inf)), float(values.max(initial=-math.inf))
        self.shape = x.shape if math.prod(x.shape) >= math.prod(self.shape) else self.shape
        self.samples += 1
        if self.samples == 1 or index < DETAILED or index % THEN_EVERY == 0:
            by_channel = axis is not None and x.ndim >= -axis
            self._add_channels(Channels(_channel_sums(view), *_channel_extremes(view), counts) if by_channel else None)
        if values.size:
            self.sum += float(values.sum(dtype=np.float32))
            self._add_values(values, index, low, high)

    def _screen(self, x: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which values count (same shape); those that don't are counted by what they are."""
        plain = np.abs(x[np.abs(x) < -MASK])
        floor = MASK if plain.size and plain.max() < PLAIN else -HUGE
        nan, mask, inf = np.isnan(x), x <= floor, x >= HUGE
        self.nan_count += int(nan.sum())
        self.mask_count += int(mask.sum())
        self.inf_count += int(inf.sum())
        return ~(nan | mask | inf)

    def _add_channels(self, channels: Channels | None) -> None:
        if self.samples == 1:
            self.channels = channels
        elif self.channels is not None:
            self.channels = self.channels.joined(channels)

    def _add_values(self, values: NDArray[np.float32], index: int, low: float, high: float) -> None:
        """Extremes, squares, histogram and reservoir of f32[n] within [low, high]."""
        if self._widened(low, high):
            self.settled = self.samples
        self.min, self.max = min(self.min, low), max(self.max, high)
        self.count += values.size
        stride = _stride(values.size, self.elements if index < DETAILED else max(self.elements // THEN_EVERY, 1))
        subset = np.ascontiguousarray(values[index % stride :: stride])
        self.sum2 += float(np.square(subset, dtype=np.float64).sum()) * (values.size / subset.size)
        if stride > 1:
            self.histogram.add(np.array([low, high], np.float32))  # the subset may miss them
        self.histogram.add(subset, weight=stride, within=(low, high))
        self.reservoir.add(values, index)

    def _widened(self, low: float, high: float) -> bool:
        """Whether values in [low, high] widen the range by more than ``SETTLED`` of it."""
        if self.count == 0:
            return True
        grown = max(self.min - low, 0.0) + max(high - self.max, 0.0)
        return grown > SETTLED * (self.max - self.min)

    def to_arrays(self) -> Arrays:
        """All of the state, as arrays for an ``.npz``."""
        values, keys = self.reservoir.arrays()
        arrays: Arrays = {
            "floats": np.array([getattr(self, name) for name in _FLOATS]),
            "integers": np.array([self.elements, *(getattr(self, name) for name in _COUNTS)], np.int64),
            "shape": np.array(self.shape, np.int64),
            "sample": values,
            "keys": keys,
            **self.histogram.to_arrays(),
        }
        if self.channels is not None:
            arrays |= {f"channel_{name}": getattr(self.channels, name) for name in _CHANNELS}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Stats:
        """The inverse of ``to_arrays``. KeyError or ValueError when ``arrays`` are of something else."""
        elements, *counts = (int(number) for number in arrays["integers"])
        return cls(
            elements,
            **dict(zip(_FLOATS, arrays["floats"].tolist(), strict=True)),
            **dict(zip(_COUNTS, counts, strict=True)),
            shape=tuple(arrays["shape"].tolist()),
            histogram=Histogram.from_arrays(arrays["counts"], arrays["grid"]),
            reservoir=Reservoir(arrays["sample"], arrays["keys"]),
            channels=Channels(*(arrays[f"channel_{name}"] for name in _CHANNELS)) if "channel_sum" in arrays else None,
        )


def merge(a: Stats, b: Stats) -> Stats:
    """The statistics of one pass over the samples of ``a``, then those of ``b``. Neither is changed."""
    merged, other = (Stats.from_arrays({k: v.copy() for k, v in s.to_arrays().items()}) for s in (a, b))
    if a.samples == 0 or b.samples == 0:
        return merged if b.samples == 0 else other
    if b.count and a._widened(b.min, b.max):
        merged.settled = a.samples + b.settled
    merged.min, merged.max = min(a.min, b.min), max(a.max, b.max)
    for name in ("sum", "sum2", "count", "samples", "nan_count", "inf_count", "mask_count"):
        setattr(merged, name, getattr(a, name) + getattr(b, name))
    merged.shape = max(a.shape, b.shape, key=math.prod)
    merged.histogram.merge(other.histogram)
    merged.reservoir.merge(other.reservoir)
    merged.channels = a.channels.joined(b.channels) if a.channels is not None else None
    return merged


def _by_channel(x: NDArray[np.float32], axis: int | None) -> NDArray[np.float32]:
    """A contiguous tensor as [outer, C, inner] without a copy, ``axis`` counted from the end; [1, 1, n] without one."""
    if axis is None or x.ndim < -axis:
        return x.reshape(1, 1, -1)
    position = x.ndim + axis
    return x.reshape(math.prod(x.shape[:position]), x.shape[position], math.prod(x.shape[position + 1 :]))


def _channel_extremes(view: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Smallest and largest value a channel of f32[outer, C, inner], innermost first since numpy is fastest there."""
    if view.shape[2] == 1:
        return view[:, :, 0].min(axis=0), view[:, :, 0].max(axis=0)
    return view.min(axis=2).min(axis=0), view.max(axis=2).max(axis=0)


def _channel_sums(view: NDArray[np.float32]) -> NDArray[np.float64]:
    """Sums f64[C] of f32[outer, C, inner]: in f32 along the innermost run, where numpy sums pairwise, f64 beyond."""
    inner = view[:, :, 0] if view.shape[2] == 1 else view.sum(axis=2)
    sums: NDArray[np.float64] = inner.sum(axis=0, dtype=np.float64)
    return sums


def _stride(size: int, elements: int) -> int:
    """Smallest step that leaves at most about ``elements`` of ``size`` values and shares no factor with any axis: a
    step of 4 would see every fourth channel only."""
    stride = -(-size // elements)
    while math.gcd(stride, size) > 1:
        stride += 1
    return stride
