"""Codes of 2, 4 and 6 bits as bytes, in ONNX's order: a stream of bits, the lowest first (L1)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def group(bits: int) -> tuple[int, int]:
    """How many codes fill how many bytes exactly: 2 bits (4, 1), 4 bits (2, 1), 6 bits (4, 3), 8 bits (1, 1)."""
    shared = math.gcd(bits, 8)
    return 8 // shared, bits // shared


def pack(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Integers [..., n], two's complement where negative -> uint8[..., groups, bytes of a group], zeros at the end."""
    count, size = group(bits)
    padded = np.pad(codes.astype(np.uint32), [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % count)])
    words = padded.reshape(*codes.shape[:-1], -1, count, 1) & ((1 << bits) - 1)
    word = (words << (bits * np.arange(count, dtype=np.uint32)[:, None])).sum(-2, dtype=np.uint32)
    packed: NDArray[np.uint8] = (word >> (8 * np.arange(size, dtype=np.uint32)) & 255).astype(np.uint8)
    return packed
