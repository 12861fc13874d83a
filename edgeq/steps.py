"""What a recipe can ask for: the one place where analyses meet rewrites (L9).

A float step is ``(Model, Context, *, options) -> Model``. ``quantize`` is different: it returns a Quantizer, because
which nodes end up integer is settled by measurement later, and each plan must be cheap to build again.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

import onnx_ir as ir

from edgeq.analyse import absorbing, equalizing, salient, smoothing
from edgeq.analyse.halves import DTYPES
from edgeq.analyse.observe import observe
from edgeq.analyse.rounding import round_weights
from edgeq.analyse.sensitivity import Probe, decibel
from edgeq.analyse.weights import nearest, snr_db, storable
from edgeq.context import Context
from edgeq.errors import RecipeError
from edgeq.halving import halved
from edgeq.ir import io, verify
from edgeq.num.fit import METHODS
from edgeq.num.formats import Float, Int, parse_format
from edgeq.num.quant import TENSOR, Coded, QParams, Quant, parse_quant
from edgeq.num.rounding import ROUNDERS
from edgeq.quantizer import BIASES, LEAST_REDUCTION, Quantizer
from edgeq.recipe import Recipe, Step
from edgeq.rewrite.absorb import absorb as absorb_model
from edgeq.rewrite.canonicalize import canonicalize as canonicalize_model
from edgeq.rewrite.equalize import equalize as equalize_model
from edgeq.rewrite.smooth import smooth as smooth_model
from edgeq.rewrite.weights import store_weights, ways_of
from edgeq.run.record import Samples
from edgeq.run.samples import split, take
from edgeq.target.oracle import Oracle

HELD, HELD_SAMPLES = 0.25, 16  # share of the samples, and how many of them, that judge and don't teach
EQUAL = 1e-5  # noise-to-signal power up to which two float models are one
SCALES = ("plain", "awq")  # of weights before they are rounded
LARGE = 1 << 18  # bytes of a table that is worth the nodes which decode its rows
FREE_DB, FREE_SAMPLES = 40.0, 16  # of SNR on the outputs, a hundredth of the amplitude; how many samples tell


def canonicalize(model: ir.Model, context: Context) -> ir.Model:
    """Fold, merge and re-fuse without changing results; what would change them is rolled back and named."""
    return context.rewrite("canonicalize", model, lambda model, feeds: canonicalize_model(model, feeds=feeds))


def smooth(model: ir.Model, context: Context) -> ir.Model:
    """Move outlier channels of activations into the weights of the products behind them (SmoothQuant, searched)."""
    if not smoothing.groups(model):
        return model
    with context.recorder.step("smooth") as facts:
        found = smoothing.search(model, context.calibration, context.target, threads=context.threads)
        facts.update(tensors=len(found), rows=sum(one.rows for one in found))
        if found:
            facts["gain_db"] = round(sum(s.after_db - s.before_db for s in found) / len(found), 1)
    result = smooth_model(model, found)
    known = {node.name for node in model.graph}
    added = [str(node.name) for node in result.graph if node.name not in known]
    context.keep_float.update(dict.fromkeys(added, "it evens out channels before they are rounded, not after"))
    return result


def equalize(model: ir.Model, context: Context) -> ir.Model:
    """Even out the channels between convolutions (cross-layer equalization), if the quantized outputs gain by it."""
    found = equalizing.pairs(model)
    if not found or len(context.calibration) < 2:
        return model
    learnt, probe = _taught_and_judged(model, context)
    with context.recorder.step("equalize", len(learnt)) as facts:
        if context.target.weights.block == TENSOR:
            chosen = equalizing.by_weights(model, found)
        else:
            tensors = [pair.tensor for pair in found]
            stats = observe(model, tensors, learnt, threads=context.threads, progress=context.recorder.progress)
            chosen = equalizing.search(found, stats)
        facts["pairs"] = len(chosen)
    if not chosen:
        return model
    result = equalize_model(model, chosen)
    if probe.noise(result) > EQUAL:  # a Clip cuts what the samples learnt from had not shown
        chosen = [one for one in chosen if not isfinite(one.pair.top)]
        result = equalize_model(model, chosen)
    facts["pairs"] = len(chosen)
    return result if chosen and _quieter(model, result, probe, context, facts) else model


def absorb(model: ir.Model, context: Context) -> ir.Model:
    """Move what is constant in a channel from its tensor into biases (high-bias absorption), if the quantized outputs
    gain by it."""
    found = absorbing.movable(model)
    if not found or len(context.calibration) < 2:
        return model
    learnt, probe = _taught_and_judged(model, context)
    with context.recorder.step("absorb", len(learnt)) as facts:
        stats = observe(model, list(found), learnt, threads=context.threads, progress=context.recorder.progress)
        shifts = absorbing.search(model, found, stats)
        result = absorb_model(model, shifts)
        if probe.noise(result) > EQUAL:  # a Relu cuts what the samples learnt from had not shown
            shifts = absorbing.search(model, absorbing.unbounded(found), stats)
            result = absorb_model(model, shifts)
        facts["tensors"] = len(shifts)
    return result if shifts and _quieter(model, result, probe, context, facts) else model


def _taught_and_judged(model: ir.Model, context: Context) -> tuple[Samples, Probe]:
    """The calibration samples that teach, and a probe of the float model on others."""
    learnt, held = split(context.calibration, fraction=HELD, seed=context.seed)
    return learnt, Probe(model, take(held, HELD_SAMPLES), context.target, context.threads)


def _quieter(model: ir.Model, result: ir.Model, probe: Probe, context: Context, facts: dict[str, Any]) -> bool:
    """Whether the quantized outputs have less noise in the second form, all that fuses in integers."""
    noise = [probe.noise(Quantizer(one, context, "auto").fused()[1]) for one in (model, result)]
    kept = noise[1] < LEAST_REDUCTION * noise[0]
    facts.update(snr_db=[round(decibel(value), 1) for value in noise], kept=kept)
    return kept


def half(model: ir.Model, context: Context, *, format: str = "target") -> ir.Model:
    """Nodes in 16-bit floats: f16, bf16, or what the target's kernels want. What a provider hasn't and what the format
    can't hold stays f32, with one cast a border. Inputs and outputs keep their types. Behind quantize: what that leaves
    float."""
    form = _halves(context, format)
    return model if form is None else halved(model, context, form)


def _halves(context: Context, format: str = "target") -> Float | None:
    """The 16-bit floats that are asked for; None, and a notice, where the target wants none."""
    form = parse_format(context.target.float_format if format == "target" else format)
    if isinstance(form, Float) and form in DTYPES:
        return form
    if format != "target":
        raise RecipeError(f"half(format={format}) is no 16-bit float", hint="use f16, bf16 or target")
    text = f"target {context.target.name!r} computes floats in {form}: nothing is converted"
    context.recorder.info("no-halves", f"{text} (half(format=f16) does it all the same)")
    return None


def embeddings(model: ir.Model, context: Context, *, format: str = "i8/channel") -> ir.Model:
    """Store large tables that rows are gathered from as codes, if the outputs can't tell. Whether the clock can is seen
    when the files race: without codes the float file as given is still there."""
    quant = parse_quant(format)
    large = {edge: p for edge, p in storable(model, quant, ["Gather"]).items() if _bytes(model, edge) >= LARGE}
    coded = {edge: one for edge, one in nearest(model, large).items() if ways_of(model, {edge: one})[edge] == "rows"}
    if not coded:
        return model
    with context.recorder.step("embeddings", len(coded)) as facts:
        result = store_weights(model, coded)
        probe = Probe(model, take(context.calibration, FREE_SAMPLES), context.target, context.threads)
        snr, sizes = decibel(probe.noise(result)), [io.weight_bytes(one) for one in (model, result)]
        kept = snr >= FREE_DB and sizes[1] < sizes[0]
        facts.update(format=str(quant), tables=len(coded), bytes_before=sizes[0], bytes_after=sizes[1])
        facts.update(snr_db=round(snr, 1), kept=kept)
    if not kept:
        return model
    _leave_float(model, result, coded, quant, context)
    return result


def _bytes(model: ir.Model, edge: tuple[str, int]) -> int:
    value = model.graph.node(edge[0]).inputs[edge[1]]
    return 0 if value is None or value.const_value is None else value.const_value.nbytes


def weights(
    model: ir.Model,
    context: Context,
    *,
    format: str = "u4/block32/asym",
    ops: str = "MatMul+Gemm",
    rounding: str = "nearest",
    scales: str = SCALES[0],
) -> ir.Model:
    """Weights of ``ops`` (MatMul, Gemm, Conv, Gather) in any number format; activations stay float. ``scales``: weights
    as they are, or with rows that large activations meet scaled up (awq)."""
    quant = parse_quant(format)
    if scales not in SCALES:
        raise RecipeError(f"weights(scales={scales}) is not known", hint="use " + " or ".join(SCALES))
    if scales == "awq":
        model = _scaled(model, storable(model, quant, ops.split("+"), leave=context.keep_float), context)
    wanted = storable(model, quant, ops.split("+"), leave=context.keep_float)
    with context.recorder.step("weights", len(wanted)) as facts:
        coded = round_weights(
            model, wanted, context.calibration, rounding=rounding, threads=context.threads,
            done=context.recorder.progress.advance,
        )  # fmt: skip
        result = store_weights(model, coded)
        ways = Counter(ways_of(model, coded).values())
        facts.update(
            format=str(quant), rounding=rounding, weights=len(coded), **{str(way): count for way, count in ways.items()}
        )
        facts.update(bytes_before=io.weight_bytes(model), bytes_after=io.weight_bytes(result))
        if coded:
            facts["snr_db"] = round(snr_db(model, coded), 1)
    if not coded:
        context.recorder.warn("nothing-to-store", f"no weight of {ops} has enough elements to be stored in {quant}")
    if ways["load"]:
        context.recorder.info(
            "decoded-at-load",
            f"{ways['load']} weights in {quant} are decoded when the model is loaded and take float's memory then: "
            "the runtime multiplies by no such codes",
        )
    _leave_float(model, result, coded, quant, context)
    return result


def _scaled(model: ir.Model, wanted: Mapping[tuple[str, int], QParams], context: Context) -> ir.Model:
    """The same results from weights that lose less when they are rounded."""
    with context.recorder.step("scale", len(wanted)) as facts:
        found = salient.search(model, wanted, context.calibration, context.target, threads=context.threads)
        facts["tensors"] = len(found)
        if found:
            facts["gain_db"] = round(sum(one.after_db - one.before_db for one in found) / len(found), 1)
    return smooth_model(model, found)


def _leave_float(
    model: ir.Model, result: ir.Model, coded: Mapping[tuple[str, int], Coded], quant: Quant, context: Context
) -> None:
    """No plan quantizes what reads or decodes stored weights."""
    known = {node.name for node in model.graph}
    added = [str(node.name) for node in result.graph if node.name not in known]
    readers = [name for name, _ in coded]
    context.keep_float.update(dict.fromkeys([*added, *readers], f"its weights are stored as {quant}"))


def quantize(
    model: ir.Model,
    context: Context,
    *,
    ranges: str = "auto",
    rounding: str = "nearest",
    bias: str = BIASES[0],
    relief: str = "0",
    activations: str = "target",
) -> Quantizer:
    """Integer weights and activations where the target has kernels. ``ranges``: auto (the model's best), search (or
    each tensor's best for what reads it) or one of `edgeq list methods`.
    ``rounding``: of weights. ``bias``: makes up for rounded weights, or layer by layer (sequential) for all errors
    before it. ``relief``: dB of noise to take off by leaving the most harmful nodes float.
    ``activations``: their mapping: the target's, or another such as u16/tensor/asym."""
    if ranges not in ("auto", "search", *METHODS):
        raise RecipeError(f"quantize(ranges={ranges}) is not a method", hint="use auto, search, " + ", ".join(METHODS))
    if rounding not in ROUNDERS:
        raise RecipeError(f"quantize(rounding={rounding}) is not known", hint="use " + ", ".join(ROUNDERS))
    if bias not in BIASES:
        raise RecipeError(f"quantize(bias={bias}) is not known", hint="use " + " or ".join(BIASES))
    if activations != "target":
        context = _with_activations(context, activations)
    return Quantizer(model, context, ranges, rounding, _decibels(relief), bias)


def _with_activations(context: Context, text: str) -> Context:
    """The same surroundings for a target whose activations are mapped as ``text`` says."""
    quant = parse_quant(text)
    if not isinstance(quant.format, Int) or quant.block != TENSOR:
        raise RecipeError(
            f"quantize(activations={text}) isn't an integer format with a scale a tensor", hint="use u16/tensor/asym"
        )
    target = replace(context.target, activations=quant)
    return replace(context, target=target, oracle=Oracle(target, context.oracle.path.parents[1]))


def _decibels(text: str) -> float:
    """An option in dB, from 0 to 60."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 60.0:
        raise RecipeError(f"quantize(relief={text}) is no number of dB from 0 to 60", hint="3 halves the noise's power")
    return value


StepFunction = Callable[..., Any]
STEPS: dict[str, StepFunction] = {
    "canonicalize": canonicalize,
    "smooth": smooth,
    "equalize": equalize,
    "absorb": absorb,
    "half": half,
    "embeddings": embeddings,
    "weights": weights,
    "quantize": quantize,
}


def options_of(function: StepFunction) -> frozenset[str]:
    """A step's keyword-only parameters are its options."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


READ_WEIGHTS = ("canonicalize", "smooth", "half")  # steps that see weights as numbers, or fold codes back into them
STORE = ("embeddings", "weights")  # steps that make codes of them
KNOWN = {name: options_of(function) for name, function in STEPS.items()}


@dataclass
class Prepared:
    """The float model after its steps, and the Quantizer when the recipe asks for one. ``stored``: by ``weights``, as
    the recipe asks; what ``embeddings`` stores costs nothing and asks for nothing. ``halved``: nodes are in 16 bits."""

    model: ir.Model
    quantizer: Quantizer | None = None
    stored: bool = False
    halved: bool = False
    intermediates: list[tuple[str, ir.Model]] = field(default_factory=list)


def apply(recipe: Recipe, model: ir.Model, context: Context) -> Prepared:
    """Run the steps in order. ``quantize`` must come last but for ``half``, those that store weights behind those that
    read them. Raises RecipeError otherwise."""
    prepared, stores = Prepared(model), ""
    for step in recipe.steps:
        prepared.stored |= step.name == "weights"
        if prepared.quantizer is not None and step.name != "half":
            raise RecipeError(f"step {step.name!r} stands behind quantize", hint="put quantize last, but for half")
        if stores and step.name in READ_WEIGHTS and prepared.quantizer is None:
            raise RecipeError(f"step {step.name!r} stands behind {stores}", hint=f"put {step.name} first")
        stores = step.name if step.name in STORE else stores
        if prepared.halved and step.name == "quantize":
            hint = "put half last: what quantize leaves float then computes in 16 bits"
            raise RecipeError("step 'quantize' stands behind half", hint=hint)
        result = _run(step, prepared.model, context)
        if step.name == "half" and result is not prepared.model:
            prepared.halved = True
            if prepared.quantizer is not None:
                prepared.quantizer.narrow = _halves(context, **step.options)
        if isinstance(result, Quantizer):
            prepared.quantizer = result
        else:
            verify.verify(result, step.name)
            prepared.model = result
            prepared.intermediates.append((step.name, result))
    return prepared


def _run(step: Step, model: ir.Model, context: Context) -> Any:
    return STEPS[step.name](model, context, **step.options)
