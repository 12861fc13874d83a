"""Runs of a minute: what is told of latencies over time and of energy, from what kernels show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.run.device import agent, measure, open_device
from edgeq.run.device.sustained import energy, sustained_of
from edgeq.run.timing import TimedConfig
from tests import small_net

WINDOWS = 12


def told(laps: list[list[float]], **state: Any) -> dict[str, Any]:
    """A device's answer with these laps by window, five seconds each, and the same state around all."""
    windows = [{"laps_ms": one, "at_s": 5.0 * (index + 1), **state} for index, one in enumerate(laps)]
    return {"before": {"at_s": 0.0, **state}, "windows": windows}


def laps(median: float, count: int, seed: int) -> list[float]:
    return np.random.default_rng(seed).normal(median, 0.03 * median, count).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("rise", [0.0, 0.02, 0.2, 1.0])
def test_what_becomes_slower_throttles(rise: float) -> None:
    medians = [10 * (1 + rise * min(index / 6, 1)) for index in range(WINDOWS)]
    found = sustained_of(told([laps(median, 200, i) for i, median in enumerate(medians)]), threads=2)
    assert found.throttled == (rise > 0.1)
    first = 1 + rise / 6  # the median of the first three windows is that of the second
    assert found.ratio.low <= (1 + rise) / first <= found.ratio.high
    assert found.ratio.high - found.ratio.low < 0.05 or rise > 0.1, "steep in the first windows is wide"
    assert (found.laps, found.seconds, len(found.windows)) == (WINDOWS * 200, 60.0, WINDOWS)
    assert found.energy.joules is None and found.joules_per_run is None


def test_a_stray_window_is_no_throttling() -> None:
    rows = [laps(10, 50, i) for i in range(WINDOWS)]
    rows[6] = laps(30, 50, 6)
    assert not sustained_of(told(rows), threads=1).throttled


def test_one_run_longer_than_it_all_is_told_as_it_is() -> None:
    found = sustained_of(told([[9000.0]]), threads=1)
    assert (found.laps, found.early_ms, found.late_ms, found.ratio.value) == (1, 9000.0, 9000.0, 1.0)


def test_clocks_and_heat_are_told_by_window() -> None:
    found = sustained_of(told([[1.0]] * WINDOWS, mhz=[1000.0, 2000.0], celsius={"cpu": 50.0, "gpu": 61.0}), threads=1)
    assert (found.windows[0]["mhz"], found.windows[0]["celsius"]) == (1500.0, 61.0)


# --- energy ----------------------------------------------------------------------------------------------------------


def sysfs(root: Path, files: Mapping[str, str]) -> dict[str, Any]:
    """What the agent reads of a tree like /sys/class."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return agent.power(root)


def test_rapl_counts_packages_alone_and_past_the_end_of_its_counter(tmp_path: Path) -> None:
    def reading(package: int, core: int) -> dict[str, Any]:
        return sysfs(tmp_path, {
            "powercap/intel-rapl:0/name": "package-0", "powercap/intel-rapl:0/energy_uj": str(package),
            "powercap/intel-rapl:0/max_energy_range_uj": "262143328850",
            "powercap/intel-rapl:0:0/name": "core", "powercap/intel-rapl:0:0/energy_uj": str(core),
            "powercap/intel-rapl:1/name": "psys", "powercap/intel-rapl:1/energy_uj": str(9 * package),
            "powercap/intel-rapl:1/max_energy_range_uj": "262143328850",
        })  # fmt: skip

    powers = [reading(262140000000, 5), reading(262143000000, 6), reading(1671150, 7)]
    found = energy([{"at_s": 5.0 * index, "power": power} for index, power in enumerate(powers)])
    assert found.joules == pytest.approx(5.0)
    assert found.source == "RAPL of package-0, idle power included"


def test_a_counter_nobody_may_read_is_told(tmp_path: Path) -> None:
    names = {"powercap/intel-rapl:0/name": "package-0", "powercap/intel-rapl:0/max_energy_range_uj": "1000"}
    power = sysfs(tmp_path, names)
    found = energy([{"at_s": 0.0, "power": power}, {"at_s": 5.0, "power": power}])
    assert found.joules is None and "can't be read" in found.source


BATTERY = {"power_supply/BAT0/type": "Battery", "power_supply/BAT0/status": "Discharging"}


@pytest.mark.parametrize(
    ("first", "last", "joules", "source"),
    [
        ({"current_now": "-500000", "voltage_now": "4000000"}, {}, 20.0, "the battery's power"),
        ({"power_now": "2000000"}, {"power_now": "4000000"}, 30.0, "the battery's power"),
        ({"energy_now": "40000000"}, {"energy_now": "39990000"}, 36.0, "gauge"),
        ({"charge_now": "3000000", "voltage_now": "4000000"}, {"charge_now": "2997500"}, 36.0, "gauge"),
        ({"energy_now": "40000000"}, {}, None, "didn't move"),
        ({"status": "Charging", "power_now": "2000000"}, {}, None, "the battery is charging"),
    ],
)
def test_a_battery_tells_what_was_drawn(
    first: dict[str, str], last: dict[str, str], joules: float | None, source: str, tmp_path: Path
) -> None:
    def reading(files: Mapping[str, str]) -> dict[str, Any]:
        return sysfs(tmp_path, {f"power_supply/BAT0/{name}": text for name, text in files.items()})

    sysfs(tmp_path, BATTERY | {"power_supply/AC/type": "Mains"})
    found = energy([{"at_s": 0.0, "power": reading(first)}, {"at_s": 10.0, "power": reading(last)}])
    assert found.joules == (None if joules is None else pytest.approx(joules))
    assert source in found.source


def test_nothing_is_told_where_nothing_is_counted(tmp_path: Path) -> None:
    power = sysfs(tmp_path, {})
    assert energy([{"at_s": 0.0, "power": power}] * 2).source == "no energy counter is exposed"
    assert energy([{"at_s": 0.0}] * 2).source == "a browser shows no energy"


@pytest.mark.slow
def test_this_machine_runs_a_model_as_long_as_asked(tmp_path: Path) -> None:
    net, *_ = small_net.write(tmp_path)
    with open_device("local") as device:
        found = measure.sustained(device, TimedConfig("net", net), [{"image": small_net.images(1, 3)}], seconds=2)
    assert 2.0 <= found.seconds < 4.0 and len(found.windows) == WINDOWS
    assert found.laps > 100 and sum(window["laps"] for window in found.windows) == found.laps
