"""Mapping of real tensors on a format: ``real = (code - zero_point) * scale`` (L1).

Symmetry belongs to the mapping, not to the integers: ``i8/channel`` is symmetric, ``u8/tensor/asym`` is not. Codes of a
floating format stand for the number they are the bits of (``minifloat``) and have no zero point. Scales have a format
too, written last where it isn't f32: ``f4e2m1/block32/e8m0``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import RecipeError
from edgeq.num.formats import BF16, E4M3, E8M0, F16, F32, Float, Format, Int, parse_format
from edgeq.num.minifloat import decode, encode, largest

TENSOR, CHANNEL = 0, -1
MIN_SCALE = 2.0**-126  # the smallest normal float32: below, hardware that flushes denormals divides by zero
SCALES = {str(form): form for form in (F32, F16, BF16, E4M3, E8M0)}
ALIASES = {
    "mxfp4": "f4e2m1/block32/e8m0",  # OCP Microscaling Formats 1.0
    "mxfp6": "f6e2m3/block32/e8m0",
    "mxfp8": "f8e4m3/block32/e8m0",
    "mxint8": "i8/block32/e8m0",
    "nvfp4": "f4e2m1/block16/f8e4m3",
}


@dataclass(frozen=True)
class Quant:
    """How a tensor is to be represented. ``block``: 0 one scale a tensor, -1 one a channel, n one per n elements.

    ``scale``: the format scales are stored in. Those in f8e4m3 are multiples of one f32 of the tensor's own (NVFP4)."""

    format: Format
    block: int = TENSOR
    symmetric: bool = True
    scale: Float = F32

    def __str__(self) -> str:
        grain = {TENSOR: "tensor", CHANNEL: "channel"}.get(self.block, f"block{self.block}")
        words = [str(self.format), grain, *([] if self.symmetric else ["asym"])]
        return "/".join(words if self.scale == F32 else [*words, str(self.scale)])

    @property
    def bits(self) -> float:
        """Bits an element takes with its share of its block's scale and zero point; a scale a channel isn't counted."""
        zero = 0 if self.symmetric else self.format.bits
        return self.format.bits + ((self.scale.bits + zero) / self.block if self.block > 0 else 0.0)


