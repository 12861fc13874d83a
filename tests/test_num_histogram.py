"""The growing histogram: exact whatever the order, in fixed memory."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeq.num.histogram import Histogram

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
BATCHES = st.lists(hnp.arrays(np.float32, st.integers(0, 20), elements=FINITE), min_size=1, max_size=6)


def filled(*batches: np.ndarray, bins: int = 64) -> Histogram:
    histogram = Histogram(bins)
    for batch in batches:
        histogram.add(batch)
    return histogram


def same(a: Histogram, b: Histogram) -> bool:
    return all(np.array_equal(x, b.to_arrays()[name]) for name, x in a.to_arrays().items())


@given(BATCHES)
@settings(max_examples=50)
def test_the_order_of_batches_does_not_matter(batches: list[np.ndarray]) -> None:
    values = np.concatenate(batches)
    assert same(filled(*batches), filled(values))
    assert same(filled(*batches), filled(*batches[::-1]))


@given(BATCHES, BATCHES)
@settings(max_examples=50)
def test_merging_counts_what_both_counted(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    merged = filled(*a)
    merged.merge(filled(*b))
    assert same(merged, filled(*a, *b))


@given(hnp.arrays(np.float64, st.integers(1, 50), elements=st.floats(-1e6, 1e6, allow_subnormal=False)))
def test_counts_are_numpys_on_the_same_borders(values: np.ndarray) -> None:
    histogram = filled(values)
    expected = [
        np.sum((values >= a) & (values < b)) for a, b in np.lib.stride_tricks.sliding_window_view(histogram.edges(), 2)
    ]
    np.testing.assert_array_equal(histogram.counts, expected)
    assert (histogram.low, histogram.high) == (values.min(), values.max())


@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-20, 1.0, 1e20, 1e38])
@pytest.mark.parametrize("side", [(-1, 1), (0, 1), (-1, 0), (0.9, 1)])
def test_at_least_half_of_the_bins_are_used_at_any_magnitude(magnitude: float, side: tuple[float, float]) -> None:
    values = (np.linspace(*side, 100_000) * magnitude).astype(np.float32)
    histogram = filled(values[:10], values)
    assert histogram.counts.sum() == values.size + 10
    distinct = np.unique(values).size
    assert (histogram.counts > 0).sum() >= min(distinct, histogram.counts.size // 2)


def test_growing_from_zeros_to_the_largest_float() -> None:
    histogram = filled(np.zeros(5, np.float32), np.array([3e38, -1e-45], np.float32))
    assert histogram.counts.sum() == 7
    # Bins are half open: the zeros lie right of the border at 0, the tiny negative left of it.
    assert sorted(histogram.counts[histogram.counts > 0]) == [1, 1, 5]


def test_half_precision_and_weights_count() -> None:
    histogram = Histogram()
    histogram.add(np.array([[60000, -60000], [1, 1]], np.float16), weight=4)
    assert histogram.counts.sum() == 16
    assert histogram.edges()[0] <= -60000 < 60000 < histogram.edges()[-1]
    assert histogram.centres().size == histogram.counts.size == 2048


def test_the_state_survives_an_npz() -> None:
    histogram, file = filled(np.random.default_rng(0).normal(size=1000)), io.BytesIO()
    np.savez(file, **histogram.to_arrays())
    file.seek(0)
    loaded = Histogram.from_arrays(**np.load(file))
    assert same(loaded, histogram)
    for each in (loaded, histogram):
        each.add(np.array([100.0]))
    assert same(loaded, histogram)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        filled(np.array([1.0, bad]))


def test_histograms_of_other_sizes_do_not_merge() -> None:
    with pytest.raises(ValueError, match="64 bins into 32"):
        filled(np.ones(1), bins=32).merge(filled(np.ones(1)))
