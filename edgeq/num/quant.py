"""Mapping of real tensors on a format: ``real = (code - zero_point) * scale`` (L1).

Symmetry belongs to the mapping, not to the integers: ``i8/channel`` is symmetric, ``u8/tensor/asym`` is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import RecipeError
from edgeq.num.formats import Format, Int, parse_format

TENSOR, CHANNEL = 0, -1
MIN_SCALE = 2.0**-126  # the smallest normal float32: below, hardware that flushes denormals divides by zero


@dataclass(frozen=True)
class Quant:
    """How a tensor is to be represented. ``block``: 0 one scale a tensor, -1 one a channel, n one per n elements."""

    format: Format
    block: int = TENSOR
    symmetric: bool = True

    def __str__(self) -> str:
        grain = {TENSOR: "tensor", CHANNEL: "channel"}.get(self.block, f"block{self.block}")
        return f"{self.format}/{grain}" + ("" if self.symmetric else "/asym")


@dataclass(frozen=True)
class QParams:
    """A fitted mapping. ``scale`` f32 and ``zero_point`` int32 have the same shape, as ONNX wants it:

    [] per tensor, [channels] along ``axis`` per channel, and per block the tensor's own shape with ``ceil(n / block)``
    in place of the n of ``axis``. ``codes`` are the smallest and largest code used where they aren't
    ``code_range(quant)``: fewer against saturation, or all of a small format.
    """

    quant: Quant
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    axis: int | None = None
    codes: tuple[int, int] | None = None

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code used."""
        return self.codes or code_range(self.quant)


@dataclass(frozen=True)
class Coded:
    """A constant ready to be stored: its mapping and ``codes`` of its elements, which may be rounded in any way."""

    params: QParams
    codes: NDArray[np.int32]


def parse_quant(text: str) -> Quant:
    """``u8/tensor/asym``, ``i8/channel``, ``u4/block32/asym`` -> Quant. Raises RecipeError on anything else."""
    head, *rest = text.split("/")
    block, symmetric = TENSOR, True
    for word in rest:
        if word == "tensor":
            block = TENSOR
        elif word == "channel":
            block = CHANNEL
        elif word.startswith("block") and word[5:].isdigit() and int(word[5:]) > 0:
            block = int(word[5:])
        elif word in ("asym", "sym"):
            symmetric = word == "sym"
        else:
            raise RecipeError(f"unknown word {word!r} in {text!r}", hint="use FORMAT/tensor|channel|blockN[/asym]")
    return Quant(parse_format(head), block, symmetric)


def code_range(quant: Quant) -> tuple[int, int]:
    """Smallest and largest code of a mapping. Symmetric ones drop the lowest, so that -x mirrors x: i8 has -127…127,
    u8 has 1…255 about the zero point 128."""
    if not isinstance(quant.format, Int):
        raise TypeError(f"{quant} has no integer codes")
    lo, hi = quant.format.lo, quant.format.hi
    return (lo + 1, hi) if quant.symmetric else (lo, hi)


def steps(quant: Quant) -> int:
    """Steps from the lowest to the highest code."""
    lo, hi = code_range(quant)
    return hi - lo


def zero_point(lo: NDArray[np.float64], scale: NDArray[np.float64] | np.float32, quant: Quant) -> NDArray[np.float64]:
    """The code of 0, shape as ``lo``: the middle one, or the one that puts ``lo`` on the lowest."""
    code_lo, code_hi = code_range(quant)
    if quant.symmetric:
        return np.full(lo.shape, (code_lo + code_hi) // 2, np.float64)
    return np.clip(np.rint(code_lo - lo / scale), code_lo, code_hi)


def mapping(
    lo: NDArray[np.float64], hi: NDArray[np.float64], quant: Quant
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scales and zero points of ranges that hold 0, same shape as ``lo`` and ``hi``; an empty range gets MIN_SCALE."""
    span = 2 * np.maximum(-lo, hi) if quant.symmetric else hi - lo
    scale = np.maximum(span / steps(quant), MIN_SCALE)
    return scale, zero_point(lo, scale, quant)


def quantize(x: NDArray[np.floating], params: QParams) -> NDArray[np.int32]:
    """Real -> codes (int32, same shape), rounding half to even and clipping, as ONNX QuantizeLinear does."""
    lo, hi = params.code_range
    codes: NDArray[np.floating] = np.rint(x / _spread(params.scale, params, x.shape))
    # Whole numbers up to 2**24 are exact in float32; a 32-bit code needs float64 to be clipped at 2**31 - 1.
    zero = _spread(params.zero_point, params, x.shape)
    codes = codes + zero.astype(np.float64 if hi >= 1 << 24 else np.float32)
    clipped: NDArray[np.int32] = np.clip(codes, lo, hi).astype(np.int32)
    return clipped


def dequantize(codes: NDArray[np.integer], params: QParams) -> NDArray[np.float32]:
    """Codes -> real f32, same shape. 32-bit codes are rounded to f32 first, as ONNX DequantizeLinear does."""
    zero = _spread(params.zero_point, params, codes.shape).astype(np.float32)
    real: NDArray[np.float32] = (codes.astype(np.float32) - zero) * _spread(params.scale, params, codes.shape)
    return real


def fake_quant(x: NDArray[np.floating], params: QParams) -> NDArray[np.float32]:
    """Real -> nearest representable real, same shape."""
    return dequantize(quantize(x, params), params)


def _spread(values: NDArray[Any], params: QParams, shape: tuple[int, ...]) -> NDArray[Any]:
    """A scale or zero point in a shape that broadcasts against a tensor of ``shape``."""
    if values.ndim == 0 or params.axis is None:
        return values
    if params.quant.block > 0:
        every = np.repeat(values, params.quant.block, params.axis)
        return np.take(every, np.arange(shape[params.axis]), params.axis)  # the last block may be short
    return values.reshape([-1 if axis == params.axis % len(shape) else 1 for axis in range(len(shape))])