@dataclass(frozen=True)
class QParams:
    """A fitted mapping. ``scale`` f32 and ``zero_point`` int32 have the same shape, as ONNX wants it:

    [] per tensor, [channels] along ``axis`` per channel, and per block the tensor's own shape with ``ceil(n / block)``
    in place of the n of ``axis``. ``codes`` are the smallest and largest code used where they aren't
    ``code_range(quant)``: all of a small format. ``scale`` is a number of the format ``quant.scale`` times
    ``tensor_scale``, which is 1 unless that format is f8e4m3.
    """

    quant: Quant
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    axis: int | None = None
    codes: tuple[int, int] | None = None
    tensor_scale: float = 1.0

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code used."""
        return self.codes or code_range(self.quant)


@dataclass(frozen=True)
class Coded:
    """A constant ready to be stored: its mapping and ``codes`` of its elements, which may be rounded in any way; they
    are kept in ``code_type``, not in the int32 that rounding computes in, which takes as much as the real weights."""

    params: QParams
    codes: NDArray[np.integer]

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes", self.codes.astype(code_type(self.params.quant), copy=False))


def parse_quant(text: str) -> Quant:
    """``u8/tensor/asym``, ``i8/channel``, ``u4/block32/asym``, ``f4e2m1/block32/e8m0`` or a name of ALIASES -> Quant.

    Raises RecipeError on anything else, and on what has no meaning: floats or few-bit scales with a zero point."""
    head, *rest = ALIASES.get(text, text).split("/")
    block, symmetric, scale = TENSOR, True, F32
    for word in rest:
        if word == "tensor":
            block = TENSOR
        elif word == "channel":
            block = CHANNEL
        elif word.startswith("block") and word[5:].isdigit() and int(word[5:]) > 0:
            block = int(word[5:])
        elif word in ("asym", "sym"):
            symmetric = word == "sym"
        elif word in SCALES:
            scale = SCALES[word]
        else:
            raise RecipeError(
                f"unknown word {word!r} in {text!r}",
                hint="use FORMAT/tensor|channel|blockN[/asym][/f16|bf16|f8e4m3|e8m0]",
            )
    quant = Quant(parse_format(head), block, symmetric, scale)
    if not symmetric and (isinstance(quant.format, Float) or scale in (E4M3, E8M0)):
        raise RecipeError(f"{text!r} can't be asym: only integers with f32, f16 or bf16 scales have a zero point")
    return quant


def code_range(quant: Quant) -> tuple[int, int]:
    """Smallest and largest code of a mapping. Symmetric ones drop the lowest, so that -x mirrors x: i8 has -127…127,
    u8 has 1…255 about the zero point 128."""
    if not isinstance(quant.format, Int):
        raise TypeError(f"{quant} has no integer codes")
    lo, hi = quant.format.lo, quant.format.hi
    return (lo + 1, hi) if quant.symmetric else (lo, hi)


def code_type(quant: Quant) -> np.dtype[Any]:
    """The narrowest numpy type that holds the codes of a mapping; codes of floats are their bits, of f32 signed."""
    form = quant.format
    signed = form.signed if isinstance(form, Int) else form == F32
    size = next(size for size in (1, 2, 4) if form.bits <= 8 * size)
    return np.dtype(f"{'i' if signed else 'u'}{size}")


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
    """Scales and zero points of ranges that hold 0, same shape as ``lo`` and ``hi``; an empty range gets MIN_SCALE.

    Floats of 16 bits and more hold what weights are as it is: their scale is 1."""
    if isinstance(quant.format, Float):
        scale = np.maximum(np.maximum(-lo, hi) / largest(quant.format), MIN_SCALE)
        return scale if quant.format.bits < 16 else np.ones_like(scale), np.zeros_like(scale)
    span = 2 * np.maximum(-lo, hi) if quant.symmetric else hi - lo
    scale = np.maximum(span / steps(quant), MIN_SCALE)
    return scale, zero_point(lo, scale, quant)


def quantize(x: NDArray[np.floating], params: QParams) -> NDArray[np.int32]:
    """Real -> codes (int32, same shape), rounding half to even and clipping, as ONNX QuantizeLinear does."""
    scaled: NDArray[np.floating] = x / _spread(params.scale, params, x.shape)
    if isinstance(params.quant.format, Float):
        return encode(scaled, params.quant.format)
    lo, hi = params.code_range
    codes: NDArray[np.floating] = np.rint(scaled)
    # Whole numbers up to 2**24 are exact in float32; a 32-bit code needs float64 to be clipped at 2**31 - 1.
    zero = _spread(params.zero_point, params, x.shape)
    codes = codes + zero.astype(np.float64 if hi >= 1 << 24 else np.float32)
    clipped: NDArray[np.int32] = np.clip(codes, lo, hi).astype(np.int32)
    return clipped


def dequantize(codes: NDArray[np.integer], params: QParams) -> NDArray[np.float32]:
    """Codes -> real f32, same shape. 32-bit codes are rounded to f32 first, as ONNX DequantizeLinear does."""
    if isinstance(params.quant.format, Float):
        steps_from_zero = decode(codes, params.quant.format)
    else:
        steps_from_zero = codes.astype(np.float32) - _spread(params.zero_point, params, codes.shape).astype(np.float32)
    real: NDArray[np.float32] = steps_from_zero * _spread(params.scale, params, codes.shape)
    return real


def fake_quant(x: NDArray[np.floating], params: QParams) -> NDArray[np.float32]:
    """Real -> nearest representable real, same shape."""
    return dequantize(quantize(x, params), params)


def snap(scale: NDArray[np.float64], form: Float, tensor_scale: float = 1.0) -> NDArray[np.float32]:
    """The scales that can be stored for those wanted, same shape: the nearest, of e8m0 the next above; never 0."""
    if form == F32:
        return scale.astype(np.float32)
    return scale_reals(_scale_codes(scale / tensor_scale, form), form, tensor_scale)


def scale_codes(params: QParams) -> NDArray[np.int32]:
    """What is stored of the scales of a mapping, same shape: codes of the format of its scales."""
    return _scale_codes(params.scale.astype(np.float64) / params.tensor_scale, params.quant.scale)


def scale_reals(codes: NDArray[np.int32], form: Float, tensor_scale: float) -> NDArray[np.float32]:
    """Stored scales -> f32 scales, same shape; one rounding, as a Mul of f32 does."""
    return decode(codes, form) * np.float32(tensor_scale)


def _scale_codes(wanted: NDArray[np.float64], form: Float) -> NDArray[np.int32]:
    if form == E8M0:  # 2**e has the code e + 127; what lies a rounding above a power of two is that power
        exponent = np.frexp(np.abs(wanted) * (1 - 2.0**-22))[1]
        powers: NDArray[np.int32] = np.clip(exponent + 127, 1, 254).astype(np.int32)
        return powers
    codes = encode(wanted, form)
    smallest = np.where(wanted < 0, 1 | 1 << (form.bits - 1), 1).astype(np.int32)
    nonzero: NDArray[np.int32] = np.where(decode(codes, form) == 0, smallest, codes)
    return nonzero


def _spread(values: NDArray[Any], params: QParams, shape: tuple[int, ...]) -> NDArray[Any]:
    """A scale or zero point in a shape that broadcasts against a tensor of ``shape``."""
    if values.ndim == 0 or params.axis is None:
        return values
    if params.quant.block > 0:
        every = np.repeat(values, params.quant.block, params.axis)
        return np.take(every, np.arange(shape[params.axis]), params.axis)  # the last block may be short
    return values.reshape([-1 if axis == params.axis % len(shape) else 1 for axis in range(len(shape))])
