"""Statistics of a model's tensors over data, and what left the ranges that calibration saw (L10)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeq.analyse.drift import drift
from edgeq.analyse.observe import observe as pass_over
from edgeq.analyse.statistics import Statistics, taps, unrounded, write
from edgeq.errors import OutputError
from edgeq.facts import environment, samples_facts
from edgeq.given import pins_of, preprocessing_of, samples_spec
from edgeq.ir import io
from edgeq.packaging import read_directory
from edgeq.report.progress import Progress
from edgeq.report.record import Check, Report
from edgeq.report.recorder import Recorder
from edgeq.run.samples import load_samples
from edgeq.source import read_model
from edgeq.target.load import load_target


def observe(
    model: str | Path,
    *,
    calibration: str | None = None,
    out: str | Path | None = None,
    inputs: Sequence[str] = (),
    limit: int | None = None,
    synthetic: bool = False,
    preprocessing: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Statistics of the tensors of ``model`` over the samples; kept in ``out``, without single values.

    Of a package also which tensors leave the range its calibration saw."""
    if out is not None and Path(out).exists() and not force:
        raise OutputError(f"{str(out)!r} exists", hint="add --force to replace it, or choose another -o")
    recorder, package = Recorder(progress), Path(model).is_dir()
    shipped = read_directory(Path(model)) if package else None
    if shipped is not None:
        read, settings = io.read(shipped.model), preprocessing_of(preprocessing, shipped.preprocessing)
    else:
        read, _ = read_model(model, opset=load_target("local").opset, pins=pins_of(inputs))
        settings = preprocessing_of(preprocessing)
    spec = samples_spec(calibration, synthetic, "sample", "-c")
    samples = load_samples(spec, read, limit=limit, preprocessing=settings)
    with recorder.step("observe", len(samples)) as facts:
        found = pass_over(unrounded(read), taps(read), samples, threads=2, progress=recorder.progress)
        facts.update(tensors=len(found), samples=len(samples))
    recorder.notices.extend(found.notices)
    if out is not None:
        write(Statistics(found, io.digest(read), len(samples), (samples.origin,)), Path(out))
        recorder.info("written", f"written {out}: statistics of {len(found)} tensors, no single value")
    rows: tuple[dict[str, Any], ...] = ()
    if shipped is not None:
        rows = drift(read, shipped.report.layers, found)
        if not rows:
            recorder.warn("no-ranges", "this package keeps no ranges of calibration: it ships in float, or is older")
    return Report(
        source={"origin": str(model)}, target={}, recipe="observe", steps=tuple(recorder.steps),
        checks=_checks(rows, len(samples)), drift=rows, notices=tuple(recorder.notices), environment=environment(),
        samples={"evaluation": samples_facts(samples)},
    )  # fmt: skip


def _checks(rows: Sequence[dict[str, Any]], samples: int) -> tuple[Check, ...]:
    """``drifted_tensors``: how many have more than a hundredth of their values beyond what calibration saw."""
    if not rows:
        return ()
    count, worst = sum(row["drifted"] for row in rows), rows[0]
    note = f"of {len(rows)}; {worst['tensor']} has {worst['outside']:.2%} of its values beyond what calibration saw"
    return (Check("drifted_tensors", float(count), limit=0.0, passed=count == 0, samples=samples, note=note),)
