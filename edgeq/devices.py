"""Packages on devices: which variant fits one, what it must repeat there, what its runtime made of it (L10)."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.analyse.coverage import is_integer
from edgeq.errors import DeviceError
from edgeq.ir import io
from edgeq.packaging import Golden, Variant, read_directory, read_manifest
from edgeq.packaging.manifest import OLDEST_RUNTIME
from edgeq.report.record import Check
from edgeq.report.recorder import Recorder
from edgeq.run.device import Device, measure, open_device, registry
from edgeq.run.record import Feed
from edgeq.run.timing import TimedConfig
from edgeq.target.record import Provider


def fitting(folder: Path, device: Device) -> tuple[Variant, Provider]:
    """The first variant of a package that ``device`` has what it takes for, and how it is opened there.

    DeviceError, with what each variant lacks, when there is none."""
    lacking = []
    for variant, row in zip(read_directory(folder).variants, read_manifest(folder)["variants"], strict=True):
        if variant.buckets:
            lacking.append(f"{row['name']} has shape buckets, which aren't run on devices yet")
        elif missing := _lacks(device, row["requires"]):
            lacking.append(f"{row['name']} needs {', '.join(missing)}")
        else:
            return variant, Provider(row["requires"]["provider"], session=row["session"])
    raise DeviceError(
        f"{str(folder)!r} can't run on {device.address} ({device.facts.machine}): {'; '.join(lacking)}",
        hint="export for it: edgeq export -t cpu-arm64" if device.facts.machine == "aarch64" else "export for it",
    )


def _lacks(device: Device, needs: dict[str, Any]) -> list[str]:
    words = [word for word in needs["isa"] if not set(word.split("|")) & set(device.facts.isa)]
    words += [needs["provider"]] if needs["provider"] not in device.facts.providers else []
    found = device.facts.runtime
    if found and _numbers(found) < _numbers(needs["onnxruntime"]):
        words.append(f"onnxruntime >= {needs['onnxruntime']}, found {found}")
    return words


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:2]]


def ran(device: Device, variant: Variant, provider: Provider) -> tuple[Check, ...]:
    """What the golden runs are there: ``golden``, how many outputs differ by more than their tolerance (none may), and
    ``integer_kernels``, how many the graph of the device's own runtime holds, and which, where it shows it."""
    config, golden = TimedConfig(variant.name, variant.model, provider=provider), variant.golden
    if not device.facts.shows_graph:
        runs = list(measure.outputs(device, config, golden.inputs, list(golden.compared)))
        return (_repeated(golden, [found for _, found in runs]),)
    with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
        path = Path(folder) / "graph.onnx"
        runs = measure.graph(device, config, golden.inputs, path, list(golden.compared))
        kernels = Counter(node.op_type for node in io.read(path).graph if is_integer(node))
    return _repeated(golden, [found for _, found in runs]), _kernels(kernels, variant)


def kept_up(
    device: Device, model: Path, provider: Provider, feeds: Sequence[Feed], threads: int, seconds: float,
    recorder: Recorder,
) -> tuple[dict[str, Any], tuple[Check, ...]]:  # fmt: skip
    """A model run back to back there: what a report's ``sustained`` holds, ``sustained_ratio`` and, where the device
    counts its energy, ``joules_per_run``. That it throttles, or tells no energy, is noted."""
    config = TimedConfig("artifact", model, provider=provider)
    found = measure.sustained(device, config, feeds, threads=threads, seconds=seconds)
    pool = f"{threads} thread{'s' if threads > 1 else ''}"
    words = [f"p50 {found.early_ms:.4g} → {found.late_ms:.4g} ms in {found.seconds:.0f} s, {pool}"]
    for name, unit in (("mhz", "MHz"), ("celsius", "°C")):
        told = [window[name] for window in found.windows if name in window]
        words += [f"{told[0]:.0f} → {told[-1]:.0f} {unit}"] if told else []
    words += ["not a device measurement"] if device.facts.emulator else []
    note, ratio = "; ".join(words), found.ratio
    checks = [Check("sustained_ratio", ratio.value, "", ratio.low, ratio.high, samples=found.laps, note=note)]
    if found.throttled:
        recorder.warn("throttling", f"{device.address} becomes slower while it runs: {note}")
    if found.joules_per_run is None:
        recorder.info("no-energy", f"{device.address} tells no energy: {found.energy.source}")
    else:
        checks.append(Check("joules_per_run", found.joules_per_run, "J", samples=found.laps, note=found.energy.source))
    return {**asdict(found), "throttled": found.throttled}, tuple(checks)


