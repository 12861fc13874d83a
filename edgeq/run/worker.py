"""The measuring process of ``timing``: ``python -m edgeq.run.worker compare|memory FOLDER`` (L4).

Reads ``job.json`` and ``feeds.npz`` from the folder and leaves ``result.json`` there: files instead of pipes, so that
whatever the runtime prints can't get mixed up with the result.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgeq.errors import EdgeqError
from edgeq.run.record import Feed, Timing
from edgeq.run.session import Session, open_session, run_session, timing_of
from edgeq.run.timing import ratio
from edgeq.target import kernels
from edgeq.target.record import Provider

TURN_MS = 20.0  # a turn lasts about this long, so that short laps aren't all hand-over
MIN_LAPS, MAX_LAPS = 2, 20  # laps kept of a turn
MAX_ROUNDS = 2000


def main(task: str, folder: Path) -> None:
    """Run one task; an error a user can cause becomes the result instead of a traceback."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    try:
        result = TASKS[task](job, _feeds(folder, job["inputs"]))
    except EdgeqError as error:
        result = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _feeds(folder: Path, inputs: list[list[str]]) -> list[Feed]:
    with np.load(folder / "feeds.npz") as arrays:
        stored = iter([arrays[f"arr_{index}"] for index in range(len(arrays.files))])
    return [{name: next(stored) for name in names} for names in inputs]


class _Contender:
    """A session and what has been measured of it so far."""

    def __init__(self, config: dict[str, Any], feed: Feed, warmup: int, threads: int) -> None:
        self.name = config["name"]
        self.session, self.load_ms = _timed(lambda: _open(config, threads=threads, shared_pool=True))
        self.inputs = {arg.name for arg in self.session.get_inputs()}
        _, self.first_ms = _timed(lambda: run_session(self.session, self.taken(feed)))
        self.outputs = [arg.name for arg in self.session.get_outputs()]
        warm = [self.lap(feed) for _ in range(max(warmup, 1))]
        self.laps_per_turn = int(np.clip(round(TURN_MS / float(np.median(warm))), MIN_LAPS, MAX_LAPS))
        self.laps: list[float] = []

    def taken(self, feed: Feed) -> Feed:
        """What of ``feed`` this file takes: an input the others still have may be pinned in it."""
        return {name: array for name, array in feed.items() if name in self.inputs}

    def lap(self, feed: Feed) -> float:
        own = self.taken(feed)
        start = time.perf_counter_ns()
        self.session.run(self.outputs, own)
        return (time.perf_counter_ns() - start) / 1e6

    def turn(self, feed: Feed) -> None:
        self.lap(feed)  # pays for the caches the others took
        self.laps += [self.lap(feed) for _ in range(self.laps_per_turn)]

    def timing(self) -> Timing:
        return timing_of(self.laps, threads=1, warmup=0, laps_per_turn=self.laps_per_turn)


def _open(config: dict[str, Any], *, threads: int, shared_pool: bool) -> Session:
    path = Path(config["path"])
    kernels.check(path)
    return open_session(
        path,
        threads=threads,
        level=config["level"],
        provider=Provider(**config["provider"]),
        config=config["config"],
        shared_pool=shared_pool,
        isolated=False,
    )


def _timed(action: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter_ns()
    result = action()
    return result, (time.perf_counter_ns() - start) / 1e6


def _compare(job: dict[str, Any], feeds: list[Feed]) -> dict[str, Any]:
    """Interleaved laps of all configurations; see ``timing.compare``."""
    onnxruntime.set_global_thread_pool_sizes(job["threads"], 1)
    contenders = [_Contender(config, feeds[0], job["warmup"], job["threads"]) for config in job["configs"]]
    rng = np.random.default_rng(job["seed"])
    gc.disable()
    for index in _rounds(job, contenders):
        feed = feeds[index % len(feeds)]
        for position in rng.permutation(len(contenders)):
            contenders[position].turn(feed)
    return {
        one.name: {
            "laps_ms": one.laps,
            "laps_per_turn": one.laps_per_turn,
            "first_ms": one.first_ms,
            "load_ms": one.load_ms,
        }
        for one in contenders
    }


def _rounds(job: dict[str, Any], contenders: list[_Contender]) -> Iterator[int]:
    """Round numbers until the ratios are known well enough or time is over."""
    start, check = time.monotonic(), job["rounds"]
    for index in range(MAX_ROUNDS):
        seconds = time.monotonic() - start
        if index >= job["rounds"] and seconds >= job["max_seconds"]:
            return
        if index >= check and seconds >= job["min_seconds"]:
            if _known(contenders, job["precision"]):
                return
            check = index + max(index // 4, 1)  # looking costs time too: do it at growing distances
        yield index


def _known(contenders: list[_Contender], precision: float) -> bool:
    reference = contenders[0].timing()
    ratios = [ratio(other.timing(), reference, resamples=300) for other in contenders[1:]]
    return all(one.high - one.low <= 2 * precision * one.value for one in ratios)


def _memory(job: dict[str, Any], feeds: list[Feed]) -> dict[str, Any]:
    """Load and run twice, with the peak above what this process held before."""
    before = _reset_peak()
    session, load_ms = _timed(lambda: _open(job["configs"][0], threads=job["threads"], shared_pool=False))
    _, first_ms = _timed(lambda: run_session(session, feeds[0]))
    run_session(session, feeds[0])  # the second run uses the memory plan the first one made
    return {"peak_bytes": max(_peak() - before, 0), "load_ms": load_ms, "first_ms": first_ms}


def _reset_peak() -> int:
    """Resident bytes now. Where Linux allows it the high-water mark starts again from here (man 5 proc, clear_refs)."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return _peak()
    return _status("VmRSS")


def _peak() -> int:
    """Highest resident bytes. VmHWM starts at exec; ``ru_maxrss`` may carry over the parent's: second choice."""
    if Path("/proc/self/status").is_file():
        return _status("VmHWM")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


TASKS: dict[str, Callable[[dict[str, Any], list[Feed]], dict[str, Any]]] = {"compare": _compare, "memory": _memory}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
