"""Does a rewritten model still compute what it computed before? Asked on real samples, answered per output (L6).

Both models run in ONNX Runtime with its own optimizations off, so that the rewrite is compared and not the runtime. A
rewrite that keeps the function moves float outputs by rounding only: a sum of K products in another order differs by
about ``sqrt(K) u`` of its size (u = 2^-24, K up to 4608 in a 3x3 Conv of 512 channels: 4e-6), and D layers with
independent errors by sqrt(D) of that (D = 200: 6e-5). Differences of like numbers inside lose more: a variance written
as ``E[x^2] - E[x]^2`` loses the factor 16 where the mean is four deviations (Magika's layer norms: 1.1e-4 at the end).
``TOLERANCE`` is the product. Where an output amplifies rounding (a Sigmoid far from 0, a logarithm), what the runtime's
own optimizations move it by is measured, and ``SLACK`` times that is allowed. Wrong rewrites move outputs by 1e-2 and
more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.errors import ModelError, SampleError
from edgeq.rewrite.share import RANDOM
from edgeq.run.record import Feed
from edgeq.run.session import Level, open_session, run_session

Check = Callable[[ir.Model], str]
"""Model -> why it isn't the reference, or an empty string."""

TOLERANCE: dict[np.dtype[Any], float] = {
    np.dtype(np.float64): 1e-3,  # weights and inner nodes are float32 as a rule
    np.dtype(np.float32): 1e-3,
    np.dtype(np.float16): 1e-2,  # u = 2^-11: one rounding of the output is 5e-4, few layers add up
    np.dtype(ml_dtypes.bfloat16): 5e-2,  # u = 2^-8
}
"""Distance allowed between two values, relative to the sum of the value's size and its output's rms."""

SLACK = 16
"""Times the distance between the unoptimized and the optimized reference. Both it and a rewrite are one draw each of
rounding errors of the same kind; the largest of 10^6 normal draws is 5 standard deviations, the typical 0.7."""

FLOOR = 1e-7
"""Allowed in any case, in units of the output: exact zeros may become the rounding noise of values around 1."""


Outputs = dict[str, NDArray[Any]]


def preserves(reference: ir.Model, feeds: Sequence[Feed]) -> Check:
    """A check against the outputs of ``reference`` on ``feeds``. Those of a model with random ops are compared in
    dtype and shape alone."""
    expected = _run(reference, feeds, "none")
    random = any(node.op_type in RANDOM - {"Dropout"} for node in reference.graph.all_nodes())

    @functools.cache
    def noise() -> dict[str, float]:
        optimized = _run(reference, feeds, "all")
        pairs = list(zip(expected, optimized, strict=True))
        return {name: max(_distance(a[name], b[name]) for a, b in pairs) for name in expected[0]}

    def check(candidate: ir.Model) -> str:
        try:
            found = _run(candidate, feeds, "none")
        except (ModelError, SampleError) as error:
            return error.message
        for before, after in zip(expected, found, strict=True):
            for name in before:
                fault = _changed_type(name, before[name], after.get(name))
                if not fault and not random and excess(before[name], after[name]) > 1:
                    times = excess(before[name], after[name], SLACK * noise()[name])
                    fault = f"output {name!r} moves by {times:.3g} times what rounding explains" if times > 1 else ""
                if fault:
                    return fault
        return ""

    return check


def _run(model: ir.Model, feeds: Sequence[Feed], level: Level) -> list[Outputs]:
    session = open_session(model, level=level)
    return [run_session(session, feed) for feed in feeds]


def _changed_type(name: str, before: NDArray[Any], after: NDArray[Any] | None) -> str:
    if after is None:
        return f"output {name!r} is gone"
    if before.dtype != after.dtype or before.shape != after.shape:
        return f"output {name!r} is {after.dtype}{list(after.shape)}, was {before.dtype}{list(before.shape)}"
    return ""


def _distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Largest absolute difference where both are finite numbers."""
    if a.shape != b.shape or a.dtype not in TOLERANCE:
        return 0.0
    with np.errstate(invalid="ignore"):
        difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return float(difference[np.isfinite(difference)].max(initial=0.0))


def excess(before: NDArray[Any], after: NDArray[Any], noise: float = 0.0) -> float:
    """Largest distance of two equally shaped arrays in units of what is allowed (an absolute ``noise`` on top); at most
    1 means equal. NaN equals NaN, an infinity equals itself, and what isn't float has to be equal: infinity where that
    fails."""
    if before.dtype not in TOLERANCE:
        return 0.0 if bool((before == after).all()) else np.inf
    a, b = before.astype(np.float64), after.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if bool(same.all()):
        return 0.0
    finite = np.isfinite(a)
    rms = float(np.sqrt(np.mean(np.square(a[finite])))) if finite.any() else 0.0
    a, b = a[~same], b[~same]
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return np.inf
    return float((np.abs(a - b) / (FLOOR + noise + TOLERANCE[before.dtype] * (rms + np.abs(a)))).max())
