"""Statistics of a model's tensors over data, here or where the data lies, and what left calibration's ranges (L10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgeq.analyse.drift import drift
from edgeq.analyse.observe import notices_of
from edgeq.analyse.observe import observe as pass_over
from edgeq.analyse.statistics import Statistics, on_device, taps, unrounded, write
from edgeq.analyse.stats import Stats
from edgeq.devices import facts_of, fitting
from edgeq.errors import OutputError, UsageError
from edgeq.facts import environment, samples_facts
from edgeq.given import pins_of, preprocessing_of, samples_spec
from edgeq.ir import io
from edgeq.packaging import Package, read_directory
from edgeq.report.progress import Progress
from edgeq.report.record import Check, Report
from edgeq.report.recorder import Recorder
from edgeq.run.device import open_device, registry
from edgeq.run.samples import load_samples
from edgeq.source import read_model
from edgeq.target.load import load_target
from edgeq.target.record import CPU


def observe(
    model: str | Path,
    *,
    calibration: str | None = None,
    on: str | None = None,
    data: str | None = None,
    out: str | Path | None = None,
    inputs: Sequence[str] = (),
    limit: int | None = None,
    synthetic: bool = False,
    preprocessing: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Statistics of the tensors of ``model`` over the samples; kept in ``out``, without single values. ``on`` a device
    over what lies there at the path ``data``, which doesn't leave it.

    Of a package also which tensors leave the range its calibration saw."""
    if (on is None) != (data is None) or (on is not None and calibration is not None):
        raise UsageError("data here is given with -c, data on a device with --on and --data",
                         hint="edgeq observe MODEL --on DEVICE --data /path/there")  # fmt: skip
    if out is not None and Path(out).exists() and not force:
        raise OutputError(f"{str(out)!r} exists", hint="add --force to replace it, or choose another -o")
    recorder, told = Recorder(progress), {}  # type: Recorder, dict[str, Any]
    shipped = read_directory(Path(model)) if Path(model).is_dir() else None
    if shipped:
        read = io.read(shipped.variants[0].only)
        digest = io.digest(read)
    else:
        read, info = read_model(model, opset=load_target("local").opset, pins=pins_of(inputs))
        digest = info.digest
    if on is None:
        settings = preprocessing_of(preprocessing, shipped.preprocessing if shipped else None)
        spec = samples_spec(calibration, synthetic, "sample", "-c")
        samples = load_samples(spec, read, limit=limit, preprocessing=settings)
        with recorder.step("observe", len(samples)) as facts:
            seen: Mapping[str, Stats] = pass_over(
                unrounded(read), taps(read), samples, threads=2, progress=recorder.progress
            )
            facts.update(tensors=len(seen), samples=len(samples))
        used = samples_facts(samples)
    else:
        seen, used, told = _there(read, Path(model) if shipped else None, on, str(data), limit, recorder)
    recorder.notices.extend(notice for name, stats in seen.items() for notice in notices_of(name, stats))
    if out is not None:
        write(Statistics(seen, digest, used["count"], (used["origin"],)), Path(out))
        recorder.info("written", f"written {out}: statistics of {len(seen)} tensors, no single value")
    rows = _drift(shipped, read, seen, recorder) if shipped else ()
    return Report(
        source={"origin": str(model)}, target={}, recipe="observe", steps=tuple(recorder.steps),
        checks=_checks(rows, used["count"]), drift=rows, notices=tuple(recorder.notices),
        environment=environment() | told, samples={"evaluation": used},
    )  # fmt: skip


def _there(
    model: ir.Model, package: Path | None, on: str, data: str, limit: int | None, recorder: Recorder
) -> tuple[Mapping[str, Stats], dict[str, Any], dict[str, Any]]:
    """Statistics over the device's own data; what a report says of the data and of the device."""
    with ExitStack() as stack:
        device = stack.enter_context(open_device(registry.address_of(on)))
        provider = fitting(package, device)[1] if package else CPU
        with recorder.step("observe") as facts:
            seen, count = on_device(model, device, provider, data, limit)
            facts.update(tensors=len(seen), samples=count)
        return seen, {"origin": f"{on}:{data}", "count": count}, {"device": facts_of(device)}


def _drift(
    package: Package, model: ir.Model, seen: Mapping[str, Stats], recorder: Recorder
) -> tuple[dict[str, Any], ...]:
    rows = drift(model, package.report.layers, seen)
    if not rows:
        recorder.warn("no-ranges", "this package keeps no ranges of calibration: it ships in float, or is older")
    return rows


def _checks(rows: Sequence[dict[str, Any]], samples: int) -> tuple[Check, ...]:
    """``drifted_tensors``: how many have more than a hundredth of their values beyond what calibration saw."""
    if not rows:
        return ()
    count, worst = sum(row["drifted"] for row in rows), rows[0]
    note = f"of {len(rows)}; {worst['tensor']} has {worst['outside']:.2%} of its values beyond what calibration saw"
    return (Check("drifted_tensors", float(count), limit=0.0, passed=count == 0, samples=samples, note=note),)
