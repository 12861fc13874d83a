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
from edgeq.run.record import Feed, Timing
from edgeq.run.session import timing_of
from edgeq.run.timing import Footprint, TimedConfig

PORTION_BYTES = 16 << 20


def outputs(
    device: Device, config: TimedConfig, feeds: Iterable[Feed], names: Sequence[str] = (), *, threads: int = 1
) -> Iterator[tuple[Feed, Feed]]:
    """Each feed with the outputs ``names`` (all without any) that the device computes from it, in order."""
    with tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True) as folder:
        for portion in _portions(feeds):
            result = _job(device, "outputs", [config], portion, threads=threads, outputs=list(names), graph=False)
            (name, digest), *_ = result["files"].items()
            path = Path(folder) / "outputs"
            device.pull(name, path, digest)
            device.drop([name])
            yield from zip(portion, tensors.unpack(path, result["index"]), strict=True)


def graph(device: Device, config: TimedConfig, feed: Feed, path: Path) -> None:
    """Write the graph the device's runtime made of a model to ``path``: what really runs there."""
    result = _job(device, "outputs", [config], [feed], threads=1, outputs=[], graph=True)
    name, digest = next((name, digest) for name, digest in result["files"].items() if name.endswith(".onnx"))
    device.pull(name, path, digest)
    device.drop(list(result["files"]))


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
    seconds: float = 20.0,
    seed: int = 0,
) -> Race:
    """Latency of ``configs`` on ``feeds`` taken in turn, interleaved on the device for about ``seconds``."""
    if len({config.name for config in configs}) != len(configs) or not configs:
        raise UsageError(f"names of timed configurations must differ, found {[config.name for config in configs]}")
    result = _job(device, "compare", configs, feeds, threads=threads, seconds=seconds, seed=seed)
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


def _job(
    device: Device, task: str, configs: Sequence[TimedConfig], feeds: Sequence[Feed], **settings: Any
) -> dict[str, Any]:
    models = [_sent(device, config) for config in configs]
    with tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "feeds"
        index = tensors.pack(feeds, path)
        name = f"feeds-{io.file_digest(path)[:16]}"
        device.push(name, path)
    files = [name, *(file for model in models for file in model["files"])]
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
    session = {**config.provider.session, **config.config}
    return {
        "name": config.name, "file": next(iter(files)), "files": list(files), "session": session,
        "provider": config.provider.name,
    }  # fmt: skip


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
