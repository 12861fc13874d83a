"""Statistics or weights -> scales and zero points (L1).

Activations: ``fit_range`` chooses how much of a tensor's range to represent, by any of METHODS from the same histogram,
and ``params_of_range`` maps it. Constants: ``fit_weight`` and, last, ``fit_bias``, whose scale the other two dictate.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import RecipeError, did_you_mean
from edgeq.num.formats import E4M3, E8M0, Float, Int
from edgeq.num.histogram import Histogram
from edgeq.num.quant import CHANNEL, MIN_SCALE, TENSOR, QParams, Quant, mapping, quantize, snap, steps, zero_point
from edgeq.num.ranges import Range, entropy_range, minmax_range, mse_range, percentile_range
from edgeq.num.scales import fit_scales

F64 = NDArray[np.float64]

SHARES = np.linspace(1.0, 0.3, 71)  # shares of a row's largest weight tried for small formats
_CHUNK = 1 << 16  # weights a pass: what the search makes of them stays in the cache

METHODS: dict[str, Callable[..., Range]] = {
    "minmax": minmax_range,
    "percentile": percentile_range,
    "mse": mse_range,
    "entropy": entropy_range,
}


def fit_range(method: str, histogram: Histogram, lo: float, hi: float, quant: Quant, **options: float) -> Range:
    """The range worth representing of values that span exactly ``[lo, hi]``; it holds 0 and lies in [lo, hi] with 0.

    ``method`` is a name of METHODS and ``options`` are its keyword-only parameters.
    Raises RecipeError on an unknown method or option, ValueError when lo or hi isn't finite or lo > hi."""
    if method not in METHODS:
        raise RecipeError(f"unknown range method {method!r}", hint=did_you_mean(method, list(METHODS)))
    function = METHODS[method]
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in options.keys() - set(known):
        hint = did_you_mean(name, known) if known else f"{method} has no options"
        raise RecipeError(f"unknown option {name!r} of range method {method!r}", hint=hint)
    if not (np.isfinite([lo, hi]).all() and lo <= hi):
        raise ValueError(f"a tensor can't span from {lo} to {hi}")
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    if lo == hi or not histogram.counts.any():
        return lo, hi
    found_lo, found_hi = function(histogram, lo, hi, quant, **options)
    return min(max(found_lo, lo), 0.0), max(min(found_hi, hi), 0.0)


def params_of_range(lo: float, hi: float, quant: Quant, *, min_scale: float = MIN_SCALE) -> QParams:
    """The mapping per tensor of ``[lo, hi]`` widened to hold 0, which is represented exactly.

    ``lo`` and ``hi`` meet the outermost codes; where the mapping is symmetric the larger of the two does. A tensor that
    is always 0 gets the scale of [0, 1]: a bias quantized with it neither overflows nor vanishes."""
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    if lo == hi:
        hi = 1.0
    ends = np.array([lo, hi], np.float32)
    exact, _ = mapping(np.array(lo), np.array(hi), quant)
    # Ends at half a step (-100.5 and 154.5) both round to even and leave a code unused; a hair narrower, they don't.
    for narrow in (1.0, 1.0 - 2.0**-22):
        scale = np.float32(max(float(exact) * narrow, min_scale))
        params = QParams(quant, np.array(scale), zero_point(np.array(lo), scale, quant).astype(np.int32))
        if quant.symmetric or np.ptp(quantize(ends, params)) == steps(quant):
            break
    return params


def fit_weight(w: NDArray[np.floating], quant: Quant, axis: int | None, *, min_scale: float = MIN_SCALE) -> QParams:
    """The mapping of a constant of any shape; ``axis`` has a scale each, or is cut in blocks (unused per tensor).

    Integers above 4 bits get scales from each row's extremes; up to 4 bits from a search for the least squared error
    over all codes and, where symmetric, both signs of the scale (a negative one gives the extra code to the positive
    side: 2 to 3 dB for 4 bits). Floats, and what has scales of 8 bits, are left to ``fit_scales``. A row of zeros gets
    the median scale of the others, so that its bias is quantized as finely as theirs."""
    rows = scale_rows(w.astype(np.float32, copy=False), quant, axis)
    lo, hi = np.minimum(rows.min(1), 0.0).astype(np.float64), np.maximum(rows.max(1), 0.0).astype(np.float64)
    codes, tensor_scale = None, 1.0
    scale, zero = mapping(lo, hi, quant)
    if isinstance(quant.format, Float) or quant.scale in (E4M3, E8M0):
        fitted, tensor_scale = fit_scales(rows, quant)
        scale = fitted.astype(np.float64)
    elif quant.format.bits <= 4:
        codes = (quant.format.lo, quant.format.hi)
        scale, zero = _search_rows(rows, lo, hi, quant, codes)
    live = hi > lo
    alone = 1.0 / steps(quant) if isinstance(quant.format, Int) else 1.0
    scale[~live] = np.median(np.abs(scale[live])) if live.any() else alone
    scale = np.copysign(np.maximum(np.abs(scale), min_scale), scale)
    return QParams(
        quant,
        _of_rows(snap(scale, quant.scale, tensor_scale), quant, w.shape, axis),
        _of_rows(zero.astype(np.int32), quant, w.shape, axis),
        None if quant.block == TENSOR or axis is None else axis % w.ndim,
        codes,
        tensor_scale,
    )


