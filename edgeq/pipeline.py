"""The flow, a call a stage, in order: read, sample, prepare, settle, validate, package, report (L10)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeq import recipe as recipes
from edgeq import steps
from edgeq.analyse.layers import layers
from edgeq.analyse.saturation import certify
from edgeq.analyse.store import Store
from edgeq.bucketing import at_largest, bucketed, check_buckets, namer, one_each, opener, padding_told, placement_told
from edgeq.context import Context
from edgeq.facts import environment, samples_facts, source_facts, target_facts, timing_facts
from edgeq.given import (
    Wanted,
    check_form,
    preprocessing_of,
    read_with_samples,
    samples_settings,
    samples_spec,
    statistics_of,
    target_of,
)
from edgeq.ir import io
from edgeq.ir.text import to_text
from edgeq.lower.emit import describe, emit
from edgeq.packaging import (
    PACKAGES,
    Golden,
    Package,
    check_free,
    check_writable,
    labels_of,
    package_in,
    postprocessing_of,
    sharing_bytes,
)
from edgeq.pixels import as_pixels, normalisation, taken
from edgeq.quantizer import Quantizer
from edgeq.report.progress import Progress
from edgeq.report.record import Check, Coverage, Island, Report
from edgeq.report.recorder import Recorder
from edgeq.report.rows import saturation_line
from edgeq.rewrite.halve import rounded
from edgeq.rewrite.pixels import picture_of
from edgeq.run.record import Feed, Samples
from edgeq.run.samples import load_samples, split, take
from edgeq.run.session import Session, open_session, run_session
from edgeq.run.timing import TimedConfig
from edgeq.search.draft import Draft
from edgeq.search.settle import Settled, settle
from edgeq.source import SourceInfo
from edgeq.target import kernels
from edgeq.target.detect import elsewhere
from edgeq.target.oracle import Oracle
from edgeq.target.record import Target
from edgeq.validator import Judge, Validation, latency, refuse_unmeasured, size

HELD_OUT = 0.25  # share of the calibration samples kept for evaluation when none are given
GOLDEN_SAMPLES = 3
TIMED_SAMPLES = 4
LAYER_SAMPLES = 4
VALIDATE_SECONDS = 15.0  # a thread count


def export(
    model: str | Path | ir.Model,
    *,
    out: str | Path,
    target: str = "local",
    recipe: str = recipes.DEFAULT,
    calibration: str | None = None,
    evaluation: str | None = None,
    statistics: Sequence[str | Path] = (),
    metric: str | None = None,
    max_drop: float | None = None,
    max_latency_ms: float | None = None,
    min_speedup: float | None = None,
    max_size_ratio: float | None = None,
    threads: Sequence[int] | None = None,
    synthetic: bool = False,
    preprocessing: str | Path | None = None,
    pixels: bool = False,
    labels: str | Path | None = None,
    postprocessing: str | Path | None = None,
    inputs: Sequence[str] = (),
    buckets: Sequence[str] = (),
    pad: Sequence[str] = (),
    limit: int | None = None,
    dump: str | Path | None = None,
    form: str = "dir",
    force: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Make ``model`` small and fast for ``target``, prove it, and write a package to ``out``.

    ``calibration`` and ``evaluation`` are what ``run.samples.load_samples`` takes; without the latter a held-out part
    of the former is used. ``statistics``: files of ``edgeq observe`` that widen what calibration saw. With ``pixels``
    the package takes uint8 pictures: their normalisation goes into the model. ``buckets`` (``x=1,3,48,320`` or
    ``width=320``, one a text) are fixed shapes: a file each, with the same weights, and inputs are padded to the
    smallest that holds them, with 0 or what ``pad`` (``x=-1``) says. Drops are in the metric's own unit (top1:
    a fraction, .005 is half a point). What ships is what was measured: when no quantized model keeps the limits and
    beats float, the best float model ships and the report says so. Raises an EdgeqError for what the caller can mend.
    """
    wanted = Wanted(metric, max_drop, max_latency_ms, min_speedup, max_size_ratio)
    out, recorder = Path(out), Recorder(progress)
    chosen_target = target_of(target, threads)
    plan = recipes.parse(recipe, steps.KNOWN)
    check_form(form)
    check_buckets(buckets, pad, form, pixels=pixels)
    check_free(out, force=force)
    names = labels_of(labels)
    if dump is not None:
        check_writable(Path(dump) / "any")
    source, info, calibrate, held_out = _read(
        model, chosen_target, calibration, evaluation, synthetic, preprocessing, inputs, limit, seed, recorder,
        loose=bool(buckets),
    )  # fmt: skip
    shapes, calibrate, held_out = bucketed(source, buckets, pad, calibrate, held_out, chosen_target, recorder)
    how = normalisation(calibrate, preprocessing_of(preprocessing), source) if pixels else None
    if how is not None:
        held_out = as_pixels(held_out, str(picture_of(source).name), how)
        source, calibrate = taken(source, how, calibrate, recorder)
    more = statistics_of(statistics, info.digest)
    context = Context(
        chosen_target, Oracle(chosen_target), calibrate, recorder, Store(), max(chosen_target.threads), seed,
        elsewhere=None if more is None else (source, more), buckets=shapes,
    )  # fmt: skip
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True)))
        reference = folder / "reference.onnx"
        emit(source.clone(), chosen_target, reference)
        prepared = steps.apply(plan, source, context)
        judge = Judge(
            reference, held_out, metric=metric, limits=wanted.limits(), threads=max(chosen_target.threads),
            provider=chosen_target.execution, opener=opener(shapes), kind=namer(shapes),
        )  # fmt: skip
        after = postprocessing_of(
            postprocessing, names, _repeated(open_session(reference), take(held_out, GOLDEN_SAMPLES))
        )
        floats = _floats(source, prepared, reference, judge, context, folder)
        seen = floats[-1].checks or judge(floats[0].path, chosen_target.simulation)
        timed = not elsewhere(chosen_target)
        refuse_unmeasured(wanted.limits(), seen, timed=timed)  # before the long work, not after
        feeds = [at_largest(feed, shapes) for feed in take(held_out, TIMED_SAMPLES)]
        settled = settle(floats, prepared.quantizer, judge, feeds, context, folder)
        validation = _validate(settled, floats, judge, feeds, len(held_out), wanted, context)
        golden = _golden(settled.chosen, reference, held_out, context)
        report = _report(settled, validation, info, plan, prepared, calibrate, held_out, context)
        inside = {"pixels": how.to_dict()} if how else {"buckets": shapes} if shapes else {}
        report = replace(report, source={**report.source, **inside})
        if dump is not None:
            _dump(Path(dump), source, prepared, settled)
        words = {key: value for key, value in source.metadata_props.items() if value}
        package = Package(
            settled.chosen.path, report, golden, held_out.preprocessing, names, words, after,
            kernels=_libraries(settled.chosen.path),
        )  # fmt: skip
        written = PACKAGES[form](package, out, force=force)
    place = package_in(written) / "model.onnx" if written.is_dir() else written
    return replace(report, artifact=report.artifact and replace(report.artifact, path=str(place)))


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
    *,
    loose: bool,
) -> tuple[ir.Model, SourceInfo, Samples, Samples]:
    """The model, and samples to calibrate and to evaluate on."""
    settings = samples_settings(model, preprocessing)
    spec = samples_spec(calibration, synthetic, "calibration", "-c")
    source, info, samples = read_with_samples(
        model, spec, target, recorder, inputs=inputs, limit=limit, loose=loose, **settings
    )
    if evaluation is not None:
        held_out = load_samples(samples_spec(evaluation, synthetic, "evaluation", "-e"), source, **settings)
    elif samples.synthetic:
        held_out = samples
    else:
        samples, held_out = split(samples, fraction=HELD_OUT, seed=seed)
        recorder.info("held-out", f"no evaluation data given: {len(held_out)} of the samples are held out for it")
    if samples.synthetic or held_out.synthetic:
        recorder.warn("synthetic", "random data was used: accuracy figures say nothing about real inputs")
    return source, info, samples, held_out


