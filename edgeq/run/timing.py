"""How fast several files run, compared fairly, and what one costs in memory (L4).

Everything is measured in a process of its own, so that this one's heap, caches and threads don't show. Configurations
take turns (A B A B, in random order each round) instead of one after the other: clock, heat and neighbours drift by
more than what is to be measured, and a pair of adjacent turns shares them. The first lap of a turn is dropped: it pays
for the caches the others took.

All sessions share one process-wide thread pool. With a pool each, threads of the resting session spin on the cores
(EfficientNet-Lite0, 2 threads on 2 cores, median ms: one session alone 7.6, two with own pools 15.6 each, two without
spinning 9.9, two on the shared pool 7.3, one alone on it 7.3; ONNX Runtime 1.32), so only the shared pool gives what
an app with one model sees.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

from edgeq import errors
from edgeq.errors import RuntimeUnavailableError, SampleError, UsageError
from edgeq.run.record import Feed, Timing
from edgeq.run.session import Level, timing_of
from edgeq.target.environment import python_for
from edgeq.target.record import CPU, Provider


@dataclass(frozen=True)
class TimedConfig:
    """A model file with the session settings it is timed under."""

    name: str
    path: Path
    level: Level = "all"
    config: Mapping[str, str] = field(default_factory=dict)
    provider: Provider = CPU


@dataclass(frozen=True)
class Footprint:
    """What loading and running a model once costs a fresh process.

    ``peak_bytes`` is the highest resident memory above that of the process with the runtime imported and the inputs
    in memory. ``first_ms`` is the first run, which also allocates and packs.
    """

    peak_bytes: int
    load_ms: float
    first_ms: float


@dataclass(frozen=True)
class Ratio:
    """``value`` times as long as the reference; ``low``/``high`` bound it at 95 %."""

    value: float
    low: float
    high: float


def compare(
    configs: Sequence[TimedConfig],
    feeds: Sequence[Feed],
    *,
    threads: int = 1,
    warmup: int = 3,
    rounds: int = 10,
    min_seconds: float = 0.5,
    max_seconds: float = 20.0,
    precision: float = 0.015,
    seed: int = 0,
) -> dict[str, Timing]:
    """Latency of ``configs`` on ``feeds`` (taken in turn), interleaved in one fresh process.

    Runs at least ``rounds`` rounds and ``min_seconds``, then until every ratio to the first configuration is known to
    ± ``precision`` (95 %) or ``max_seconds`` are over. Raises what loading raises, and RuntimeUnavailableError when
    the process dies.
    """
    if len({config.name for config in configs}) != len(configs) or not configs:
        raise UsageError(f"names of timed configurations must differ, found {[config.name for config in configs]}")
    job = {
        "threads": threads,
        "warmup": warmup,
        "rounds": rounds,
        "min_seconds": min_seconds,
        "max_seconds": max_seconds,
        "precision": precision,
        "seed": seed,
    }
    result = _in_worker("compare", configs, feeds, job)
    return {
        config.name: timing_of(
            result[config.name]["laps_ms"],
            threads=threads,
            warmup=warmup,
            first_ms=result[config.name]["first_ms"],
            load_ms=result[config.name]["load_ms"],
            laps_per_turn=result[config.name]["laps_per_turn"],
        )
        for config in configs
    }


def measure_memory(config: TimedConfig, feed: Feed, *, threads: int = 1, repeats: int = 3) -> Footprint:
    """Footprint of one configuration: median times and highest peak of ``repeats`` fresh processes."""
    runs = [_in_worker("memory", [config], [feed], {"threads": threads}) for _ in range(repeats)]
    return Footprint(
        max(int(run["peak_bytes"]) for run in runs),
        median(run["load_ms"] for run in runs),
        median(run["first_ms"] for run in runs),
    )


class Stopwatch(Protocol):
    """Where files are timed: ``compare`` and ``measure_memory`` of this module, or those of a device."""

    def compare(
        self, configs: Sequence[TimedConfig], feeds: Sequence[Feed], *, threads: int, max_seconds: float, seed: int
    ) -> dict[str, Timing]: ...

    def memory(self, config: TimedConfig, feed: Feed, *, threads: int, repeats: int) -> Footprint: ...


class Here:
    """This machine's."""

    def compare(self, configs: Sequence[TimedConfig], feeds: Sequence[Feed], **settings: Any) -> dict[str, Timing]:
        return compare(configs, feeds, **settings)

    def memory(self, config: TimedConfig, feed: Feed, **settings: Any) -> Footprint:
        return measure_memory(config, feed, **settings)


