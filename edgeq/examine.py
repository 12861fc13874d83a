"""Looking at models and packages without making any: inspect, sensitivity, validate, bench (L10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeq import recipe as recipes
from edgeq import steps
from edgeq.analyse.forecast import forecast
from edgeq.analyse.place import Plan, free_costs, place
from edgeq.analyse.store import Store
from edgeq.apart import check as parting
from edgeq.apart import on_device as parted
from edgeq.bucketing import at_largest, fitted, namer, opener
from edgeq.context import Context
from edgeq.devices import facts_of, fitting, kept_up, ran
from edgeq.errors import PackageError, RecipeError, UsageError
from edgeq.facts import environment, samples_facts, source_facts, target_facts, timing_facts
from edgeq.given import (
    Wanted,
    model_file,
    pins_of,
    preprocessing_of,
    random_samples,
    read_with_samples,
    samples_settings,
    samples_spec,
    symbolic,
    target_of,
)
from edgeq.ir import query
from edgeq.packaging import Variant, check_files, read_directory, unpacked, verify_package
from edgeq.pixels import of_package, taken
from edgeq.quantizer import Quantizer
from edgeq.report.progress import Progress
from edgeq.report.record import AtomNoise, Check, Coverage, Divergence, Island, Report
from edgeq.report.recorder import Recorder
from edgeq.run.device import Device, open_device, registry
from edgeq.run.record import Samples, Timing
from edgeq.run.samples import load_samples, take
from edgeq.run.session import feeds_like, open_session
from edgeq.run.timing import TimedConfig, compare, ratio
from edgeq.source import read_model
from edgeq.target.load import load_target
from edgeq.target.oracle import Oracle
from edgeq.target.record import CPU, Provider
from edgeq.validator import TIMED_SAMPLES
from edgeq.validator import validate as measure


def inspect(model: str | Path | ir.Model, *, target: str = "local", inputs: Sequence[str] = ()) -> Report:
    """What ``model`` is made of and what ``target`` could run in integers, without data. Nothing is written."""
    chosen, recorder = target_of(target, None), Recorder()
    source, info = read_model(model, opset=chosen.opset, pins=pins_of(inputs))
    if chosen.static and (loose := symbolic(source)):
        raise UsageError(
            f"target {chosen.name!r} takes fixed shapes only, input {loose[0]!r} has others",
            hint=f"pin it: --input {loose[0]}=1,3,224,224",
        )
    context = Context(chosen, Oracle(chosen), random_samples(source, 1, 0), recorder)
    prepared = steps.apply(recipes.parse("canonicalize; quantize", steps.KNOWN), source, context)
    quantizer = prepared.quantizer
    assert quantizer is not None
    plan = place(quantizer.atoms, chosen, free_costs(quantizer.atoms))
    if any(None in (query.dims(value) or (None,)) for value in source.graph.inputs):
        recorder.info("dynamic", "dynamic axes are counted as 1: pin them with --input to see real work")
    return Report(
        source=source_facts(info, source), target=target_facts(chosen), recipe="inspect", steps=tuple(recorder.steps),
        coverage=_coverage(quantizer, plan), forecast=tuple(forecast(quantizer.atoms, plan, chosen, context.oracle)),
        notices=tuple(recorder.notices), environment=environment(),
        samples={"calibration": "random, shapes only"},
    )  # fmt: skip


def sensitivity(
    model: str | Path | ir.Model,
    *,
    calibration: str | None = None,
    target: str = "local",
    recipe: str = recipes.DEFAULT,
    inputs: Sequence[str] = (),
    limit: int | None = None,
    synthetic: bool = False,
    preprocessing: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """What quantizing each node of ``model`` does to its outputs, loudest first, and which tensor is to blame: with it
    alone quantized, and with all quantized but it. Nothing is written; an interrupted run goes on where it stopped.

    Raises RecipeError for a recipe that doesn't quantize."""
    chosen, recorder = target_of(target, None), Recorder(progress)
    spec = samples_spec(calibration, synthetic, "calibration", "-c")
    source, info, samples = read_with_samples(
        model, spec, chosen, recorder, inputs=inputs, limit=limit, **samples_settings(model, preprocessing)
    )
    context = Context(chosen, Oracle(chosen), samples, recorder, Store(), max(chosen.threads), seed)
    quantizer = steps.apply(recipes.parse(recipe, steps.KNOWN), source, context).quantizer
    if quantizer is None:
        raise RecipeError(f"recipe {recipe!r} quantizes nothing", hint="end it with quantize")
    plan, quantized, seen = quantizer.fused()
    rows: tuple[AtomNoise, ...] = ()
    if plan.integer:
        if chosen.provider == CPU.name:  # others compile nodes together, and tell no time of each
            quantizer.learn_costs(plan, quantized)
        rows = quantizer.ranking(plan, restore=True)
    else:
        recorder.warn("nothing-to-quantize", "no node of this model has an integer kernel worth its Q/DQ")
    return Report(
        source=source_facts(info, source), target=target_facts(chosen), recipe=recipe, steps=tuple(recorder.steps),
        coverage=seen, sensitivity=rows, notices=tuple(recorder.notices), environment=environment(),
        samples={"calibration": samples_facts(samples)},
    )  # fmt: skip


