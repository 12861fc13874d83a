"""What a recipe can ask for: the one place where analyses meet rewrites (L9).

A float step is ``(Model, Context, *, options) -> Model``. ``quantize`` is different: it returns a Quantizer, because
which nodes end up integer is settled by measurement later, and each plan must be cheap to build again.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir

from edgeq.analyse import encode as encoding
from edgeq.analyse import place as placement
from edgeq.analyse import smoothing
from edgeq.analyse.cost import concrete_shapes
from edgeq.analyse.coverage import read_back
from edgeq.analyse.measure import measure
from edgeq.analyse.observe import observe
from edgeq.analyse.rounding import round_weights
from edgeq.analyse.sensitivity import Probe, decibel, only, sensitivity
from edgeq.analyse.stats import Stats
from edgeq.analyse.store import Store
from edgeq.analyse.weights import snr_db, storable
from edgeq.errors import RecipeError
from edgeq.ir import io, query, verify
from edgeq.num.fit import METHODS
from edgeq.num.quant import parse_quant
from edgeq.recipe import Recipe, Step
from edgeq.report.record import Coverage
from edgeq.report.recorder import Recorder
from edgeq.rewrite.canonicalize import canonicalize as canonicalize_model
from edgeq.rewrite.qdq import insert_qdq
from edgeq.rewrite.smooth import smooth as smooth_model
from edgeq.rewrite.weights import store_weights, ways_of
from edgeq.run.record import Samples
from edgeq.run.samples import take
from edgeq.target.oracle import Oracle
from edgeq.target.record import Target

CHECK_SAMPLES = 2  # a rewrite is compared on so many samples: it is wrong everywhere or nowhere
SENSITIVITY_SAMPLES = 8
RANGE_SAMPLES = 16
LEAST_REDUCTION = 0.9  # noise a tensor's own range method must cut to, against the model's choice
RANGES = (encoding.Ranges("mse"), encoding.Ranges("percentile"), encoding.Ranges("minmax"))
PROFILE_SAMPLES = 4
FUSION_ROUNDS = 4


@dataclass
class Context:
    """What steps share: the target and its oracle, calibration samples, where results go."""

    target: Target
    oracle: Oracle
    calibration: Samples
    recorder: Recorder
    store: Store | None = None
    threads: int = 2
    seed: int = 0
    keep_float: dict[str, str] = field(default_factory=dict)  # node -> why no plan may make it integer

    def observe(self, model: ir.Model, taps: list[str]) -> dict[str, Stats]:
        """Statistics of ``taps`` over the calibration samples, from the store where they are known."""
        with self.recorder.step("observe", len(self.calibration)) as facts:
            found = observe(
                model, taps, self.calibration, threads=self.threads, store=self.store,
                progress=self.recorder.progress,
            )  # fmt: skip
            facts.update(
                tensors=len(taps), samples=len(self.calibration), samples_run=found.ran, tensors_reused=found.reused,
                samples_until_settled=found.settled,
            )  # fmt: skip
        self.recorder.notices.extend(found.notices)
        return found


def canonicalize(model: ir.Model, context: Context) -> ir.Model:
    """Fold, merge and re-fuse without changing results; what would change them is rolled back and named."""
    with context.recorder.step("canonicalize") as facts:
        feeds = [context.calibration.read(index) for index in range(min(CHECK_SAMPLES, len(context.calibration)))]
        before = model.graph.num_nodes()
        result, changes = canonicalize_model(model, feeds=feeds)
        facts.update(nodes_before=before, nodes_after=result.graph.num_nodes())
        facts["rewrites"] = {change.rewrite: change.nodes for change in changes if not change.rolled_back}
    for change in (change for change in changes if change.rolled_back):
        context.recorder.warn("rolled-back", f"rewrite {change.rewrite} was undone: {change.rolled_back}")
    return result


def smooth(model: ir.Model, context: Context) -> ir.Model:
    """Move outlier channels of activations into the weights of the products behind them (SmoothQuant, searched)."""
    if not smoothing.groups(model):
        return model
    with context.recorder.step("smooth") as facts:
        found = smoothing.search(model, context.calibration, context.target, threads=context.threads)
        facts["tensors"] = len(found)
        if found:
            facts["gain_db"] = round(sum(s.after_db - s.before_db for s in found) / len(found), 1)
    result = smooth_model(model, found)
    known = {node.name for node in model.graph}
    added = [str(node.name) for node in result.graph if node.name not in known]
    context.keep_float.update(dict.fromkeys(added, "it evens out channels before they are rounded, not after"))
    return result


def weights(
    model: ir.Model,
    context: Context,
    *,
    format: str = "u4/block32/asym",
    ops: str = "MatMul+Gemm",
    rounding: str = "nearest",
) -> ir.Model:
    """Weights of ``ops`` (MatMul, Gemm, Conv, Gather) in any number format; activations stay float."""
    quant = parse_quant(format)
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
    known = {node.name for node in model.graph}
    added = [str(node.name) for node in result.graph if node.name not in known]
    readers = [name for name, _ in coded]
    context.keep_float.update(dict.fromkeys([*added, *readers], f"its weights are stored as {quant}"))
    return result


class Quantizer:
    """A float model ready to be quantized by any plan. Statistics are taken once, for every tensor a plan may want."""

    def __init__(self, model: ir.Model, context: Context, ranges: str) -> None:
        self.model, self.context = model, context
        self.ranges: encoding.Ranges | None = None if ranges == "auto" else encoding.Ranges(ranges, ranges)
        first = context.calibration.read(0)
        self.shapes = concrete_shapes(model, first)
        with context.recorder.step("oracle") as facts:
            self.atoms = placement.find_atoms(model, context.target, context.oracle)
            facts.update(atoms=len(self.atoms), probes=context.oracle.sessions)
        self.costs = placement.default_costs(self.atoms, self.shapes)
        self.keep_float = dict(context.keep_float)
        self.stats: dict[str, Stats] = {}

    def work(self, atom: placement.Atom) -> int:
        """Multiply-accumulates of an atom on the first sample's shapes."""
        return query.macs(atom.head, self.shapes.get(str(atom.head.outputs[0].name)))

    def plan(self, extra: Mapping[str, str] | None = None) -> placement.Plan:
        """The best plan at the costs known now, with ``keep_float`` and ``extra`` left float."""
        return placement.place(
            self.atoms, self.context.target, self.costs, keep_float={**self.keep_float, **(extra or {})}
        )

    def build(self, plan: placement.Plan) -> ir.Model:
        """The QDQ model of a plan."""
        self._observe(plan)
        if self.ranges is None:
            self.ranges = self._best_ranges(plan)
        return self._built(plan, self.ranges)

    def _built(self, plan: placement.Plan, ranges: encoding.Ranges) -> ir.Model:
        encodings = encoding.encode(plan, self.stats, self.context.target, ranges=ranges)
        return insert_qdq(self.model, plan, encodings)

    def _best_ranges(self, plan: placement.Plan) -> encoding.Ranges:
        """Of the choices in ``RANGES`` the one whose model puts the least noise on the outputs."""
        with self.context.recorder.step("ranges") as facts:
            probe = Probe(self.model, take(self.context.calibration, RANGE_SAMPLES), self.context.target)
            noise = [probe.noise(self._built(plan, ranges)) for ranges in RANGES]
            best = RANGES[noise.index(min(noise))]
            facts["snr_db"] = {ranges.base: decibel(value) for ranges, value in zip(RANGES, noise, strict=True)}
            facts["chosen"] = best.base
        return best

    def refine_ranges(self, plan: placement.Plan, names: Iterable[str]) -> int:
        """Try every range method on the tensors of the atoms ``names`` alone; keep what hurts the outputs least.
        Returns how many tensors changed."""
        atoms = [atom for atom in plan.atoms if atom.name in set(names)]
        changed = 0
        with self.context.recorder.step("refine ranges", len(atoms)) as facts:
            probe = Probe(self.model, take(self.context.calibration, SENSITIVITY_SAMPLES), self.context.target)
            for atom in atoms:
                alone = only(plan, {atom.name})
                for tensor in sorted(encoding.roots(atom, plan)):
                    changed += self._refine(alone, tensor, probe)
                self.context.recorder.progress.advance()
            facts["tensors_changed"] = changed
        return changed

    def _refine(self, alone: placement.Plan, tensor: str, probe: Probe) -> bool:
        ranges = self.ranges or RANGES[0]
        tried = {m: replace(ranges, exact={**ranges.exact, tensor: m}) for m in dict.fromkeys(r.base for r in RANGES)}
        noise = {method: probe.noise(self._built(alone, choice)) for method, choice in tried.items()}
        before = probe.noise(self._built(alone, ranges))
        best = min(noise, key=noise.__getitem__)
        if noise[best] > LEAST_REDUCTION * before:
            return False
        self.ranges = tried[best]
        return True

    def _observe(self, plan: placement.Plan) -> None:
        missing = [name for name in encoding.observed(plan) if name not in self.stats]
        if missing:
            self.stats.update(self.context.observe(self.model, missing))

    def _holdable(self, extra: Mapping[str, str] | None) -> placement.Plan:
        """The best plan of tensors that integers can hold, by what calibration saw of them."""
        while True:
            plan = self.plan(extra)
            self._observe(plan)
            wrong = encoding.unholdable(plan, self.stats)
            if not wrong:
                return plan
            self.keep_float.update(wrong)

    def fused(self, extra: Mapping[str, str] | None = None) -> tuple[placement.Plan, ir.Model, Coverage]:
        """Plan, build and read back; what the runtime did not fuse is left float, until all that is planned runs."""
        for _ in range(FUSION_ROUNDS):
            plan = self._holdable(extra)
            model = self.build(plan)
            seen, wrong = read_back(model, plan, self.shapes, self.context.target)
            if not wrong:
                break
            self.keep_float.update(wrong)
        verify.verify(model, "inserting Q/DQ")
        return plan, model, seen

    def learn_costs(self, plan: placement.Plan, integer_model: ir.Model) -> None:
        """Replace the default costs by profiles of this machine."""
        feeds = list(take(self.context.calibration, PROFILE_SAMPLES))
        with self.context.recorder.step("profile"):
            self.costs = measure(self.model, integer_model, plan, feeds, self.shapes, self.context.target)

    def sensitivity(self, plan: placement.Plan) -> dict[str, float]:
        """Noise-to-signal of the outputs by atom of ``plan``."""
        atoms = [atom for atom in plan.atoms if atom.name in plan.integer and atom.verdict.kind == "integer"]
        feeds = take(self.context.calibration, SENSITIVITY_SAMPLES)
        with self.context.recorder.step("sensitivity", len(atoms)) as facts:
            facts["atoms"] = len(atoms)
            probe = Probe(self.model, feeds, self.context.target, self.context.threads)
            return sensitivity(probe, plan, self.build, self.context.recorder.progress.advance)