def _floats(
    source: ir.Model, prepared: steps.Prepared, reference: Path, judge: Judge, context: Context, folder: Path
) -> list[Draft]:
    """The float files that could ship: as read, and as prepared when that kept the results."""
    drafts = [Draft("float as given", reference, source)]
    if context.buckets:
        drafts = [_padded(source, judge, context, folder)]
    if prepared.model is not source:
        path, proof = folder / "prepared.onnx", folder / "prepared-rounded.onnx" if prepared.halved else None
        lowered = context.lower(prepared.model)
        context.emit(lowered.clone(), path)
        if proof is not None:
            context.emit(rounded(lowered), proof)
        with context.recorder.step("judge") as facts:
            facts["draft"] = "float prepared"
            checks = tuple(judge(proof or path, context.target.simulation))
            draft = Draft("float prepared", path, prepared.model, checks=checks, asked=prepared.stored, proof=proof)
        if draft.accurate:
            drafts.append(draft)
        else:
            text = f"the prepared float model misses the limits and is not used: {draft.missed}"
            context.recorder.warn("prepared-differs", text)
    return drafts


def _padded(source: ir.Model, judge: Judge, context: Context, folder: Path) -> Draft:
    """The float file in its buckets, and a notice of what padding alone does to it."""
    path = folder / "float.onnx"
    context.emit(source, path)
    with context.recorder.step("judge") as facts:
        facts["draft"] = "float as given"
        draft = Draft("float as given", path, source, checks=tuple(judge(path, context.target.simulation)))
    padding_told(draft.checks, draft.missed, context.recorder)
    return draft