def fit_pairs(rows: NDArray[np.floating], params: QParams, sum_max: int) -> QParams:
    """The mapping of a symmetric i8 weight with scales raised until no two neighbouring codes add beyond ``sum_max``.

    ``rows`` [scales, K] are the weights in the order the kernel multiplies them; all of them where the tensor has one.
    A scale takes what its own worst pair needs and no more. Two numbers that add to less than a whole number don't add
    to more once both are rounded to nearest, so codes keep the bound that quotients keep, also when a scale is raised
    later; codes rounded in another way need not."""
    needed = np.asarray(pair_sums(rows.astype(np.float64)) / sum_max * (1 + 2.0**-22))  # survives rounding to f32
    needed = needed.max() if params.scale.ndim == 0 else needed
    return replace(params, scale=np.asarray(np.maximum(params.scale, needed), np.float32))


def pair_sums(rows: NDArray[Any]) -> NDArray[Any]:
    """[rows, K] -> [rows]: the largest magnitude that elements 2j and 2j + 1 reach when each may be multiplied by
    anything from 0 to 1, so that only those of one sign add."""
    even = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    ends = (np.maximum(even, 0), np.maximum(-even, 0))
    return np.asarray(np.maximum(*((end[:, 0::2] + end[:, 1::2]).max(axis=1, initial=0) for end in ends)))


def fit_bias(
    bias: NDArray[np.float32],
    s_x: float,
    params_w: QParams,
    *,
    products: int = 0,
    code_bits: int = 32,
    min_scale: float = MIN_SCALE,
) -> tuple[NDArray[np.int32], NDArray[np.float32], QParams]:
    """bias f32[out], scale of the input, mapping of the weight -> codes i32[out], their scale, the weight's mapping.

    The scale is ``s_x * s_w`` in f32 with the shape of ``params_w.scale`` ([] or [out]), as integer kernels assume.
    Where a code would leave ``2**31 - 1 - products * 2**15`` (``products``: u8 x s8 products summed into an output;
    AIMET's guard, never below half the range) or the scale would fall below ``min_scale``, the weight's scale is raised
    and the third result is another than ``params_w``: quantize the weight with it. ValueError for weights in blocks."""
    if params_w.quant.block > TENSOR:
        raise ValueError(f"a weight mapped {params_w.quant} has no scale its bias could share")
    limit = bias_limit(products, code_bits)
    needed = np.abs(bias.astype(np.float64)) / limit
    needed = np.maximum(needed.max(initial=0.0) if params_w.scale.ndim == 0 else needed, min_scale)
    least = needed / s_x * (1 + 2.0**-22)  # survives rounding to f32
    s_w = params_w.scale
    if (np.abs(s_w) < least).any():
        s_w = np.asarray(np.copysign(np.maximum(np.abs(s_w), least), s_w), np.float32)
        params_w = replace(params_w, scale=s_w)
    scale = np.asarray(np.float32(s_x) * s_w)
    codes = np.clip(np.rint(bias.astype(np.float64) / scale), -limit, limit)
    return codes.astype(np.int32), scale, params_w


def bias_limit(products: int, code_bits: int = 32) -> int:
    """The largest code of a bias to which ``products`` u8 x s8 products are added (AIMET's guard)."""
    return int(max(2 ** (code_bits - 1) - 1 - products * 2**15, 2 ** (code_bits - 2)))


def scale_rows(w: NDArray[np.float32], quant: Quant, axis: int | None) -> NDArray[np.float32]:
    """The elements that share a scale, one row each: f32[scales, elements]; a short last block is filled with 0."""
    if quant.block == TENSOR:
        return w.reshape(1, -1)
    if axis is None:
        raise ValueError(f"{quant} needs an axis")
    if quant.block == CHANNEL:
        return np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)
    last = np.moveaxis(w, axis, -1)
    padding = [(0, 0)] * (w.ndim - 1) + [(0, -w.shape[axis] % quant.block)]
    return np.pad(last, padding).reshape(-1, quant.block)


def _of_rows(values: NDArray[Any], quant: Quant, shape: tuple[int, ...], axis: int | None) -> NDArray[Any]:
    """One value a row of ``_rows`` -> the shape of a scale in QParams, for a tensor of ``shape``."""
    if quant.block == TENSOR or axis is None:
        return values.reshape(())
    if quant.block == CHANNEL:
        return values
    axis %= len(shape)
    blocks = -(-shape[axis] // quant.block)
    return np.moveaxis(values.reshape(*shape[:axis], *shape[axis + 1 :], blocks), -1, axis)


def _search_rows(rows: NDArray[np.float32], lo: F64, hi: F64, quant: Quant, codes: tuple[int, int]) -> tuple[F64, F64]:
    """Scale and zero point f64[rows] with the least squared error of each row, ``codes`` being those allowed."""
    best_scale, best_zero = mapping(lo, hi, quant)
    chunk = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        least = np.full(len(rows[part]), np.inf)
        for sign, share in itertools.product((1, -1) if quant.symmetric else (1,), SHARES):
            scale, zero = mapping(lo[part] * share, hi[part] * share, quant)
            errors = _row_errors(rows[part], sign * scale, zero, codes)
            better = errors < least
            least[better] = errors[better]
            best_scale[part][better], best_zero[part][better] = sign * scale[better], zero[better]
    return best_scale, best_zero


def _row_errors(rows: NDArray[np.float32], scale: F64, zero: F64, codes: tuple[int, int]) -> NDArray[np.float32]:
    """Squared error f32[rows] of ``rows`` mapped with a scale and zero point each."""
    step, offset = (values.astype(np.float32)[:, None] for values in (scale, zero))
    error = rows / step
    np.rint(error, out=error)
    np.clip(error, codes[0] - offset, codes[1] - offset, out=error)
    error *= step
    error -= rows
    errors: NDArray[np.float32] = np.einsum("ij,ij->i", error, error)
    return errors
