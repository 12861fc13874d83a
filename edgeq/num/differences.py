"""How one tensor differs between two computations of it from the same inputs, and what that looks like (L1).

Causes are told from the values: two roundings of one number lie at most a code apart and average out; a wrong scale
makes one set of values a multiple of the other, a wrong zero point shifts it, and what was cut off lies at the ends of
its type. A factor and an offset are fitted to what isn't at the ends, to the whole tensor first and then, since weights
have a scale a channel, to the worst index of each axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
F64 = NDArray[np.float64]
Pairs = Sequence[tuple[Array, Array]]

# Bytes of a float -> share of the largest value that sums in another order may move a result by: some hundred units in
# the last place, as a package's golden runs allow.
FLOATS = {2: 1e-2, 4: 1e-4, 8: 1e-4}
CODES = {1: 1.0, 2: 7.0}  # two roundings of one number; 16-bit codes come out of float kernels: 1e-4 of 65536
SHIFT = 0.75  # codes between the means: roundings of any kind (nearest, down, up) lie within half a code of the truth
FEWEST = 8  # values that a factor is fitted to
RESIDUE = 0.6  # codes, root mean square, that two roundings leave behind a fit: sqrt(1/12 + 1/12), with room
EXPLAINS = 0.4  # share of the largest difference that a factor or an offset must make: roundings are the rest
AT_ENDS = 0.5  # share of what differs that lies at an end of its type, where values were cut off
NOISE_DB = 20.0  # above it a difference without a pattern is one of precision


@dataclass(frozen=True)
class Difference:
    """``cause``: "" when equal, ``rounding`` when right kernels may differ by that, else what it looks like: ``scale``,
    ``zero point``, ``saturation``, ``precision``, ``not finite``, ``shape`` or ``unknown``. ``largest``: absolute, in
    codes of integers; ``share``: of the values that differ. ``off``: the indices of each axis, of those that have one
    size in all pairs, at which something differs beyond rounding."""

    cause: str
    why: str
    largest: float = 0.0
    share: float = 0.0
    off: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


def differ(pairs: Pairs) -> Difference:
    """What lies between the tensors of each pair, one computed here and one there; all of one dtype and rank."""
    if any(here.shape != there.shape or here.dtype != there.dtype for here, there in pairs):
        here, there = next((h, t) for h, t in pairs if h.shape != t.shape or h.dtype != t.dtype)
        why = f"{there.dtype}{list(there.shape)} there, {here.dtype}{list(here.shape)} here"
        return Difference("shape", why, np.inf, 1.0)
    kind = pairs[0][0].dtype
    wide = [(here.astype(np.float64), there.astype(np.float64)) for here, there in pairs]
    if kind.kind == "f" and (broken := sum(int(_unequally_finite(*pair).sum()) for pair in wide)):
        why = f"{broken} values are NaN or infinite on one side alone"
        return Difference("not finite", why, np.inf, broken / _count(wide))
    with np.errstate(invalid="ignore"):  # infinities less themselves
        gaps = [np.nan_to_num(np.abs(there - here)) for here, there in wide]
    largest = max(float(gap.max(initial=0.0)) for gap in gaps)
    share = sum(int(np.count_nonzero(gap)) for gap in gaps) / max(_count(wide), 1)
    if not largest:
        return Difference("", "")
    tolerance = _tolerance(wide, kind)
    ends = _ends(kind)
    if largest <= tolerance and abs(_shift(wide, ends)) < SHIFT:
        return Difference("rounding", _rounding(largest, share, kind), largest, share)
    cause, why = _cause(wide, tolerance, ends, kind)
    off = _off(gaps, min(tolerance, largest / 2))
    return Difference(cause, why + _where(off, gaps[0].shape), largest, share, off)


def _tolerance(pairs: Sequence[tuple[F64, F64]], kind: np.dtype[np.generic]) -> float:
    """What two right kernels may differ by; 0 for booleans and for integers that aren't codes."""
    if kind.kind != "f":
        return CODES.get(kind.itemsize, 0.0) if kind.kind in "iu" else 0.0
    peak = max(float(np.abs(here[np.isfinite(here)]).max(initial=0.0)) for here, _ in pairs)
    return FLOATS[kind.itemsize] * peak


def _ends(kind: np.dtype[np.generic]) -> tuple[float, float]:
    """The least and the largest code of a type; infinities for what isn't codes."""
    if kind.kind in "iu" and kind.itemsize in CODES:
        limits = np.iinfo(kind.name)
        return float(limits.min), float(limits.max)
    return -np.inf, np.inf


def _shift(pairs: Sequence[tuple[F64, F64]], ends: tuple[float, float]) -> float:
    """Mean difference in codes of what is at no end; 0 for floats, whose tolerance says it all."""
    if not np.isfinite(ends[0]):
        return 0.0
    here, there = _inner(pairs, ends)
    return float((there - here).mean()) if here.size else 0.0