def with_footprint(timing: Timing, footprint: Footprint) -> Timing:
    """``timing`` with memory, load and first run as a process of its own measured them."""
    return replace(timing, peak_bytes=footprint.peak_bytes, load_ms=footprint.load_ms, first_ms=footprint.first_ms)


def ratio(other: Timing, reference: Timing, *, resamples: int = 1000, seed: int = 0) -> Ratio:
    """Latency of ``other`` over ``reference`` from one ``compare``: below 1 is faster.

    The median over rounds of the ratio of the two turns' medians, with a percentile bootstrap over rounds: paired, so
    what slows a whole round cancels out. Against the ratio of the two medians, in simulated runs of 60 rounds that
    drift by 10 %, the interval is 1/2 to 2/3 as wide and holds the truth about as often.
    """
    return _paired_ratio(_turn_medians(other), _turn_medians(reference), resamples, seed)


def _turn_medians(timing: Timing) -> np.ndarray[Any, np.dtype[np.float64]]:
    laps = np.asarray(timing.laps_ms, np.float64)
    return np.median(laps.reshape(-1, timing.laps_per_turn), axis=1)


def _paired_ratio(other: Any, reference: Any, resamples: int, seed: int) -> Ratio:
    """f64[rounds] each -> Ratio."""
    if len(other) != len(reference):
        raise UsageError(f"timings of {len(other)} and {len(reference)} rounds aren't from one comparison")
    ratios = np.asarray(other) / np.asarray(reference)
    picks = np.random.default_rng(seed).integers(0, len(ratios), (resamples, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def _in_worker(task: str, configs: Sequence[TimedConfig], feeds: Sequence[Feed], job: dict[str, Any]) -> dict[str, Any]:
    """Run ``task`` of ``edgeq.run.worker`` in a new process and return what it found out."""
    if not feeds:
        raise SampleError("nothing to run: no samples to time")
    with tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        np.savez(folder / "feeds.npz", *[array for feed in feeds for array in feed.values()])
        job = {
            **job,
            "configs": [{**asdict(config), "path": str(config.path.resolve())} for config in configs],
            "inputs": [list(feed) for feed in feeds],
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        done = subprocess.run(
            [_python(configs), "-m", "edgeq.run.worker", task, str(folder)],
            env={**os.environ, "PYTHONPATH": _python_path()},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0 or not (folder / "result.json").is_file():
            tail = " | ".join(done.stderr.strip().splitlines()[-3:]) or "no message"
            how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
            names = ", ".join(config.name for config in configs)
            raise RuntimeUnavailableError(
                f"the process measuring {names} ended with {how}: {tail}",
                hint="signal 9 is mostly too little memory: close other programs" if done.returncode == -9 else "",
            )
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if "error" in result:
        raise getattr(errors, result["error"])(result["message"], hint=result["hint"])
    return result


def _python(configs: Sequence[TimedConfig]) -> str:
    """The interpreter all of ``configs`` run in: what is timed side by side shares a process."""
    pythons = {python_for(config.provider) for config in configs}
    if len(pythons) > 1:
        raise UsageError(
            f"can't time providers of different Python environments side by side: {', '.join(sorted(pythons))}"
        )
    return pythons.pop()


def _python_path() -> str:
    """Where this edgeq lies comes first, so that the other process measures with the same code."""
    own = str(Path(errors.__file__).parent.parent)
    return os.pathsep.join(filter(None, [own, os.environ.get("PYTHONPATH", "")]))
