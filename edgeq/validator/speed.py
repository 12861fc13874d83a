"""Latency, memory, load time and size of an artefact beside the best float configuration -> Checks (L8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgeq.ir import io
from edgeq.num.intervals import Interval
from edgeq.report.record import Check
from edgeq.report.rows import quantity
from edgeq.run.record import Feed, Timing
from edgeq.run.timing import Here, Stopwatch, TimedConfig, ratio, with_footprint
from edgeq.validator.limits import Limits, held

SPEED_CHECKS = ("latency_ratio", "latency_ms", "peak_memory_bytes", "load_ms", "first_run_ms")
SIZE_CHECKS = ("size_bytes", "size_ratio")
FOOTPRINTS = 3  # processes a footprint is taken from


@dataclass(frozen=True)
class Latency:
    """``timings``: configuration -> threads -> Timing, with "reference" the best float one at each thread count."""

    checks: tuple[Check, ...]
    timings: dict[str, dict[int, Timing]]


def latency(
    floats: Sequence[TimedConfig],
    artifact: TimedConfig,
    feeds: Sequence[Feed],
    *,
    threads: Sequence[int] = (1, 2),
    limits: Limits | None = None,
    max_seconds: float = 20.0,
    seed: int = 0,
    footprints: int = FOOTPRINTS,
    stopwatch: Stopwatch | None = None,
) -> Latency:
    """``artifact`` against the fastest of ``floats`` at each thread count, interleaved; footprints at the first count.

    ``footprints`` is how many processes measure each footprint, ``stopwatch`` where: on this machine without one.

    Checks are ``latency_ratio``, ``latency_ms`` at the first thread count and the same with ``_2t`` … at others. A
    limit of the user's holds for the value; without one, an artefact whose ratio may be 1 or less passes: two runs of
    one file differ by noise, and that must not fail.
    """
    limits, stopwatch = limits or {}, stopwatch or Here()
    timings: dict[str, dict[int, Timing]] = {"reference": {}, artifact.name: {}}
    checks = []
    for count in threads:
        run = stopwatch.compare([artifact, *floats], feeds, threads=count, max_seconds=max_seconds, seed=seed)
        best = min(floats, key=lambda config: run[config.name].median_ms)
        if count == threads[0]:
            for config in (artifact, best):
                run[config.name] = with_footprint(
                    run[config.name], stopwatch.memory(config, feeds[0], threads=count, repeats=footprints)
                )
            checks += _footprint_checks(run[artifact.name], run[best.name], limits)
        timings["reference"][count] = run[best.name]
        for name, timing in run.items():
            timings.setdefault(name, {})[count] = timing
        suffix = "" if count == threads[0] else f"_{count}t"
        checks += _latency_checks(run[artifact.name], run[best.name], suffix, f"against {best.name}", limits)
    return Latency(tuple(checks), timings)


def _latency_checks(timing: Timing, best: Timing, suffix: str, note: str, limits: Limits) -> list[Check]:
    found = ratio(timing, best)
    laps, threads = len(timing.laps_ms), f"{timing.threads} thread{'s' if timing.threads > 1 else ''}"
    given = {f"{name}{suffix}": limits[name] for name in ("latency_ratio", "latency_ms") if name in limits}
    interval = Interval(found.value, found.low, found.high)
    check = held(f"latency_ratio{suffix}", interval, given, samples=laps, note=f"{note}, {threads}")
    if check.limit is None:
        check = replace(check, limit=1.0, passed=found.low <= 1.0)
    middle = Interval(timing.median_ms, None, None)
    return [check, held(f"latency_ms{suffix}", middle, given, unit="ms", samples=laps, note=f"median, {threads}")]


def _footprint_checks(timing: Timing, best: Timing, limits: Limits) -> list[Check]:
    rows = [
        ("peak_memory_bytes", "bytes", timing.peak_bytes, best.peak_bytes),
        ("load_ms", "ms", timing.load_ms, best.load_ms),
        ("first_run_ms", "ms", timing.first_ms, best.first_ms),
    ]
    return [
        held(name, Interval(float(value), None, None), limits, unit=unit, note=f"float: {quantity(float(other), unit)}")
        for name, unit, value, other in rows
        if value  # a browser doesn't tell its memory
    ]


def size(
    reference: Path, artifact: Path, limits: Limits | None = None, *, found: int | None = None
) -> tuple[Check, ...]:
    """``size_bytes`` of the artefact and ``size_ratio`` to the reference, external data included; ``found``: of an
    artefact of several files, counted already."""
    found, before = io.size_bytes(artifact) if found is None else found, io.size_bytes(reference)
    note = f"float: {quantity(before, 'bytes')}"
    return (
        held("size_bytes", Interval(float(found), None, None), limits or {}, unit="bytes"),
        held("size_ratio", Interval(found / before, None, None), limits or {}, note=note),
    )
