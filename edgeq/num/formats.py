"""Number formats as finite grids (L1).

``Int`` and ``Float`` say which real numbers a format holds when its scale is 1; how a tensor is mapped on it is
``quant.Quant``. One text form is used in recipes, targets, reports and errors: ``u8``, ``i4``, ``f16``, ``f8e4m3``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgeq.errors import RecipeError


@dataclass(frozen=True)
class Int:
    """Two's complement (``signed``) or unsigned integers of ``bits`` bits."""

    bits: int
    signed: bool

    @property
    def lo(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def hi(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    def __str__(self) -> str:
        return f"{'i' if self.signed else 'u'}{self.bits}"


@dataclass(frozen=True)
class Float:
    """A binary floating format: a sign bit if ``signed``, ``exp`` exponent and ``man`` mantissa bits."""

    exp: int
    man: int
    signed: bool = True

    @property
    def bits(self) -> int:
        return int(self.signed) + self.exp + self.man

    def __str__(self) -> str:
        named = {(8, 23): "f32", (5, 10): "f16", (8, 7): "bf16", (8, 0): "e8m0"}
        return named.get((self.exp, self.man), f"f{self.bits}e{self.exp}m{self.man}")


Format = Int | Float

F32, F16, BF16 = Float(8, 23), Float(5, 10), Float(8, 7)
E4M3, E5M2 = Float(4, 3), Float(5, 2)  # OCP FP8; E4M3 is ONNX's FLOAT8E4M3FN: no infinity, largest 448
E2M3, E3M2, E2M1 = Float(2, 3), Float(3, 2), Float(2, 1)  # OCP FP6 and FP4: neither infinity nor NaN
E8M0 = Float(8, 0, signed=False)  # powers of two from 2**-127: OCP's scale of MX blocks, no format of data


def parse_format(text: str) -> Format:
    """``u8``, ``i4``, ``f32``, ``f16``, ``bf16``, ``f8e4m3`` … -> Format. Raises RecipeError on anything else."""
    if match := re.fullmatch(r"([iu])(2|4|8|16|32)", text):
        return Int(int(match[2]), match[1] == "i")
    for known in (F32, F16, BF16, E4M3, E5M2, E2M3, E3M2, E2M1):
        if text == str(known):
            return known
    raise RecipeError(
        f"unknown number format {text!r}",
        hint="use i2…i16, u2…u16, f32, f16, bf16, f8e4m3, f8e5m2, f6e2m3, f6e3m2, f4e2m1",
    )
