"""By how much a layer's outputs are off on the whole, so that its bias can make up for it (L1).

The mean error is the wrong answer where quantization cuts rare large values: a few positions of MobileNetV2's last
blocks lose nine tenths of what they hold, and a bias that makes up for their share of the mean moves all others (16
samples: 19.2 -> 16.2 dB on the outputs, 64 samples: 12.5 dB). So what is far from the rest is left out, and what
samples don't agree on is not believed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TRIM = 0.1  # share of a channel's errors left out at each end
LEAST_SHARE = 0.01  # of a channel's positions that must count: the few of a channel cut nearly everywhere say little

F32 = NDArray[np.float32]


def shift(errors: Sequence[F32]) -> F32:
    """Errors f32[positions, C] of each sample, NaN where one doesn't count -> the shift f32[C] that removes them.

    The trimmed mean over all positions, shrunk by ``max(0, 1 - 1 / t**2)`` (James and Stein 1961, positive part), where
    t is the shift over its standard error. Samples make the standard error: positions of one are no independent draws.
    """
    together = np.sort(np.concatenate(errors), axis=0)  # NaN last
    counts = np.isfinite(together).sum(axis=0)
    out = (TRIM * counts).astype(np.intp)
    low, high = (np.take_along_axis(together, at[None], 0)[0] for at in (out, np.maximum(counts - 1 - out, 0)))
    inside = [(one >= low) & (one <= high) for one in errors]  # never true beside NaN
    sums = np.array([np.where(here, one, 0).sum(0, np.float64) for one, here in zip(errors, inside, strict=True)])
    used = np.array([here.sum(0) for here in inside])
    shifts = sums.sum(0) / np.maximum(used.sum(0), 1)
    samples = (used > 0).sum(0)
    apart = np.where(used > 0, sums / np.maximum(used, 1) - shifts, 0)
    variance = np.square(apart).sum(0) / np.maximum(samples - 1, 1) / np.maximum(samples, 1)
    believed = np.maximum(0, 1 - variance / np.maximum(np.square(shifts), np.finfo(np.float64).tiny))
    known = (samples > 1) & (counts >= LEAST_SHARE * len(together))
    return np.where(known, shifts * believed, 0).astype(np.float32)