def _validate(
    settled: Settled, floats: Sequence[Draft], judge: Judge, feeds: Sequence[Feed], count: int, wanted: Wanted,
    context: Context,
) -> Validation:  # fmt: skip
    """The choice measured once more, longer and beside every float file: what ships is what this says."""
    target, chosen, limits = context.target, settled.chosen, wanted.limits()
    sizes = size(floats[0].path, chosen.path, limits, found=_sharing(chosen.path, context))
    if elsewhere(target):
        with context.recorder.step("validate", count):
            accurate = _accuracy(chosen, judge, target)
        return Validation((*accurate, *sizes), {})
    configs = [TimedConfig(draft.name, draft.path, provider=target.execution) for draft in floats]
    artifact = TimedConfig("artifact", chosen.path, provider=target.execution)
    with context.recorder.step("validate", count):
        accurate = _accuracy(chosen, judge, target)
        fast = latency(
            configs, artifact, feeds, threads=target.threads, limits=limits,
            max_seconds=VALIDATE_SECONDS, seed=context.seed,
        )  # fmt: skip
    checks = (*accurate, *fast.checks, *sizes)
    if chosen.plan is None:
        checks = tuple(map(_against_itself, checks))
    return Validation(checks, fast.timings)


def _libraries(model: Path) -> dict[str, Path]:
    """The library of edgeq's kernels that ``model`` was measured with, if it uses any, by the system it is for."""
    library = kernels.here() if kernels.uses(model) else None
    return {kernels.system(): library} if isinstance(library, Path) else {}


def _sharing(path: Path, context: Context) -> int | None:
    """Bytes of all files of the buckets, with weights once; None without buckets."""
    return sharing_bytes(context.files(path)) if context.buckets else None


def _against_itself(check: Check) -> Check:
    """A float file that ships is compared with itself: its ratio is noise around 1 and no limit of ours may fail it."""
    if not check.name.startswith("latency_ratio") or check.limit != 1.0:
        return check
    return replace(check, limit=None, passed=True, note=f"{check.note}; the float model itself ships")


def _repeated(session: Session, samples: Samples) -> Golden:
    """Runs of a file, without tolerances."""
    feeds = [*samples]
    return Golden(tuple(feeds), tuple(run_session(session, feed) for feed in feeds), {})


def _accuracy(chosen: Draft, judge: Judge, target: Target) -> tuple[Check, ...]:
    """Accuracy on the target's provider: float files were judged on the CPU so far, if at all."""
    judged = chosen.plan is not None or target.execution == target.simulation
    return (judged and chosen.checks) or judge(chosen.path)


