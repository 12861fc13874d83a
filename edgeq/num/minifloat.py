"""Floating formats as codes: the bits of a number, as ml_dtypes rounds to them (L1).

A code is the bit pattern as a non-negative integer (of f32, its two's complement), so that codes of floats are stored,
packed and rounded by the same means as codes of integers. Rounding is half to even and saturates: what lies beyond the
largest number becomes it, never infinity or NaN, as ONNX casts with ``saturate=1`` (the block formats of OCP MX 1.0
ask for it).
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edgeq.num.formats import BF16, E2M1, E2M3, E3M2, E4M3, E5M2, E8M0, F16, F32, Float

STORED: dict[Float, np.dtype[Any]] = {
    F32: np.dtype(np.float32),
    F16: np.dtype(np.float16),
    BF16: np.dtype(ml_dtypes.bfloat16),
    E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
    E5M2: np.dtype(ml_dtypes.float8_e5m2),
    E2M3: np.dtype(ml_dtypes.float6_e2m3fn),
    E3M2: np.dtype(ml_dtypes.float6_e3m2fn),
    E2M1: np.dtype(ml_dtypes.float4_e2m1fn),
    E8M0: np.dtype(ml_dtypes.float8_e8m0fnu),
}
_BITS = {1: np.uint8, 2: np.uint16, 4: np.int32}


def largest(form: Float) -> float:
    """The largest number of a format: 6 of f4e2m1, 448 of f8e4m3."""
    return float(ml_dtypes.finfo(STORED[form]).max)


def encode(x: NDArray[np.floating], form: Float) -> NDArray[np.int32]:
    """Real, any shape -> codes int32 of the nearest numbers, same shape."""
    stored = STORED[form]
    rounded = np.clip(x, -largest(form), largest(form)).astype(stored)
    codes: NDArray[np.int32] = rounded.view(_BITS[stored.itemsize]).astype(np.int32)
    return codes


def decode(codes: NDArray[np.integer], form: Float) -> NDArray[np.float32]:
    """Codes, any shape -> real f32, same shape; exact, since f32 holds every number of every format."""
    stored = STORED[form]
    real: NDArray[np.float32] = codes.astype(_BITS[stored.itemsize]).view(stored).astype(np.float32)
    return real
