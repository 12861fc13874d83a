"""Which number format each tensor of a model should have on a target, and why (L10). Nothing is changed."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgeq import recipe as recipes
from edgeq import steps
from edgeq.analyse.advise import SIZES, Advice, Runs, WayOf, activation_advice, weight_advice, weights
from edgeq.analyse.encode import PRODUCTS
from edgeq.analyse.place import Plan, free_costs
from edgeq.analyse.sensitivity import decibel
from edgeq.analyse.stats import Stats
from edgeq.analyse.store import Store
from edgeq.analyse.weights import STORABLE, axis_of
from edgeq.context import Context
from edgeq.errors import ModelError, OutputError, UsageError
from edgeq.facts import environment, samples_facts, source_facts, target_facts
from edgeq.given import (
    branches,
    pins_of,
    random_samples,
    read_with_samples,
    samples_settings,
    samples_spec,
    target_of,
)
from edgeq.ir import query
from edgeq.num.quant import TENSOR, Coded, QParams, Quant, code_type
from edgeq.packaging import check_writable
from edgeq.quantizer import Quantizer
from edgeq.report import html as page
from edgeq.report.progress import Progress
from edgeq.report.record import Report
from edgeq.report.recorder import Recorder
from edgeq.rewrite.weights import way
from edgeq.run.record import Samples
from edgeq.source import read_model
from edgeq.target.oracle import Oracle
from edgeq.target.record import Target

PROMISED = "an integer kernel exists, but not in this place of the graph"


def advise(
    model: str | Path | ir.Model,
    *,
    target: str = "local",
    calibration: str | None = None,
    bits: int = 8,
    inputs: Sequence[str] = (),
    limit: int | None = None,
    synthetic: bool = False,
    preprocessing: str | Path | None = None,
    html: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Advice on every weight of ``model`` and, with ``calibration``, on every activation ``target`` could quantize.

    ``bits`` is the size of weights to choose from: 8, 6 or 4. Signal over noise is predicted from statistics; with
    ``calibration``, what each node does to the outputs is measured. ``html`` is where a page of it is written.
    Raises ModelError when there is nothing to advise on."""
    if bits not in SIZES:
        raise UsageError(f"no formats of {bits} bits to choose from", hint="use " + ", ".join(map(str, SIZES)))
    if html is not None:
        _check_free(Path(html), force)
    chosen, recorder = target_of(target, None), Recorder(progress)
    samples: Samples | None = None
    if calibration is None and not synthetic:
        source, info = read_model(model, opset=chosen.opset, pins=pins_of(inputs))
        if next(weights(source), None) is None:
            raise _nothing(source)
    else:
        spec = samples_spec(calibration, synthetic, "calibration", "-c")
        source, info, samples = read_with_samples(
            model, spec, chosen, recorder, inputs=inputs, limit=limit, **samples_settings(model, preprocessing)
        )
    context = Context(chosen, Oracle(chosen), samples or random_samples(source, 1, 0), recorder, Store(),
                      max(chosen.threads))  # fmt: skip
    quantizer = steps.apply(recipes.parse("canonicalize; quantize", steps.KNOWN), source, context).quantizer
    assert quantizer is not None
    quantizer.costs = free_costs(quantizer.atoms)
    found = tuple(_advice(quantizer, bits, measured=samples is not None))
    if not found:
        raise _nothing(source)
    report = Report(
        source=source_facts(info, source), target=target_facts(chosen), recipe="advise", steps=tuple(recorder.steps),
        notices=tuple(recorder.notices), environment=environment(), advice=tuple(asdict(row) for row in found),
        samples={"calibration": samples_facts(samples) if samples else "none"},
    )  # fmt: skip
    if html is not None:
        _write(Path(html), page.render(report))
    return report


def _nothing(model: ir.Model) -> ModelError:
    """Why there is nothing to advise on."""
    if undecided := branches(model):
        name, op = undecided[0].name, undecided[0].op_type
        return ModelError(
            f"all constant weights lie inside branches, such as {op} {name!r}",
            hint="give data with -c: a branch that is the same for all samples is decided by it",
        )
    return ModelError(
        "the model has no constant weight in MatMul, Gemm, Conv or Gather", hint="give data with -c for activations"
    )


def _advice(quantizer: Quantizer, bits: int, *, measured: bool) -> Iterator[Advice]:
    """Weights in graph order, then activations."""
    target, model = quantizer.context.target, quantizer.model
    hoped = quantizer.plan()
    plan = quantizer.fused()[0] if measured and hoped.tensors else hoped
    noise = quantizer.sensitivity(plan) if measured and plan.integer else {}
    alone = {name: decibel(value) for name, value in noise.items()}
    multiplied = {atom.name for atom in plan.atoms if atom.verdict.kind == "integer"} & plan.integer.keys()
    way_of = ways(target, multiplied, model.opset_imports[""])
    for node, value in weights(model):
        yield weight_advice(node, value, target, way_of, bits=bits, alone_db=alone.get(str(node.name)))
    if measured:
        yield from _activations(hoped, plan, quantizer.stats, target, alone)


def ways(target: Target, integer: Collection[str], opset: int) -> WayOf:
    """How a node would run with its weight in a format; ``integer``: nodes an integer kernel multiplies."""
    own = target.weights

    def way_of(node: ir.Node, quant: Quant) -> Runs:
        same = (quant.format, quant.symmetric, quant.scale) == (own.format, own.symmetric, own.scale)
        if node.name in integer and same and quant.block in (TENSOR, own.block):
            return "integer"
        return way(node, STORABLE[node.op_type], _unfilled(node, quant), opset)

    return way_of


def _unfilled(node: ir.Node, quant: Quant) -> Coded:
    """A weight's codes as far as it matters for how they would run: shape and mapping, without numbers."""
    shape = tuple(int(dim or 0) for dim in query.dims(node.inputs[STORABLE[node.op_type]]) or ())
    params = QParams(quant, np.ones((), np.float32), np.zeros((), np.int32), axis_of(node, quant))
    return Coded(params, np.broadcast_to(np.zeros((), code_type(quant)), shape))


def _activations(
    hoped: Plan, plan: Plan, stats: Mapping[str, Stats], target: Target, alone: Mapping[str, float]
) -> Iterator[Advice]:
    """Each tensor an integer kernel could read, by the node that reads it and, of several, the one it harms most.

    ``hoped``: what has kernels; ``plan``: what calibration and the runtime left of it."""
    for name in hoped.tensors:
        if name in hoped.ties or name not in stats:
            continue
        readers = [a for a in hoped.atoms if a.name in hoped.integer and name in {str(v.name) for v in a.inputs}]
        if not readers:
            continue  # an output: its writer's row speaks of it
        reader = min(readers, key=lambda atom: alone.get(atom.name, np.inf))
        held = [atom for atom in readers if atom.name in plan.integer]
        yield activation_advice(
            name, stats[name], reader.head, target,
            product=any(atom.head.op_type in PRODUCTS for atom in readers),
            left_float="" if held else plan.left_float.get(reader.name, PROMISED), alone_db=alone.get(reader.name),
        )  # fmt: skip


def _check_free(path: Path, force: bool) -> None:
    if path.exists() and not (force and path.is_file()):
        raise OutputError(f"{str(path)!r} exists", hint="add --force to replace it, or choose another --html")
    check_writable(path)


def _write(path: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.absolute().parent) as folder:
        staged = Path(folder) / path.name
        staged.write_text(text, encoding="utf-8")
        staged.replace(path)
