"""A model in 16-bit floats, or what stays float in a quantized one: what the analysis allows, asked of the provider,
rewritten, and tried (L9)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from edgeq.analyse import halves
from edgeq.analyse.cost import concrete_shapes, inferred_shapes
from edgeq.analyse.halves import DTYPES, Halves
from edgeq.analyse.observe import observe
from edgeq.analyse.sensitivity import Probe, decibel
from edgeq.context import CHECK_SAMPLES, Context
from edgeq.ir import io
from edgeq.num.formats import Float
from edgeq.rewrite.halve import halve, rounded
from edgeq.run.samples import take
from edgeq.target.detect import elsewhere
from edgeq.target.verdict import Verdict

TOLD_SAMPLES = 16  # that say how much noise 16 bits leave on the outputs
NAMED = 4  # nodes a notice names


@dataclass(frozen=True)
class Held:
    """What holds nodes of a float model in f32, however it is quantized: node -> why; constant -> the magnitude it is
    cut at. ``asked``: how many nodes the provider was asked about; ``between``: op type -> how many of them it computes
    in f32 between casts."""

    form: Float
    kept: Mapping[str, str]
    bounds: Mapping[str, float]
    asked: int
    between: Mapping[str, int]


def held(model: ir.Model, context: Context, form: Float) -> Held:
    """ONNX, the provider, constants and what calibration saw are asked in turn."""
    kept = halves.incapable(model, form)
    answers = _answers(model, kept, context, form)
    kept |= {
        str(node.name): f"{context.target.provider} has no {form} {node.op_type}: {answer.reason}"
        for node, answer in answers.items()
        if not answer.kernel
    }
    of_constants, bounds = halves.constants(model, form)
    stats = context.observe(model, halves.taps(model))
    kept |= halves.ranges(model, stats, form, bounds) | of_constants
    between = Counter(node.op_type for node, answer in answers.items() if answer.kernel == "Cast")
    return Held(form, kept, bounds, len(answers), between)


def halved(model: ir.Model, context: Context, form: Float) -> ir.Model:
    """The model with all that can be in ``form``; why the rest can't is in the report, node by node."""
    with context.recorder.step("half") as facts:
        why = held(model, context, form)
        chosen, result = narrowed(model, why, context)
        samples = take(context.calibration, TOLD_SAMPLES)
        noise = Probe(model, samples, context.target, context.threads).noise(rounded(result))
        facts.update(_counts(model, chosen, result), snr_db=round(decibel(noise), 1))
        facts.update(kept_f32=dict(chosen.kept), constants_cut=dict(chosen.bounds))
    if why.between and not elsewhere(context.target):
        facts["computed_in_f32"] = dict(why.between)
        count = sum(why.between.values())
        text = f"{count} of {why.asked} nodes have no {form} kernel in {context.target.provider}"
        hint = "weights(format=f16) makes a file as small that costs no time"
        context.recorder.warn("half-emulated", f"{text} and run in f32 between casts: no time is won here; {hint}")
    for why_not, count in Counter(chosen.kept.values()).items():
        some = [name for name, reason in chosen.kept.items() if reason == why_not][:NAMED]
        words = f"{count} nodes stay" if count > 1 else "a node stays"
        context.recorder.info(
            "kept-f32", f"{words} float32 ({', '.join(some)}{', …' if count > NAMED else ''}): {why_not}"
        )
    for name, bound in chosen.bounds.items():
        context.recorder.info("constant-cut", f"constant {name!r} is cut at {bound:g}: {form} holds nothing beyond")
    return result


def islands(model: ir.Model, why: Held, context: Context, integer: Collection[str]) -> ir.Model:
    """A model with Q/DQ and its nodes in 16-bit floats, but ``integer`` ones and what was held before they came."""
    with context.recorder.step("half") as facts:
        codes = dict.fromkeys(integer, "it computes on codes")
        chosen, result = narrowed(model, replace(why, kept={**why.kept, **codes}), context)
        facts.update(_counts(model, chosen, result))
    return result


def narrowed(model: ir.Model, why: Held, context: Context) -> tuple[Halves, ir.Model]:
    """The decision and the model; what leads to no numbers on a few samples is taken back."""
    few, dtype = take(context.calibration, CHECK_SAMPLES), DTYPES[why.form]
    shapes = concrete_shapes(model, context.calibration.read(0))
    taps = halves.taps(model)
    kept, before = {**halves.incapable(model, why.form), **why.kept}, observe(model, taps, few, threads=context.threads)
    while True:
        chosen = halves.decide(model, why.form, kept, why.bounds, shapes)
        result = halve(model, chosen.nodes, dtype, why.bounds)
        wrong = halves.broken(model, chosen, before, observe(rounded(result), taps, few, threads=context.threads))
        if not wrong:
            return chosen, result
        kept |= wrong


def _counts(model: ir.Model, chosen: Halves, result: ir.Model) -> dict[str, Any]:
    sizes = dict(zip(("bytes_before", "bytes_after"), map(io.weight_bytes, (model, result)), strict=True))
    return {"format": str(chosen.form), "nodes": len(chosen.nodes), "casts": _casts(result, model), **sizes}


def _answers(model: ir.Model, kept: Collection[str], context: Context, form: Float) -> dict[ir.Node, Verdict]:
    """What the provider says of each node that isn't ``kept``, in 16 bits."""
    wanted = {str(node.name) for node in model.graph} - set(kept)
    tried = halve(model, wanted, DTYPES[form])
    oracle = context.oracle.at(inferred_shapes(tried, context.example())) if context.buckets else context.oracle
    asked = [node for node in tried.graph if node.name in wanted and _touches(node, DTYPES[form])]
    return {node: oracle.in_types(node) for node in asked}


def _touches(node: ir.Node, dtype: ir.DataType) -> bool:
    return any(value is not None and value.dtype == dtype for value in (*node.inputs, *node.outputs))


def _casts(model: ir.Model, before: ir.Model) -> int:
    """How many casts a model has more."""
    now, then = (sum(node.op_type == "Cast" for node in one.graph) for one in (model, before))
    return now - then