def _inner(pairs: Sequence[tuple[F64, F64]], ends: tuple[float, float]) -> tuple[F64, F64]:
    """f64[n] here and there, of the finite values that neither side has at an end."""
    here, there = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    inside = (here > ends[0]) & (here < ends[1]) & (there > ends[0]) & (there < ends[1])
    return here[inside], there[inside]


def _cause(
    pairs: Sequence[tuple[F64, F64]], tolerance: float, ends: tuple[float, float], kind: np.dtype[np.generic]
) -> tuple[str, str]:
    for part in _parts(pairs):
        if found := _fitted(*_inner(part, ends), tolerance, kind):
            return found
    here, there = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    off = np.abs(there - here) > tolerance
    cut = float(((there == ends[0]) | (there == ends[1]))[off].mean()) if off.any() else 0.0
    if cut >= AT_ENDS:
        return "saturation", f"{cut:.0%} of what differs is at an end of {kind}: {ends[0]:.0f} or {ends[1]:.0f}"
    noise, power = float(np.square(there - here).mean()), float(here.var())
    decibel = 10 * np.log10(power / noise) if power and noise else 0.0
    if tolerance and decibel > NOISE_DB:
        return "precision", f"noise without a pattern, {decibel:.0f} dB below the values"
    return "unknown", "no one factor or offset explains it"


def _parts(pairs: Sequence[tuple[F64, F64]]) -> Iterator[Sequence[tuple[F64, F64]]]:
    """The whole, then along each axis the index that differs most."""
    yield pairs
    for axis in range(pairs[0][0].ndim):
        if len({here.shape[axis] for here, _ in pairs}) == 1 and pairs[0][0].shape[axis] > 1:
            others = tuple(other for other in range(pairs[0][0].ndim) if other != axis)
            worst = int(sum(np.abs(there - here).sum(axis=others) for here, there in pairs).argmax())
            yield [(np.asarray(here.take(worst, axis)), np.asarray(there.take(worst, axis))) for here, there in pairs]


def _fitted(here: F64, there: F64, tolerance: float, kind: np.dtype[np.generic]) -> tuple[str, str] | None:
    """``scale`` or ``zero point`` where ``there`` is a factor times ``here`` plus an offset; None where it isn't."""
    if here.size < FEWEST or np.array_equal(here, there):
        return None
    spread = float(here.std())
    factor = float(((here - here.mean()) * (there - there.mean())).mean()) / spread**2 if spread else 1.0
    residue = float((there - there.mean() - factor * (here - here.mean())).std())
    allowed = (RESIDUE if kind.kind in "iu" else tolerance) * max(1.0, abs(factor))
    if residue > allowed:
        return None
    least = EXPLAINS * float(np.abs(there - here).max())
    if abs(factor - 1.0) * float(np.abs(here - here.mean()).max()) >= least:
        return "scale", f"the values are {factor:.4g} times those here"
    unit, offset = " codes" if kind.kind in "iu" else "", float((there - here).mean())
    if abs(offset) < max(least, SHIFT if unit else 0.0):
        return None
    return "zero point", f"the values are {abs(offset):.4g}{unit} {'above' if offset > 0 else 'below'} those here"


def _off(gaps: Sequence[F64], tolerance: float) -> dict[int, tuple[int, ...]]:
    found = {}
    for axis in range(gaps[0].ndim):
        if len({gap.shape[axis] for gap in gaps}) == 1:
            others = tuple(other for other in range(gaps[0].ndim) if other != axis)
            touched = np.any([(gap > tolerance).any(axis=others) for gap in gaps], axis=0)
            found[axis] = tuple(np.flatnonzero(touched).tolist())
    return found


def _unequally_finite(here: F64, there: F64) -> NDArray[np.bool_]:
    same = (here == there) | (np.isnan(here) & np.isnan(there))
    return np.asarray(~same & ~(np.isfinite(here) & np.isfinite(there)))


def _count(pairs: Sequence[tuple[F64, F64]]) -> int:
    return sum(here.size for here, _ in pairs)


def _rounding(largest: float, share: float, kind: np.dtype[np.generic]) -> str:
    size = f"at most {largest:.0f} code{'s' * (largest > 1)}" if kind.kind in "iu" else f"at most {largest:.2g}"
    return f"{size} in {share:.2%} of the values"


def _where(off: Mapping[int, tuple[int, ...]], shape: tuple[int, ...]) -> str:
    """The few indices of an axis that hold all that differs, where there are such."""
    if not off:
        return ""
    axis = min(off, key=lambda one: len(off[one]) / shape[one])
    few = len(off[axis]) <= 4 and len(off[axis]) < shape[axis]
    return f", at {', '.join(map(str, off[axis]))} of axis {axis} alone" if few else ""
