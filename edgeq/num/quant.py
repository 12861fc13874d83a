"""Mapping of real tensors on a format: ``real = (code - zero_point) * scale`` (L1).

Symmetry belongs to the mapping, not to the integers: ``i8/channel`` is symmetric, ``u8/tensor/asym`` is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import RecipeError
from edgeq.num.formats import Format, Int, parse_format

TENSOR, CHANNEL = 0, -1


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
    """A fitted mapping. ``scale`` f32 and ``zero_point`` int32, both [] per tensor or [channels] along ``axis``."""

    quant: Quant
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    axis: int | None = None


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
    """Smallest and largest code used. Symmetric signed integers drop the lowest code so that -x mirrors x."""
    if not isinstance(quant.format, Int):
        raise TypeError(f"{quant} has no integer codes")
    lo, hi = quant.format.lo, quant.format.hi
    return (-hi, hi) if quant.symmetric and quant.format.signed else (lo, hi)


def _spread(values: NDArray[np.generic], axis: int | None, rank: int) -> NDArray[np.generic]:
    """[channels] -> shape that broadcasts along ``axis`` of a tensor of ``rank``."""
    if values.ndim == 0 or axis is None:
        return values
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def quantize(x: NDArray[np.floating], params: QParams) -> NDArray[np.int32]:
    """Real -> codes (int32, same shape), rounding half to even and clipping, as ONNX QuantizeLinear does."""
    lo, hi = code_range(params.quant)
    scale = _spread(params.scale, params.axis, x.ndim)
    zero = _spread(params.zero_point, params.axis, x.ndim)
    return np.clip(np.rint(x / scale) + zero, lo, hi).astype(np.int32)


def dequantize(codes: NDArray[np.integer], params: QParams) -> NDArray[np.float32]:
    """Codes -> real f32, same shape."""
    scale = _spread(params.scale, params.axis, codes.ndim)
    zero = _spread(params.zero_point, params.axis, codes.ndim)
    return ((codes.astype(np.int32) - zero) * scale).astype(np.float32)


def fake_quant(x: NDArray[np.floating], params: QParams) -> NDArray[np.float32]:
    """Real -> nearest representable real, same shape."""
    return dequantize(quantize(x, params), params)