def validate(
    package: str | Path,
    *,
    evaluation: str | None = None,
    reference: str | Path | None = None,
    metric: str | None = None,
    max_drop: float | None = None,
    max_latency_ms: float | None = None,
    min_speedup: float | None = None,
    max_size_ratio: float | None = None,
    threads: Sequence[int] | None = None,
    synthetic: bool = False,
    preprocessing: str | Path | None = None,
    seed: int = 0,
    on: str | None = None,
    divergence: bool = False,
    sustained: float | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure a package of any form again: digests and golden runs, then accuracy and latency against ``reference``,
    by default the model it was made from. ``on``: a device's name or address; without one, on this machine.
    ``divergence``: also look for the first node that computes otherwise there than here, as is done in any case when
    golden runs differ.
    ``sustained``: also run it back to back for so many seconds.

    Raises PackageError when the package is altered, DeviceError when the device fails or can't run it."""
    if divergence and on is None:
        raise UsageError("one model on one machine can't differ", hint="add --on DEVICE")
    recorder = Recorder(progress)
    wanted = Wanted(metric, max_drop, max_latency_ms, min_speedup, max_size_ratio)
    with ExitStack() as stack:
        folder = stack.enter_context(unpacked(Path(package)))
        device = stack.enter_context(open_device(registry.address_of(on))) if on else None
        with recorder.step("verify"):
            variant, provider, on_device = _verified(folder, device)
        shipped = read_directory(folder)
        origin = str(reference or variant.report.source.get("origin", ""))
        counts = tuple(threads) if threads is not None else load_target("local").threads
        if not origin or (reference is None and not Path(origin).is_file() and ":" not in origin):
            raise PackageError(f"the float model {origin!r} isn't here", hint="name it with --reference")
        spec = samples_spec(evaluation, synthetic, "evaluation", "-e")
        model, samples, source = _compared(origin, variant, spec, preprocessing, shipped.preprocessing, recorder)
        if variant.buckets:
            samples = fitted(samples, variant.buckets, "evaluation", recorder)
        with recorder.step("validate", len(samples)):
            validation = measure(
                model, variant.model, samples, metric=metric, limits=wanted.limits(), threads=counts,
                provider=provider, seed=seed, device=device, opener=opener(variant.buckets),
                kind=namer(variant.buckets),
                feeds=[at_largest(feed, variant.buckets) for feed in take(samples, TIMED_SAMPLES)],
            )  # fmt: skip
        apart: tuple[Divergence, ...] = ()
        if device and (divergence or not all(check.passed for check in on_device)):
            with recorder.step("divergence", len(variant.golden.inputs)):
                found = parted(device, variant.model, provider, variant.golden.inputs)
            apart, on_device = found.rows, (*on_device, parting(found))
        load: dict[str, Any] = {}
        if sustained is not None:
            place, feeds = device or stack.enter_context(open_device("local")), [*take(samples, TIMED_SAMPLES)]
            with recorder.step("sustained", len(feeds)):
                load, checks = kept_up(place, variant.model, provider, feeds, max(counts), sustained, recorder)
            on_device = (*on_device, *checks)
        told = {"device": {**facts_of(device), "states": list(validation.states)}} if device else {}
    return replace(
        variant.report, checks=(*on_device, *validation.checks), latency=timing_facts(validation.timings),
        steps=tuple(recorder.steps), notices=(*variant.report.notices, *recorder.notices),
        environment=environment() | told, samples={"evaluation": samples_facts(samples)}, candidates=(),
        source=source, divergence=apart, sustained=load,
    )  # fmt: skip


def _compared(
    origin: str, variant: Variant, spec: str, given: str | Path | None, shipped: Mapping[str, Any], recorder: Recorder
) -> tuple[ir.Model, Samples, dict[str, Any]]:
    """The model to compare with, the samples, and what a report says of it. One of a package that takes pixels gets
    the same normalisation inside."""
    model, info = read_model(origin, opset=load_target("local").opset)
    inside = of_package(variant.report.source)
    made = shipped if inside is None else inside.to_dict()
    samples = load_samples(spec, model, preprocessing=preprocessing_of(given, made))
    if inside is None:
        return model, samples, source_facts(info, model)
    model, samples = taken(model, inside, samples, recorder)
    return model, samples, {**source_facts(info, model), "pixels": inside.to_dict()}


def _verified(folder: Path, device: Device | None) -> tuple[Variant, Provider, tuple[Check, ...]]:
    """What of a package is measured, how it is opened, and what was checked on the way. PackageError when a byte is
    altered."""
    if device is None:
        verify_package(folder)
        first = read_directory(folder).variants[0]
        return first, replace(CPU, session=dict(first.report.target.get("session", {}))), ()
    check_files(folder)
    variant, provider = fitting(folder, device)
    return variant, provider, ran(device, variant, provider)


def bench(
    models: Sequence[str | Path],
    *,
    target: str = "local",
    threads: Sequence[int] | None = None,
    repeats: int | None = None,
    inputs: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Time files or packages against each other on random inputs, interleaved; ratios are to the first."""
    chosen, recorder = target_of(target, threads), Recorder(progress)
    paths = [model_file(Path(model)) for model in models]
    configs = [
        TimedConfig(str(model), path, provider=chosen.execution) for model, path in zip(models, paths, strict=True)
    ]
    pins = pins_of(inputs)
    session = open_session(paths[0], provider=chosen.execution)
    feed = feeds_like(session, seed)
    feed |= {name: np.resize(feed[name], shape).astype(feed[name].dtype) for name, shape in pins.items()}
    rounds: dict[str, Any] = {} if repeats is None else {"rounds": repeats, "min_seconds": 0.0, "max_seconds": 0.0}
    timings: dict[str, dict[int, Timing]] = {config.name: {} for config in configs}
    checks = []
    for count in chosen.threads:
        with recorder.step(f"time, {count} threads"):
            run = compare(configs, [feed], threads=count, seed=seed, **rounds)
        for config in configs:
            timings[config.name][count] = run[config.name]
        for config in configs[1:]:
            found = ratio(run[config.name], run[configs[0].name])
            checks.append(
                Check(f"latency_ratio {config.name} {count}t", found.value, "", found.low, found.high,
                      samples=len(run[config.name].laps_ms), note=f"to {configs[0].name}")
            )  # fmt: skip
    return Report(
        source={"origin": [str(model) for model in models]}, target=target_facts(chosen), recipe="bench",
        steps=tuple(recorder.steps), checks=tuple(checks), environment=environment(),
        latency=timing_facts(timings),
        samples={"evaluation": {"origin": "random", "synthetic": True}},
    )  # fmt: skip


def _coverage(quantizer: Quantizer, plan: Plan) -> Coverage:
    """What the target has integer kernels for, from the oracle alone: whether they pay is measured by export."""
    total = sum(quantizer.work(atom) for atom in quantizer.atoms)
    integer = [atom for atom in quantizer.atoms if atom.name in plan.integer]
    movers = sum(atom.verdict.kind == "mover" for atom in integer)
    islands = tuple(
        Island(atom.name, atom.head.op_type, plan.left_float[atom.name], quantizer.work(atom))
        for atom in quantizer.atoms
        if atom.name in plan.left_float and any(query.is_float(value) for value in atom.outputs)
    )
    kernels: dict[str, int] = {}
    for kernel in plan.integer.values():
        kernels[kernel] = kernels.get(kernel, 0) + 1
    share = sum(quantizer.work(atom) for atom in integer) / total if total else 0.0
    return Coverage(share, len(integer) - movers, movers, len(islands), 0, islands, (), kernels)