def _golden(chosen: Draft, reference: Path, held_out: Samples, context: Context) -> Golden:
    """Runs an installed package must repeat. Another CPU may round elsewhere, but not by more than quantization itself
    errs: the tolerance is the largest distance of the shipped file, or its proof, from the float model as read, and at
    least 1e-4 of the output's peak."""
    opened = opener(context.buckets)
    session = opened(chosen.path, provider=context.target.execution)
    placement_told(session, context.buckets, context.recorder)
    some = one_each(held_out, context.buckets) if context.buckets else take(held_out, GOLDEN_SAMPLES)
    shipped = _repeated(session, some)
    exact = _repeated(open_session(reference), some)
    proved = _repeated(opened(chosen.proof), some).outputs if chosen.proof is not None else ()
    tolerances: dict[str, float] = {}
    for output, truth in zip((*shipped.outputs, *proved), exact.outputs * (2 if proved else 1), strict=True):
        for name, array in output.items():
            if array.dtype.kind == "f" and array.shape == truth[name].shape:
                wide = array.astype(np.float64)
                distance = float(np.abs(wide - truth[name]).max(initial=0.0))
                allowed = max(distance, 1e-4 * float(np.abs(wide).max(initial=0.0)), 1e-6)
                tolerances[name] = max(tolerances.get(name, 0.0), allowed)
            else:
                tolerances.setdefault(name, 0.0)
    return replace(shipped, tolerances=tolerances)


def _dump(folder: Path, source: ir.Model, prepared: steps.Prepared, settled: Settled) -> None:
    """Every intermediate model, numbered in order, as a file and as text to compare."""
    folder.mkdir(parents=True, exist_ok=True)
    stages = [("source", source), *prepared.intermediates]
    if settled.quantizer is not None and settled.quantizer.model is not prepared.model:
        stages.append(("evened", settled.quantizer.model))
    stages.append((settled.chosen.name.replace(" ", "-"), settled.chosen.model))
    stages.append(("shipped", io.read(settled.chosen.path)))
    for index, (name, model) in enumerate(stages):
        io.write(model, folder / f"{index:02d}-{name}.onnx")
        (folder / f"{index:02d}-{name}.txt").write_text(to_text(model) + "\n", encoding="utf-8")


def _report(
    settled: Settled, validation: Validation, info: SourceInfo, plan: recipes.Recipe, prepared: steps.Prepared,
    calibrate: Samples, held_out: Samples, context: Context,
) -> Report:  # fmt: skip
    chosen, recorder = settled.chosen, context.recorder
    quantizer = settled.quantizer
    saturation = certify(chosen.model) if "avx2" in context.target.isa else None
    if saturation is not None and saturation.rows:
        recorder.info("saturation", saturation_line(saturation))
    rows: tuple[dict[str, Any], ...] = ()
    if chosen.plan is not None and quantizer is not None:
        with recorder.step("layers"):
            feeds = [*take(held_out, LAYER_SAMPLES)]
            rows = layers(quantizer.model, chosen.model, chosen.plan, feeds, context.target, quantizer.stats)
    return Report(
        source=source_facts(info, prepared.model),
        target=target_facts(context.target),
        recipe=str(plan),
        artifact=describe(chosen.model, context.target, chosen.path),
        steps=tuple(recorder.steps),
        checks=validation.checks,
        coverage=chosen.coverage or _float_coverage(chosen, quantizer),
        saturation=saturation,
        notices=tuple(recorder.notices),
        environment=environment(),
        samples={"calibration": samples_facts(calibrate), "evaluation": samples_facts(held_out)},
        latency=timing_facts(validation.timings),
        layers=rows,
        sensitivity=quantizer.noises if quantizer is not None else (),
        candidates=settled.trials,
    )


def _float_coverage(draft: Draft, quantizer: Quantizer | None) -> Coverage:
    """Coverage of a shipped float model: every multiply-accumulate is float because the model ships as float."""
    count = draft.model.graph.num_nodes()
    islands = () if quantizer is None else tuple(
        Island(atom.name, atom.head.op_type, "the float model ships", quantizer.work(atom))
        for atom in quantizer.atoms if quantizer.work(atom)
    )  # fmt: skip
    return Coverage(0.0, 0, 0, count, 0, islands)
