"""What is asked of a device: outputs, latencies, footprints, the graph its runtime runs (L4).

The same questions as ``run.timing`` answers on this machine, with the same records. Samples go in portions, so that
neither side's memory or disk depends on their number.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from edgeq.errors import UsageError
from edgeq.ir import io
from edgeq.run.device import tensors
from edgeq.run.device.record import Device
from edgeq.run.device.sustained import Sustained, sustained_of
from edgeq.run.record import Feed, Timing
from edgeq.run.session import timing_of
from edgeq.run.timing import Footprint, TimedConfig
from edgeq.target import kernels

PORTION_BYTES = 16 << 20


def outputs(
    device: Device, config: TimedConfig, feeds: Iterable[Feed], names: Sequence[str] = (), *, threads: int = 1
) -> Iterator[tuple[Feed, Feed]]:
    """Each feed with the outputs ``names`` (all without any) that the device computes from it, in order."""
    for portion in _portions(feeds):
        yield from _outputs(device, config, portion, names, threads, None)


def graph(
    device: Device, config: TimedConfig, feeds: Sequence[Feed], path: Path, names: Sequence[str] = ()
) -> list[tuple[Feed, Feed]]:
    """``outputs``; the graph the device's runtime made of the model, which is what really ran, goes to ``path``."""
    return _outputs(device, config, feeds, names, 1, path)


def _outputs(
    device: Device, config: TimedConfig, feeds: Sequence[Feed], names: Sequence[str], threads: int, path: Path | None
) -> list[tuple[Feed, Feed]]:
    keeps = path is not None
    result = _job(device, "outputs", [config], feeds, threads=threads, outputs=list(names), graph=keeps)
    with tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True) as folder:
        arrays = Path(folder) / "outputs"
        for (name, digest), to in zip(result["files"].items(), filter(None, (arrays, path)), strict=True):
            device.pull(name, to, digest)
        device.drop(list(result["files"]))
        return list(zip(feeds, tensors.unpack(arrays, result["index"]), strict=True))


@dataclass(frozen=True)
class Race:
    """Timings by name; what the device said of its clocks and heat before and after."""

    timings: dict[str, Timing]
    before: Mapping[str, Any]
    after: Mapping[str, Any]


def compare(
    device: Device,
    configs: Sequence[TimedConfig],
    feeds: Sequence[Feed],
    *,
    threads: int = 1,
    max_seconds: float = 20.0,
    seed: int = 0,
) -> Race:
    """Latency of ``configs`` on ``feeds`` taken in turn, interleaved on the device for ``max_seconds``."""
    if len({config.name for config in configs}) != len(configs) or not configs:
        raise UsageError(f"names of timed configurations must differ, found {[config.name for config in configs]}")
    result = _job(device, "compare", configs, feeds, threads=threads, seconds=max_seconds, seed=seed)
    timings = {
        name: timing_of(found.pop("laps_ms"), threads=threads, warmup=2, **found)
        for name, found in result["timings"].items()
    }
    return Race(timings, result["before"], result["after"])


def measure_memory(device: Device, config: TimedConfig, feed: Feed, *, threads: int = 1, repeats: int = 3) -> Footprint:
    """Footprint of one configuration: median times and highest peak of ``repeats`` fresh processes."""
    runs = [_job(device, "memory", [config], [feed], threads=threads) for _ in range(repeats)]
    return Footprint(
        max(int(run["peak_bytes"]) for run in runs),
        median(run["load_ms"] for run in runs),
        median(run["first_ms"] for run in runs),
    )


def sustained(
    device: Device, config: TimedConfig, feeds: Sequence[Feed], *, threads: int = 1, seconds: float = 60.0
) -> Sustained:
    """One configuration back to back on ``feeds`` taken in turn for ``seconds``."""
    return sustained_of(_job(device, "sustained", [config], feeds, threads=threads, seconds=seconds), threads)


def observed(
    device: Device, configs: Sequence[TimedConfig], data: str, path: Path, code: Mapping[str, Path], **settings: Any
) -> int:
    """Statistics of the outputs of ``configs`` over samples that lie on the device, as arrays in an ``.npz`` at
    ``path``; returns how many samples there were. ``code``: what counts there, by the file names it is imported by;
    ``settings``: what else the agent's task wants to know."""
    for name, source in code.items():
        device.push(name, source)
    result = _job(device, "observe", configs, [], code=list(code), data=data, threads=1, **settings)
    ((name, digest),) = result["files"].items()
    device.pull(name, path, digest)
    device.drop([name])
    return int(result["samples"])


class Clock:
    """``timing.Stopwatch`` of a device; ``states``: what it said of its clocks and heat around each race."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.states: list[Mapping[str, Any]] = []

    def compare(self, configs: Sequence[TimedConfig], feeds: Sequence[Feed], **settings: Any) -> dict[str, Timing]:
        race = compare(self.device, configs, feeds, **settings)
        self.states += [race.before, race.after]
        return race.timings

    def memory(self, config: TimedConfig, feed: Feed, **settings: Any) -> Footprint:
        return measure_memory(self.device, config, feed, **settings)


def _job(
    device: Device, task: str, configs: Sequence[TimedConfig], feeds: Sequence[Feed], *, code: Sequence[str] = (),
    **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    models = [_sent(device, config) for config in configs]
    with tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "feeds"
        index = tensors.pack(feeds, path)
        name = f"feeds-{io.file_digest(path)[:16]}"
        device.push(name, path)
    files = [name, *code, *(file for model in models for file in model["files"])]
    result = device.run({"task": task, "models": models, "feeds": {"file": name, "index": index}, "files": files,
                         **settings})  # fmt: skip
    if task == "outputs":  # the next portion is another
        device.drop([name])
    return result


def _sent(device: Device, config: TimedConfig) -> dict[str, Any]:
    """The model on the device, its external data beside it as it knows them."""
    paths = {path.as_posix(): config.path.parent / path for path in io.model_files(config.path)}
    folder = hashlib.sha256("".join(map(io.file_digest, paths.values())).encode()).hexdigest()[:16]
    files = {f"{folder}/{name}": path for name, path in paths.items()}
    for name, path in files.items():
        device.push(name, path)
    library = _kernels(device, config)
    session = {**config.provider.session, **config.config}
    return {
        "name": config.name, "file": next(iter(files)), "files": [*files, *filter(None, [library])], "session": session,
        "provider": config.provider.name, "kernels": library,
    }  # fmt: skip


def _kernels(device: Device, config: TimedConfig) -> str:
    """The library of edgeq's kernels on the device, "" for a model that has no use for it there."""
    if not device.facts.system.startswith("Linux") or not kernels.uses(config.path):
        return ""
    library = kernels.library(device.facts.machine)
    device.push(library.name, library)
    return library.name


def _portions(feeds: Iterable[Feed]) -> Iterator[list[Feed]]:
    portion: list[Feed] = []
    size = 0
    for feed in feeds:
        portion.append(feed)
        size += sum(array.nbytes for array in feed.values())
        if size >= PORTION_BYTES:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion
