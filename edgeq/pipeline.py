"""The flow, a call a stage, in order: read, sample, prepare, settle, validate, package, report (L10)."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from edgeq import recipe as recipes
from edgeq import steps
from edgeq.analyse.layers import layers
from edgeq.analyse.store import Store
from edgeq.errors import PackageError, UsageError, did_you_mean
from edgeq.ir import io, query
from edgeq.lower.emit import describe, emit
from edgeq.packaging import PACKAGES, Golden, Package, check_free, read_directory, verify_package
from edgeq.report.progress import Progress
from edgeq.report.record import Check, Coverage, Island, Report
from edgeq.report.recorder import Recorder
from edgeq.run.preprocess import Preprocessing
from edgeq.run.record import Feed, Samples, Timing
from edgeq.run.samples import load_samples, split, take
from edgeq.run.session import feeds_like, open_session, run_session
from edgeq.run.timing import TimedConfig, compare, ratio
from edgeq.search.settle import Draft, Settled, settle
from edgeq.source import SourceInfo, read_model
from edgeq.target.detect import cpu_flags
from edgeq.target.load import load_target
from edgeq.target.oracle import Oracle
from edgeq.target.record import Target
from edgeq.validator import Judge, Validation, latency, refuse_unmeasured, size
from edgeq.validator import validate as measure
from edgeq.version import __version__

HELD_OUT = 0.25  # share of the calibration samples kept for evaluation when none are given
GOLDEN_SAMPLES = 3
TIMED_SAMPLES = 4
LAYER_SAMPLES = 4
VALIDATE_SECONDS = 15.0  # a thread count
SYNTHETIC_SAMPLES = 32


@dataclass(frozen=True)
class Wanted:
    """What the user holds the result to; None is left to edgeq. Ratios are to the best float configuration."""

    metric: str | None = None
    max_drop: float | None = None
    max_latency_ms: float | None = None
    min_speedup: float | None = None
    max_size_ratio: float | None = None

    def limits(self) -> dict[str, float]:
        """As limits on checks by name."""
        name = (self.metric or "top1").rpartition(":")[2]
        found = {
            f"{name}_drop": self.max_drop,
            "latency_ms": self.max_latency_ms,
            "latency_ratio": None if self.min_speedup is None else 1 / self.min_speedup,
            "size_ratio": self.max_size_ratio,
        }
        return {key: value for key, value in found.items() if value is not None}


def export(
    model: str | Path | ir.Model,
    *,
    out: str | Path,
    target: str = "local",
    recipe: str = recipes.DEFAULT,
    calibration: str | None = None,
    evaluation: str | None = None,
    metric: str | None = None,
    max_drop: float | None = None,
    max_latency_ms: float | None = None,
    min_speedup: float | None = None,
    max_size_ratio: float | None = None,
    threads: Sequence[int] | None = None,
    synthetic: bool = False,
    preprocessing: str | Path | None = None,
    inputs: Sequence[str] = (),
    limit: int | None = None,
    dump: str | Path | None = None,
    form: str = "dir",
    force: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Make ``model`` small and fast for ``target``, prove it, and write a package to ``out``.

    ``calibration`` and ``evaluation`` are what ``run.samples.load_samples`` takes; without the latter a held-out part
    of the former is used. Drops are in the metric's own unit (top1: a fraction, .005 is half a point). What ships is
    what was measured: when no quantized model keeps the limits and beats float, the best float model ships and the
    report says so. Raises an EdgeqError for what the caller can mend.
    """
    wanted = Wanted(metric, max_drop, max_latency_ms, min_speedup, max_size_ratio)
    out, recorder = Path(out), Recorder(progress)
    chosen_target = _target(target, threads)
    plan = recipes.parse(recipe, steps.KNOWN)
    _check_form(form)
    check_free(out, force=force)
    source, info, calibrate, held_out = _read(
        model, chosen_target, calibration, evaluation, synthetic, preprocessing, inputs, limit, seed, recorder
    )
    context = steps.Context(
        chosen_target, Oracle(chosen_target), calibrate, recorder, Store(), max(chosen_target.threads), seed
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True)))
        reference = folder / "reference.onnx"
        emit(source, chosen_target, reference)
        prepared = steps.apply(plan, source, context)
        judge = Judge(
            reference, held_out, metric=metric, limits=wanted.limits(), threads=max(chosen_target.threads),
            provider=chosen_target.provider, config=chosen_target.session,
        )  # fmt: skip
        floats = _floats(source, prepared, reference, judge, context, folder)
        feeds = [*take(held_out, TIMED_SAMPLES)]
        settled = settle(floats, prepared.quantizer, judge, feeds, context, folder)
        validation = _validate(settled, floats, judge, held_out, wanted, context)
        report = _report(settled, validation, info, plan, prepared, calibrate, held_out, context)
        if dump is not None:
            _dump(Path(dump), source, prepared, settled)
        written = _package(settled, report, source, held_out, out, form, force)
    artifact = None if report.artifact is None else replace(report.artifact, path=str(written / "model.onnx"))
    return replace(report, artifact=artifact)


def inspect(model: str | Path | ir.Model, *, target: str = "local", inputs: Sequence[str] = ()) -> Report:
    """What ``model`` is made of and what ``target`` could run in integers, without data. Nothing is written."""
    chosen, recorder = _target(target, None), Recorder()
    source, info = read_model(model, opset=chosen.opset, pins=_pins(inputs))
    context = steps.Context(chosen, Oracle(chosen), _random_samples(source, 1, 0), recorder)
    prepared = steps.apply(recipes.parse("canonicalize; quantize", steps.KNOWN), source, context)
    quantizer = prepared.quantizer
    assert quantizer is not None
    forecast = _forecast(quantizer)
    return Report(
        source=_source_facts(info, source), target=_target_facts(chosen), recipe="inspect", steps=tuple(recorder.steps),
        coverage=forecast, notices=tuple(recorder.notices), environment=_environment(),
        samples={"calibration": "random, shapes only"},
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
    progress: Progress | None = None,
) -> Report:
    """Measure a package again on this machine: digests and golden runs, then accuracy and latency against
    ``reference``, by default the model it was made from. Raises PackageError when the package is altered."""
    folder, recorder = Path(package), Recorder(progress)
    wanted = Wanted(metric, max_drop, max_latency_ms, min_speedup, max_size_ratio)
    with recorder.step("verify"):
        verify_package(folder)
    shipped = read_directory(folder)
    origin = str(reference or shipped.report.source.get("origin", ""))
    chosen = replace(load_target("local"), session=dict(shipped.report.target.get("session", {})))
    chosen = chosen if threads is None else replace(chosen, threads=tuple(threads))
    if not origin or (reference is None and not Path(origin).is_file() and ":" not in origin):
        raise PackageError(f"the float model {origin!r} isn't here", hint="name it with --reference")
    model, info = read_model(origin, opset=chosen.opset)
    spec = _spec(evaluation, synthetic, "evaluation", "-e")
    samples = load_samples(spec, model, preprocessing=_preprocessing(preprocessing, shipped.preprocessing))
    with recorder.step("validate", len(samples)):
        validation = measure(
            model, shipped.model, samples, metric=metric, limits=wanted.limits(), threads=chosen.threads,
            provider=chosen.provider, config=chosen.session, seed=seed,
        )  # fmt: skip
    return replace(
        shipped.report, checks=validation.checks, latency=_timings(validation), steps=tuple(recorder.steps),
        notices=(*shipped.report.notices, *recorder.notices), environment=_environment(),
        samples={"evaluation": _samples_facts(samples)}, candidates=(), source=_source_facts(info, model),
    )  # fmt: skip


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
    chosen, recorder = _target(target, threads), Recorder(progress)
    paths = [_model_file(Path(model)) for model in models]
    configs = [
        TimedConfig(str(model), path, config=chosen.session, provider=chosen.provider)
        for model, path in zip(models, paths, strict=True)
    ]
    pins = _pins(inputs)
    session = open_session(paths[0], provider=chosen.provider)
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
        source={"origin": [str(model) for model in models]}, target=_target_facts(chosen), recipe="bench",
        steps=tuple(recorder.steps), checks=tuple(checks), environment=_environment(),
        latency=_threads_as_text(timings),
        samples={"evaluation": {"origin": "random", "synthetic": True}},
    )  # fmt: skip


# --- stages of export ------------------------------------------------------------------------------------------------


def _read(
    model: str | Path | ir.Model,
    target: Target,
    calibration: str | None,
    evaluation: str | None,
    synthetic: bool,
    preprocessing: str | Path | None,
    inputs: Sequence[str],
    limit: int | None,
    seed: int,
    recorder: Recorder,
) -> tuple[ir.Model, SourceInfo, Samples, Samples]:
    """The model, and samples to calibrate and to evaluate on."""
    spec = _spec(calibration, synthetic, "calibration", "-c")
    with recorder.step("read") as facts:
        source, info = read_model(model, opset=target.opset, pins=_pins(inputs))
        place = Path(str(model)).parent if isinstance(model, str | Path) and Path(model).is_file() else None
        settings: dict[str, Any] = {"preprocessing": _preprocessing(preprocessing), "model_folder": place}
        samples = load_samples(spec, source, limit=limit, **settings)
        if any(query.is_control_flow(node) for node in source.graph):
            pins = {**_fixed_shapes(samples), **_pins(inputs)}  # branches on shapes need the shapes
            source, info = read_model(model, opset=target.opset, pins=pins, example=_fixed_scalars(samples))
        facts.update(nodes=source.graph.num_nodes(), opset_found=info.opset, notes=info.notes)
    for name, value in info.fixed.items():
        recorder.warn("fixed-input", f"input {name!r} is {value} in every sample and was fixed: other values are wrong")
    if evaluation is not None:
        held_out = load_samples(evaluation, source, **settings)
    elif samples.synthetic:
        held_out = samples
    else:
        samples, held_out = split(samples, fraction=HELD_OUT, seed=seed)
        recorder.info("held-out", f"no evaluation data given: {len(held_out)} of the samples are held out for it")
    if samples.synthetic or held_out.synthetic:
        recorder.warn("synthetic", "random data was used: accuracy figures say nothing about real inputs")
    return source, info, samples, held_out


def _fixed_scalars(samples: Samples) -> Feed:
    """Inputs of one element that are equal in every sample."""
    first = samples.read(0)
    scalars = {name: array for name, array in first.items() if array.size == 1}
    for feed in samples:
        scalars = {name: array for name, array in scalars.items() if np.array_equal(array, feed[name])}
        if not scalars:
            break
    return scalars


def _fixed_shapes(samples: Samples) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs whose shape is the same in every sample."""
    shapes = {name: array.shape for name, array in samples.read(0).items()}
    for feed in samples:
        shapes = {name: shape for name, shape in shapes.items() if feed[name].shape == shape}
    return shapes


def _floats(
    source: ir.Model, prepared: steps.Prepared, reference: Path, judge: Judge, context: steps.Context, folder: Path
) -> list[Draft]:
    """The float files that could ship: as read, and as prepared when that kept the results."""
    drafts = [Draft("float as given", reference, source)]
    if prepared.model is not source:
        path = folder / "prepared.onnx"
        emit(prepared.model.clone(), context.target, path)
        with context.recorder.step("judge") as facts:
            facts["draft"] = "float prepared"
            draft = Draft("float prepared", path, prepared.model, checks=tuple(judge(path)))
        if draft.accurate:
            drafts.append(draft)
        else:
            context.recorder.warn("prepared-differs", "the prepared float model misses the limits and is not used")
    return drafts


def _validate(
    settled: Settled, floats: Sequence[Draft], judge: Judge, held_out: Samples, wanted: Wanted, context: steps.Context
) -> Validation:
    """The choice measured once more, longer and beside every float file: what ships is what this says."""
    target, chosen, limits = context.target, settled.chosen, wanted.limits()
    configs = [TimedConfig(draft.name, draft.path, config=target.session, provider=target.provider) for draft in floats]
    artifact = TimedConfig("artifact", chosen.path, config=target.session, provider=target.provider)
    with context.recorder.step("validate", len(held_out)):
        accurate = chosen.checks or judge(chosen.path)
        refuse_unmeasured(limits, accurate)
        fast = latency(
            configs, artifact, [*take(held_out, TIMED_SAMPLES)], threads=target.threads, limits=limits,
            max_seconds=VALIDATE_SECONDS, seed=context.seed,
        )  # fmt: skip
    checks = (*accurate, *fast.checks, *size(floats[0].path, chosen.path, limits))
    if chosen.plan is None:
        checks = tuple(map(_against_itself, checks))
    return Validation(checks, fast.timings)


def _against_itself(check: Check) -> Check:
    """A float file that ships is compared with itself: its ratio is noise around 1 and no limit of ours may fail it."""
    if not check.name.startswith("latency_ratio") or check.limit != 1.0:
        return check
    return replace(check, limit=None, passed=True, note=f"{check.note}; the float model itself ships")


def _package(
    settled: Settled, report: Report, source: ir.Model, held_out: Samples, out: Path, form: str, force: bool
) -> Path:
    """Write the package whole or not at all."""
    golden = _golden(settled, held_out)
    words = {key: value for key, value in source.metadata_props.items() if value}
    package = Package(settled.chosen.path, report, golden, held_out.preprocessing, (), words)
    return PACKAGES[form](package, out, force=force)


def _golden(settled: Settled, held_out: Samples) -> Golden:
    """Runs an installed package must repeat. Another CPU may round elsewhere, but not by more than quantization itself
    errs: the tolerance is the largest distance of the shipped file from float, at least 1e-4 of the output's peak."""
    shipped, exact = open_session(settled.chosen.path), open_session(settled.best_float.path)
    feeds = [*take(held_out, GOLDEN_SAMPLES)]
    outputs = [run_session(shipped, feed) for feed in feeds]
    truths = [run_session(exact, feed) for feed in feeds]
    tolerances: dict[str, float] = {}
    for output, truth in zip(outputs, truths, strict=True):
        for name, array in output.items():
            if array.dtype.kind == "f" and array.shape == truth[name].shape:
                wide = array.astype(np.float64)
                distance = float(np.abs(wide - truth[name]).max(initial=0.0))
                allowed = max(distance, 1e-4 * float(np.abs(wide).max(initial=0.0)), 1e-6)
                tolerances[name] = max(tolerances.get(name, 0.0), allowed)
            else:
                tolerances.setdefault(name, 0.0)
    return Golden(tuple(feeds), tuple(outputs), tolerances)


def _dump(folder: Path, source: ir.Model, prepared: steps.Prepared, settled: Settled) -> None:
    """Every intermediate model, numbered in order."""
    folder.mkdir(parents=True, exist_ok=True)
    stages = [
        ("source", source),
        *prepared.intermediates,
        (settled.chosen.name.replace(" ", "-"), settled.chosen.model),
    ]
    for index, (name, model) in enumerate(stages):
        io.write(model, folder / f"{index:02d}-{name}.onnx")


# --- the report ------------------------------------------------------------------------------------------------------


def _report(
    settled: Settled, validation: Validation, info: SourceInfo, plan: recipes.Recipe, prepared: steps.Prepared,
    calibrate: Samples, held_out: Samples, context: steps.Context,
) -> Report:  # fmt: skip
    chosen, recorder = settled.chosen, context.recorder
    rows: tuple[dict[str, Any], ...] = ()
    if chosen.plan is not None:
        with recorder.step("layers"):
            feeds = [*take(held_out, LAYER_SAMPLES)]
            rows = layers(prepared.model, chosen.model, chosen.plan, feeds, context.target)
    return Report(
        source=_source_facts(info, prepared.model),
        target=_target_facts(context.target),
        recipe=str(plan),
        artifact=describe(chosen.model, context.target, chosen.path),
        steps=tuple(recorder.steps),
        checks=validation.checks,
        coverage=chosen.coverage or _float_coverage(chosen, prepared.quantizer),
        notices=tuple(recorder.notices),
        environment=_environment(),
        samples={"calibration": _samples_facts(calibrate), "evaluation": _samples_facts(held_out)},
        latency=_timings(validation),
        layers=rows,
        candidates=settled.trials,
    )


