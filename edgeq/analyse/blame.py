"""Why an atom is sensitive: which of its tensors loses most by its own rounding, and what makes it lose it (L5).

Noise of inputs, weights and output adds up, each relative to its own power, so the tensor with the least signal to
noise of its own is the one to blame. What it loses is known from statistics and weights, without running anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgeq.analyse.encode import Encodings, root
from edgeq.analyse.place import Atom, Plan
from edgeq.analyse.stats import Stats
from edgeq.ir import query
from edgeq.ir.ops import OPS
from edgeq.num.predict import decibel, range_snr_db
from edgeq.num.quant import Coded, QParams, dequantize

OUTLIER = 4.0  # a channel is one when its largest value is so many times the median channel's


@dataclass(frozen=True)
class Loss:
    """What rounding one tensor of an atom costs it: ``snr_db`` of its own, and why in words."""

    what: str
    snr_db: float
    why: str

    def __str__(self) -> str:
        return f"{self.what} keep{'' if self.what.endswith('weights') else 's'} {self.snr_db:.1f} dB: {self.why}"


def blame(atom: Atom, plan: Plan, encodings: Encodings, stats: Mapping[str, Stats]) -> str:
    """A sentence on the tensor of an integer atom that loses most; empty where nothing is known."""
    outputs = () if atom.name in plan.bare else atom.outputs
    named = [("input", str(value.name)) for value in atom.inputs] + [("output", str(v.name)) for v in outputs]
    losses = [
        _activation(f"{role} {name!r}", stats[known], encodings.activations[name])
        for role, name in named
        if (known := root(name, plan.ties)) in stats
    ]
    losses += [_constant(atom, index, encodings.constants[atom.name, index]) for index in atom.constants]
    return str(min(losses, key=lambda loss: loss.snr_db)) if losses else ""


def _activation(what: str, seen: Stats, params: QParams) -> Loss:
    return Loss(what, range_snr_db(seen.histogram, params), _spread(seen, params))


def _spread(seen: Stats, params: QParams) -> str:
    """What of a tensor's values makes a scale coarse: few channels, rare large values, or the range being cut."""
    largest = max(abs(seen.min), abs(seen.max))
    rms = float(np.sqrt(seen.sum2 / max(seen.count, 1)))
    crest = f"its largest value is {largest / rms:.0f} times its RMS" if rms else "it is 0"
    if seen.channels is not None and seen.channels.absmax.size > 1:
        peaks = seen.channels.absmax
        outliers = int((peaks > OUTLIER * max(float(np.median(peaks)), 1e-30)).sum())
        if outliers:
            return f"{crest}, {outliers} of {peaks.size} channels make it so"
    low, high = ((code - int(params.zero_point)) * float(params.scale) for code in params.code_range)
    if largest > 1.05 * max(-low, high):
        return f"{crest}, and is clipped to {max(-low, high) / largest:.0%}"
    return crest


def _constant(atom: Atom, index: int, coded: Coded) -> Loss:
    array = query.constant(atom.head.inputs[index])
    assert array is not None, f"input {index} of {atom.name} is constant"
    wide = array.astype(np.float64)
    error = float(np.square(wide - dequantize(coded.codes, coded.params)).sum())
    what = "its weights" if OPS[atom.head.op_type].weight == index else f"its constant input {index}"
    power = float(np.square(wide).sum())
    crest = float(np.abs(wide).max(initial=0.0)) / np.sqrt(power / max(wide.size, 1)) if power else 0.0
    return Loss(what, decibel(power, error), f"{coded.params.quant}, the largest is {crest:.0f} times the RMS")
