"""Pictures as model inputs, to the bit the same on every machine (L4, stands alone).

Own resampling instead of Pillow's, whose results depend on its version (13 swaps the order of the two passes where one
shrinks more). Each pass does what Pillow's does: weights in whole numbers of 2**-22, sums rounded to the nearest level.
The width is always brought to size first. The loaders in C++, JavaScript, Kotlin and Swift compute the same integers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

PRECISION = 22  # bits of a resampling weight: 8 bits of a pixel and a sign fit beside them into 32
FILTERS: dict[str, tuple[float, Callable[[Any], Any]]] = {  # name -> (support, weight at a distance)
    "box": (0.5, lambda x: np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)),
    "bilinear": (1.0, lambda x: np.maximum(1 - abs(x), 0)),
    "hamming": (1.0, lambda x: np.where(abs(x) < 1, np.sinc(x) * (0.54 + 0.46 * np.cos(np.pi * x)), 0)),
    "bicubic": (2.0, lambda x: np.where(abs(x) < 1, _near(abs(x)), np.where(abs(x) < 2, _far(abs(x)), 0))),
    "lanczos": (3.0, lambda x: np.where(abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)),
}


def _near(x: Any) -> Any:
    """Bicubic with a = -1/2, below 1."""
    return (1.5 * x - 2.5) * x * x + 1


def _far(x: Any) -> Any:
    """Bicubic with a = -1/2, from 1 to 2."""
    return ((2.5 - 0.5 * x) * x - 4) * x + 2


def preprocess(picture: Any, how: dict[str, Any]) -> Any:
    """Picture u8[h, w, 3] (RGB) or PIL image -> [1, c, h, w] or [1, h, w, c], f32 or u8."""
    pixels = np.asarray(picture.convert("RGB") if hasattr(picture, "convert") else picture, np.uint8)
    if how["channels"] == "L":
        pixels = ((pixels.astype(np.int64) @ (19595, 38470, 7471) + 0x8000) >> 16).astype(np.uint8)[:, :, None]
    if how["resize"] is not None:
        height, width = resized(pixels.shape[:2], how["resize"])
        pixels = resampled(resampled(pixels, width, 1, how["interpolation"]), height, 0, how["interpolation"])
    if how["crop"] is not None:
        pixels = cropped(pixels, *how["crop"])
    values: Any = pixels[:, :, ::-1] if how["channels"] == "BGR" else pixels
    scaled = values.astype(np.float32) * np.float32(how["scale"])
    scaled = (scaled - np.array(how["mean"], np.float32)) / np.array(how["std"], np.float32)
    made = scaled.astype(how.get("dtype", "float32"))  # uint8 where the model does the arithmetic
    return np.ascontiguousarray((made.transpose(2, 0, 1) if how["layout"] == "NCHW" else made)[None])


def resized(sides: Any, resize: Any) -> Any:
    """[height, width] after a resize to a shorter side, whose longer one torchvision truncates too, or to two sides."""
    return [int(resize * side / min(sides)) for side in sides] if isinstance(resize, int) else resize


def resampled(pixels: Any, size: int, axis: int, name: str) -> Any:
    """u8 pixels with one axis brought to ``size``."""
    found = pixels.shape[axis]
    if found == size:
        return pixels
    if name == "nearest":
        return pixels.take(np.minimum(((np.arange(size) + 0.5) * (found / size)).astype(np.int64), found - 1), axis)
    first, weights = _taps(found, size, name)
    shape = [-1 if i == axis else 1 for i in range(pixels.ndim)]
    sums: Any = np.int32(1 << (PRECISION - 1))
    for tap in range(weights.shape[1]):
        taken = pixels.take(np.minimum(first + tap, found - 1), axis).astype(np.int32)
        sums = sums + taken * weights[:, tap].reshape(shape)
    return np.clip(sums >> PRECISION, 0, 255).astype(np.uint8)


def _taps(found: int, size: int, name: str) -> tuple[Any, Any]:
    """The first pixel each new one is made of, i64[size], and the weights from there on, i32[size, taps]."""
    reach, weight = FILTERS[name]
    stretch = max(found / size, 1.0)
    centre = (np.arange(size) + 0.5) * (found / size)
    first = np.maximum((centre - reach * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + reach * stretch + 0.5).astype(np.int64), found)
    at = first[:, None] + np.arange(max(last - first))
    parts = np.where(at < last[:, None], weight((at - centre[:, None] + 0.5) / stretch), 0.0)
    sums = np.cumsum(parts, 1)[:, -1:]  # in order, as any language adds them
    parts = parts / sums * (1 << PRECISION)
    return first, np.trunc(parts + np.copysign(0.5, parts)).astype(np.int32)


def cropped(pixels: Any, height: int, width: int) -> Any:
    """Cut from the centre; outside the picture there are zeros. Halves are rounded to even, as torchvision does."""
    top, left = round((pixels.shape[0] - height) / 2), round((pixels.shape[1] - width) / 2)
    out = np.zeros((height, width, pixels.shape[2]), np.uint8)
    part = pixels[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    out[max(-top, 0) : max(-top, 0) + part.shape[0], max(-left, 0) : max(-left, 0) + part.shape[1]] = part
    return out


def canary_picture(height: int, width: int) -> Any:
    """u8[height, width, 3]: a picture any language can draw."""
    levels = (np.arange(height * width * 3, dtype=np.uint64) * 2654435761 % (1 << 32)) >> 24
    return levels.astype(np.uint8).reshape(height, width, 3)
