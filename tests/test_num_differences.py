"""What two computations of a tensor differ by: causes that were put there are told from the values."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeq.num.differences import differ

F32 = NDArray[np.float32]
SHAPE = (1, 16, 8, 8)
X: F32 = (np.random.default_rng(0).normal(0, 20, SHAPE)).astype(np.float32)


def codes(x: F32, scale: float | F32 = 1.0, zero: int = 128) -> NDArray[np.uint8]:
    return np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.uint8)


@given(factor=st.floats(0.3, 3), spread=st.floats(5, 200))
def test_a_wrong_scale_is_told_with_its_factor(factor: float, spread: float) -> None:
    assume(abs(factor - 1) * spread > 2)  # codes: less is within what kernels round by
    x = X * np.float32(spread / 20)
    found = differ([(codes(x), codes(x, 1 / factor))])
    assert found.cause == "scale"
    assert float(found.why.split()[3]) == pytest.approx(factor, rel=0.05)


@given(shift=st.integers(-60, 60).filter(bool), spread=st.floats(5, 60))
def test_a_wrong_zero_point_is_told_with_its_offset(shift: int, spread: float) -> None:
    x = X * np.float32(spread / 20)
    found = differ([(codes(x), codes(x, zero=128 + shift))])
    assert found.cause == "zero point"
    assert f"{abs(shift)} codes {'above' if shift > 0 else 'below'}" in found.why


@given(st.floats(-0.5, 0.5))
def test_other_roundings_are_rounding(early: float) -> None:
    """Nearest against down, up and anything between: at most a code, half a code on the mean."""
    found = differ([(codes(X), codes(X + np.float32(early)))])
    assert found.cause in ("", "rounding") and found.largest <= 1


def test_one_channel_is_told_from_all() -> None:
    scales = np.ones((1, 16, 1, 1), np.float32)
    scales[0, 5] = 0.5
    found = differ([(codes(X), codes(X, scales)), (codes(X / 2), codes(X / 2, scales))])
    assert found.cause == "scale" and found.off[1] == (5,)
    assert found.why == "the values are 2 times those here, at 5 of axis 1 alone"


def test_what_is_cut_off_is_told() -> None:
    wild = X.copy()
    wild[0, 3] += np.random.default_rng(1).normal(0, 2000, SHAPE[2:])
    found = differ([(codes(X), codes(wild))])
    assert found.cause == "saturation" and "at an end of uint8: 0 or 255, at 3 of axis 1" in found.why


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_may_differ_by_their_last_digits(dtype: type[np.floating]) -> None:
    x = X.astype(dtype)
    near = (x * dtype(1 + 4 * float(np.finfo(dtype).eps))).astype(dtype)
    assert differ([(x, near)]).cause == "rounding"
    coarse = x.astype(ml_dtypes.float8_e5m2).astype(dtype)
    assert differ([(x, coarse)]).cause in ("precision", "unknown")
    assert differ([(x, x + dtype(3))]).cause == "zero point"


def test_numbers_that_are_none_come_first() -> None:
    broken = X.copy()
    broken[0, 0, 0, :2] = np.nan, np.inf
    found = differ([(X, broken)])
    assert found.cause == "not finite" and found.why.startswith("2 values")
    assert differ([(broken, broken.copy())]).cause == ""
    assert differ([(broken, -broken)]).cause == "not finite", "infinities of either sign"


def test_what_counts_isn_t_rounded() -> None:
    shapes = np.array([3, 224, 224])
    assert differ([(shapes, np.array([3, 224, 225]))]).cause == "unknown"
    assert differ([(shapes > 3, shapes > 2)]).cause == "unknown"
    assert differ([(shapes, shapes[:2])]).cause == "shape"
    assert differ([(shapes, shapes.astype(np.int32))]).why == "int32[3] there, int64[3] here"
