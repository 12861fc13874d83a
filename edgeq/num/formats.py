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
    """A binary floating format: 1 sign bit, ``exp`` exponent and ``man`` mantissa bits."""

    exp: int
    man: int

    @property
    def bits(self) -> int:
        return 1 + self.exp + self.man

    def __str__(self) -> str:
        named = {(8, 23): "f32", (5, 10): "f16", (8, 7): "bf16"}
        return named.get((self.exp, self.man), f"f{self.bits}e{self.exp}m{self.man}")


Format = Int | Float

F32, F16, BF16 = Float(8, 23), Float(5, 10), Float(8, 7)


def parse_format(text: str) -> Format:
    """``u8``, ``i4``, ``f32``, ``f16``, ``bf16``, ``f8e4m3`` … -> Format. Raises RecipeError on anything else."""
    if match := re.fullmatch(r"([iu])(2|4|8|16|32)", text):
        return Int(int(match[2]), match[1] == "i")
    for known in (F32, F16, BF16, Float(4, 3), Float(5, 2), Float(2, 1), Float(3, 2), Float(2, 3)):
        if text == str(known):
            return known
    raise RecipeError(f"unknown number format {text!r}", hint="use i2…i16, u2…u16, f32, f16, bf16, f8e4m3, f4e2m1")
