"""A model in 16-bit floats: what the analysis allows, asked of the provider, rewritten, and tried (L9)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
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

TOLD_SAMPLES = 16  # that say how much noise 16 bits leave on the outputs
NAMED = 4  # nodes a notice names


def halved(model: ir.Model, context: Context, form: Float) -> ir.Model:
    """The model with all that can be in ``form``; why the rest can't is in the report, node by node."""
    with context.recorder.step("half") as facts:
        chosen, result = _settled(model, context, form, facts)
        samples = take(context.calibration, TOLD_SAMPLES)
        noise = Probe(model, samples, context.target, context.threads).noise(rounded(result))
        facts.update(format=str(form), nodes=len(chosen.nodes), kept_f32=dict(chosen.kept), casts=_casts(result, model))
        facts.update(constants_cut=dict(chosen.bounds), snr_db=round(decibel(noise), 1))
        facts.update(bytes_before=io.weight_bytes(model), bytes_after=io.weight_bytes(result))
    for why, count in Counter(chosen.kept.values()).items():
        some = [name for name, reason in chosen.kept.items() if reason == why][:NAMED]
        words = f"{count} nodes stay" if count > 1 else "a node stays"
        context.recorder.info("kept-f32", f"{words} float32 ({', '.join(some)}{', …' if count > NAMED else ''}): {why}")
    for name, bound in chosen.bounds.items():
        context.recorder.info("constant-cut", f"constant {name!r} is cut at {bound:g}: {form} holds nothing beyond")
    return result


def _settled(model: ir.Model, context: Context, form: Float, facts: dict[str, Any]) -> tuple[Halves, ir.Model]:
    """The decision and the model; what leads to no numbers on a few samples is taken back."""
    kept = halves.incapable(model, form)
    kept |= _without_kernels(model, kept, context, form, facts)
    of_constants, bounds = halves.constants(model, form)
    stats = context.observe(model, halves.taps(model))
    kept |= halves.ranges(model, stats, form, bounds) | of_constants
    shapes = concrete_shapes(model, context.calibration.read(0))
    few = take(context.calibration, CHECK_SAMPLES)
    while True:
        chosen = halves.decide(model, form, kept, bounds, shapes)
        result = halve(model, chosen.nodes, DTYPES[form], bounds)
        tried = observe(rounded(result), halves.taps(model), few, threads=context.threads)
        wrong = halves.broken(model, chosen, stats, tried)
        if not wrong:
            return chosen, result
        kept |= wrong


def _without_kernels(
    model: ir.Model, kept: Collection[str], context: Context, form: Float, facts: dict[str, Any]
) -> dict[str, str]:
    """Nodes the provider has no kernel for in 16 bits -> its reason. What the CPU here computes in f32 between casts is
    told: it gains no time."""
    wanted = {str(node.name) for node in model.graph} - set(kept)
    tried = halve(model, wanted, DTYPES[form])
    asked = [node for node in tried.graph if node.name in wanted]
    oracle = context.oracle.at(inferred_shapes(tried, context.example())) if context.buckets else context.oracle
    answers = {node: oracle.in_types(node) for node in asked if _touches(node, DTYPES[form])}
    between = Counter(node.op_type for node, answer in answers.items() if answer.kernel == "Cast")
    if between and not elsewhere(context.target):
        facts["computed_in_f32"] = dict(between)
        text = f"{between.total()} of {len(answers)} nodes have no {form} kernel in {context.target.provider}"
        hint = "weights(format=f16) makes a file as small that costs no time"
        context.recorder.warn("half-emulated", f"{text} and run in f32 between casts: no time is won here; {hint}")
    return {
        str(node.name): f"{context.target.provider} has no {form} {node.op_type}: {answer.reason}"
        for node, answer in answers.items()
        if not answer.kernel
    }


def _touches(node: ir.Node, dtype: ir.DataType) -> bool:
    return any(value is not None and value.dtype == dtype for value in (*node.inputs, *node.outputs))


def _casts(model: ir.Model, before: ir.Model) -> int:
    """How many casts a model has more."""
    now, then = (sum(node.op_type == "Cast" for node in one.graph) for one in (model, before))
    return now - then