def quantize(model: ir.Model, context: Context, *, ranges: str = "auto") -> Quantizer:
    """Integer weights and activations where the target has kernels. ``ranges``: auto or one of `edgeq list methods`."""
    if ranges != "auto" and ranges not in METHODS:
        raise RecipeError(f"quantize(ranges={ranges}) is not a method", hint="use auto, " + ", ".join(METHODS))
    return Quantizer(model, context, ranges)


StepFunction = Callable[..., Any]
STEPS: dict[str, StepFunction] = {
    "canonicalize": canonicalize,
    "smooth": smooth,
    "weights": weights,
    "quantize": quantize,
}


def options_of(function: StepFunction) -> frozenset[str]:
    """A step's keyword-only parameters are its options."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


READ_WEIGHTS = ("canonicalize", "smooth")  # steps that see weights as numbers, or fold codes back into them
KNOWN = {name: options_of(function) for name, function in STEPS.items()}


@dataclass
class Prepared:
    """The float model after its steps, and the Quantizer when the recipe asks for one. ``stored``: by ``weights``."""

    model: ir.Model
    quantizer: Quantizer | None = None
    stored: bool = False
    intermediates: list[tuple[str, ir.Model]] = field(default_factory=list)


def apply(recipe: Recipe, model: ir.Model, context: Context) -> Prepared:
    """Run the steps in order. ``quantize`` must come last, ``weights`` behind the steps that read weights. Raises
    RecipeError otherwise."""
    prepared = Prepared(model)
    for step in recipe.steps:
        prepared.stored |= step.name == "weights"
        if prepared.stored and step.name in READ_WEIGHTS:
            raise RecipeError(f"step {step.name!r} stands behind weights", hint=f"put {step.name} first")
        if prepared.quantizer is not None:
            raise RecipeError(f"step {step.name!r} stands behind quantize", hint="put quantize last")
        result = _run(step, prepared.model, context)
        if isinstance(result, Quantizer):
            prepared.quantizer = result
        else:
            verify.verify(result, step.name)
            prepared.model = result
            prepared.intermediates.append((step.name, result))
    return prepared


def _run(step: Step, model: ir.Model, context: Context) -> Any:
    return STEPS[step.name](model, context, **step.options)
