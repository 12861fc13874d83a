"""What a run of a minute says that one of seconds doesn't: throttling, and joules where a device counts them (L4).

Energy is read off the kernel's own counters: RAPL's of processor packages, else a battery's gauge while it discharges.
Where there is none, or it can't be read, that is what is said; nothing is estimated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.run.timing import Ratio

PARTS = 4  # of the windows; the first and the last are compared: heat takes its time
BLOCKS = 20  # of laps in each, whose medians are what varies: neighbouring laps aren't independent
THROTTLED = 1.05  # slower by more than this is no noise of a quiet machine
JOULES_PER_WH = 3600.0


@dataclass(frozen=True)
class Energy:
    """``joules`` in all and where they were read; None with the reason why not in ``source``."""

    joules: float | None
    source: str


@dataclass(frozen=True)
class Sustained:
    """A model run back to back. ``windows``: at_s, laps, p50_ms, p90_ms and what was told of clocks (mean MHz), heat
    (hottest zone) and governor. ``ratio``: median latency of the last quarter over that of the first."""

    seconds: float
    threads: int
    laps: int
    windows: tuple[dict[str, Any], ...]
    early_ms: float
    late_ms: float
    ratio: Ratio
    energy: Energy

    @property
    def throttled(self) -> bool:
        """Whether it surely became slower, by more than ``THROTTLED``."""
        return self.ratio.low > THROTTLED

    @property
    def joules_per_run(self) -> float | None:
        return None if self.energy.joules is None else self.energy.joules / self.laps


def sustained_of(found: Mapping[str, Any], threads: int) -> Sustained:
    """What a device gave for the task ``sustained`` -> Sustained."""
    windows: list[Mapping[str, Any]] = found["windows"]
    part = max(len(windows) // PARTS, 1)
    early, late = (np.concatenate([window["laps_ms"] for window in some]) for some in (windows[:part], windows[-part:]))
    return Sustained(
        seconds=float(windows[-1]["at_s"]), threads=threads, laps=sum(len(window["laps_ms"]) for window in windows),
        windows=tuple(map(_window, windows)),
        early_ms=float(np.median(early)), late_ms=float(np.median(late)), ratio=_ratio(late, early),
        energy=energy([found["before"], *windows]),
    )  # fmt: skip


def _window(window: Mapping[str, Any]) -> dict[str, Any]:
    laps = np.asarray(window["laps_ms"], np.float64)
    middle, slow = np.percentile(laps, [50, 90]).tolist()
    row: dict[str, Any] = {"at_s": window["at_s"], "laps": len(laps), "p50_ms": middle, "p90_ms": slow}
    if window.get("mhz"):
        row["mhz"] = float(np.mean(window["mhz"]))
    if window.get("celsius"):
        row["celsius"] = max(window["celsius"].values())
    return row


def _ratio(late: NDArray[np.float64], early: NDArray[np.float64], resamples: int = 1000) -> Ratio:
    """Ratio of medians with a percentile bootstrap over blocks of neighbouring laps."""
    blocks = [np.array([np.median(block) for block in np.array_split(laps, min(BLOCKS, len(laps)))])
              for laps in (late, early)]  # fmt: skip
    rng = np.random.default_rng(0)
    a, b = (np.median(one[rng.integers(0, len(one), (resamples, len(one)))], axis=1) for one in blocks)
    low, high = np.percentile(a / b, [2.5, 97.5]).tolist()
    return Ratio(float(np.median(late) / np.median(early)), low, high)


# --- energy ----------------------------------------------------------------------------------------------------------


def energy(readings: Sequence[Mapping[str, Any]]) -> Energy:
    """Joules between the first and the last of readings ``{"at_s", "power": {"rapl", "batteries"}}``."""
    powers = [reading.get("power") for reading in readings]
    first = powers[0]
    if not first:
        return Energy(None, "a browser shows no energy")
    reasons = []
    if packages := _packages(first):
        if all(zone["energy_uj"] for power in powers if power for zone in _packages(power)):
            joules = _counted([_packages(power) for power in powers if power])
            return Energy(joules, f"RAPL of {', '.join(zone['name'] for zone in packages)}, idle power included")
        reasons.append("the RAPL counters can't be read by this user")
    for index, battery in enumerate(first["batteries"]):
        rows = [power["batteries"][index] for power in powers if power and len(power["batteries"]) > index]
        if {row["status"] for row in rows} != {"Discharging"}:
            reasons.append(f"the battery is {battery['status'].lower() or 'of unknown state'}, not discharging")
        elif (found := _drawn([float(reading["at_s"]) for reading in readings], rows)) is not None:
            return found
        else:
            reasons.append("the battery's gauge shows no current and didn't move")
    return Energy(None, "; ".join(reasons) or "no energy counter is exposed")


def _packages(power: Mapping[str, Any]) -> list[Mapping[str, str]]:
    """Whole processors: other zones are parts of them, or hold them."""
    return [zone for zone in power["rapl"] if zone["name"].startswith("package")]


def _counted(readings: Sequence[Sequence[Mapping[str, str]]]) -> float:
    """Joules of counters in microjoules, which begin anew beyond their range; read often enough to do so once."""
    total = 0
    for before, after in pairwise(readings):
        for one, other in zip(before, after, strict=True):
            step = int(other["energy_uj"]) - int(one["energy_uj"])
            total += step if step >= 0 else step + int(one["max_energy_range_uj"])
    return total / 1e6


def _drawn(times: Sequence[float], rows: Sequence[Mapping[str, str]]) -> Energy | None:
    """What left a battery: power over time where it shows power or current, else by its gauge. None where it tells
    nothing."""
    watts = [_watts(row) for row in rows]
    if all(value is not None for value in watts):
        joules = float(np.trapezoid([value for value in watts if value is not None], times))
        return Energy(joules, "the battery's power, the whole device included")
    levels = [_level(row) for row in rows]
    if levels[0] is not None and levels[-1] is not None and levels[0] > levels[-1]:
        return Energy(levels[0] - levels[-1], "the battery's gauge, which is coarse, the whole device included")
    return None


def _watts(row: Mapping[str, str]) -> float | None:
    if row["power_now"]:
        return abs(int(row["power_now"])) / 1e6
    if row["current_now"] and row["voltage_now"]:
        return abs(int(row["current_now"])) / 1e6 * int(row["voltage_now"]) / 1e6
    return None


def _level(row: Mapping[str, str]) -> float | None:
    """Joules left: µWh, or µAh at the voltage of now."""
    if row["energy_now"]:
        return int(row["energy_now"]) / 1e6 * JOULES_PER_WH
    if row["charge_now"] and row["voltage_now"]:
        return int(row["charge_now"]) / 1e6 * int(row["voltage_now"]) / 1e6 * JOULES_PER_WH
    return None