def _repeated(golden: Golden, runs: list[Feed]) -> Check:
    off, worst, count = 0, 0.0, 0
    for found, expected in zip(runs, golden.outputs, strict=True):
        for name, tolerance in golden.compared.items():
            distance = _distance(found[name], expected[name])
            off, count = off + (not distance <= tolerance), count + 1
            worst = max(worst, distance / tolerance if tolerance else float(distance > 0))
    note = f"of {count} outputs; the worst is off by {worst:.2g} of its tolerance"
    return Check("golden", float(off), limit=0.0, passed=off == 0, samples=len(golden.inputs), note=note)


def _kernels(found: Counter[str], variant: Variant) -> Check:
    forecast = variant.report.coverage.integer_nodes if variant.report.coverage else None
    told = ", ".join(f"{name} {count}" for name, count in found.most_common()) or "none"
    note = told if forecast is None else f"{told}; forecast {forecast}"
    return Check("integer_kernels", float(found.total()), note=note)


def _distance(found: Any, expected: Any) -> float:
    if found.shape != expected.shape:
        return float("inf")
    same = np.isnan(found) & np.isnan(expected) if found.dtype.kind == "f" else np.zeros(found.shape, bool)
    gaps = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    return float(np.max(np.where(same, 0.0, gaps), initial=0.0))


def facts_of(device: Device) -> dict[str, Any]:
    """The device as plain data, for a report."""
    return {"address": device.address, **asdict(device.facts)}


def add(name: str, address: str) -> dict[str, Any]:
    """Register the device at ``address``; it must answer."""
    with open_device(address) as device:
        registry.add(name, address, device.facts)
        return facts_of(device)


def examine(word: str) -> dict[str, str]:
    """What is well and what isn't with a device, by name or address: a line a subject."""
    with open_device(registry.address_of(word)) as device:
        facts = device.facts
        told = {
            "address": device.address,
            "machine": " ".join(filter(None, [facts.board, facts.machine, facts.system, f"{facts.cores} cores"])),
            "memory": f"{facts.memory_bytes / 2**30:.1f} GiB, {facts.free_bytes / 2**30:.1f} GiB of disk free",
            "runner": f"{facts.runner} {facts.python}".strip(),
            "runtime": _runtime(device),
            "instructions": ", ".join(facts.isa),
            "governor": facts.governor or "not told",
            "heat": ", ".join(f"{zone} {heat:.0f} °C" for zone, heat in facts.celsius.items()) or "not told",
        }
    if facts.governor not in ("", "performance"):
        told["governor"] += ": latencies vary with it, `performance` makes them steady"
    if facts.emulator:
        told["emulator"] = f"{facts.emulator}: times on it say nothing about any device"
    return told


def _runtime(device: Device) -> str:
    """What the runtime says when it is really loaded; a problem where it can't be used."""
    if device.facts.missing:
        missing = " and ".join(device.facts.missing)
        return f"PROBLEM: no {missing}; install there: python3 -m pip install numpy onnxruntime"
    try:
        found = device.run({"task": "versions", "files": []})
    except DeviceError as error:
        return f"PROBLEM: {error.message}"
    providers, versions = found.pop("providers"), [f"{name} {version}" for name, version in found.items()]
    told = ", ".join([*versions, *providers])
    if _numbers(found["onnxruntime"]) < _numbers(OLDEST_RUNTIME):
        return f"PROBLEM: {told}; packages need onnxruntime >= {OLDEST_RUNTIME}"
    return told
