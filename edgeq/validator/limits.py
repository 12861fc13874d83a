"""A measured value held to its limit (L8)."""

from __future__ import annotations

from collections.abc import Mapping

from edgeq.num.intervals import Interval
from edgeq.report.record import Check

AT_LEAST = ("snr_db", "cosine", "exact_match", "agreement_top1", "top1")  # more is better; of all others less is

SLACK = 1e-9

Limits = Mapping[str, float]  # name of a check -> what it is held to


def held(
    name: str,
    interval: Interval,
    limits: Limits,
    *,
    unit: str = "",
    samples: int = 0,
    note: str = "",
    at_least: bool = False,
) -> Check:
    """A Check held to its limit, if it has one. NaN meets no limit."""
    limit, least = limits.get(name), at_least or name in AT_LEAST
    # One sample of 200 is a drop of .005 and a bit in floating point: what meets a limit to the last digits meets it.
    passed = limit is None or bool((interval.value - limit) * (1 if least else -1) >= -SLACK * max(abs(limit), 1.0))
    return Check(
        name,
        interval.value,
        unit,
        interval.low,
        interval.high,
        limit,
        "min" if least else "max",
        passed,
        samples,
        note,
    )