def _float_coverage(draft: Draft, quantizer: steps.Quantizer | None) -> Coverage:
    """Coverage of a shipped float model: every multiply-accumulate is float because the model ships as float."""
    count = draft.model.graph.num_nodes()
    islands = () if quantizer is None else tuple(
        Island(atom.name, atom.head.op_type, "the float model ships", quantizer.work(atom))
        for atom in quantizer.atoms if quantizer.work(atom)
    )  # fmt: skip
    return Coverage(0.0, 0, 0, count, 0, islands)


def _forecast(quantizer: steps.Quantizer) -> Coverage:
    """What the first plan would run in integers, from the oracle alone."""
    plan = quantizer.plan()
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


def _source_facts(info: SourceInfo, model: ir.Model) -> dict[str, Any]:
    return {
        "origin": info.origin, "kind": info.kind, "opset": info.opset, "digest": info.digest, "notes": list(info.notes),
        "fixed": dict(info.fixed), "nodes": model.graph.num_nodes(), "weight_bytes": io.weight_bytes(model),
    }  # fmt: skip


def _target_facts(target: Target) -> dict[str, Any]:
    facts = asdict(target)
    return {
        **facts, "activations": str(target.activations), "weights": str(target.weights),
        "isa": list(target.isa), "threads": list(target.threads),
    }  # fmt: skip


def _samples_facts(samples: Samples) -> dict[str, Any]:
    return {
        "origin": samples.origin, "count": len(samples), "digest": samples.digest, "synthetic": samples.synthetic,
        "labelled": samples.labels is not None,
    }  # fmt: skip


def _timings(validation: Validation) -> dict[str, Any]:
    return _threads_as_text(validation.timings)


def _threads_as_text(timings: Mapping[str, Mapping[int, Timing]]) -> dict[str, Any]:
    return {name: {str(count): asdict(timing) for count, timing in runs.items()} for name, runs in timings.items()}


def _environment() -> dict[str, Any]:
    return {
        "edgeq": __version__, "onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__,
        "python": platform.python_version(), "machine": platform.machine(), "system": platform.system(),
        "cores": os.cpu_count(), "vnni": bool({"avx512_vnni", "avx_vnni"} & cpu_flags()),
    }  # fmt: skip


# --- what the user gave ----------------------------------------------------------------------------------------------


def _target(name: str, threads: Sequence[int] | None) -> Target:
    target = load_target(name)
    return target if threads is None else replace(target, threads=tuple(threads))


def _check_form(form: str) -> None:
    if form not in PACKAGES:
        raise UsageError(f"unknown package form {form!r}", hint=did_you_mean(form, list(PACKAGES)))


def _spec(spec: str | None, synthetic: bool, what: str, flag: str) -> str:
    """The samples to use; random ones only when asked for."""
    if spec is None and synthetic:
        return f"synthetic:{SYNTHETIC_SAMPLES}"
    if spec is None:
        raise UsageError(f"no {what} data given", hint=f"give real samples with {flag}, or --synthetic for random ones")
    if spec.startswith("synthetic:") and not synthetic:
        raise UsageError(f"{what} data {spec!r} is random", hint="add --synthetic if random data is really meant")
    return spec


def _preprocessing(given: str | Path | None, shipped: Mapping[str, Any] | None = None) -> Preprocessing | Path | None:
    if given is not None:
        return Path(given)
    return Preprocessing.from_dict(shipped) if shipped else None


def _pins(inputs: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """``x=1,3,224,224`` -> {"x": (1, 3, 224, 224)}."""
    pins = {}
    for text in inputs:
        name, equals, shape = text.partition("=")
        words = shape.split(",")
        if not equals or not name or not all(word.strip().isdigit() for word in words):
            raise UsageError(f"can't read input shape {text!r}", hint="write NAME=1,3,224,224")
        pins[name] = tuple(int(word) for word in words)
    return pins


def _random_samples(model: ir.Model, count: int, seed: int) -> Samples:
    return load_samples(f"synthetic:{count}:{seed}", model)


def _model_file(path: Path) -> Path:
    """A model file, or the one inside a package."""
    return read_directory(path).model if path.is_dir() else path
