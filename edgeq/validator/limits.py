"""A measured value held to its limit (L8)."""

from __future__ import annotations

from collections.abc import Mapping

from edgeq.num.intervals import Interval
from edgeq.report.record import Check

AT_LEAST = ("snr_db", "cosine", "exact_match", "agreement_top1", "top1")  # more is better; of all others less is

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
    passed = limit is None or bool(interval.value >= limit if least else interval.value <= limit)
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
