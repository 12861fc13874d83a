"""A float model ready to be quantized by any plan (L9).

Which nodes end up integer is settled by measurement, so a plan must be cheap to build again: statistics are taken
once, and what was learnt of ranges, costs and fusions serves every later plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from edgeq.analyse import encode as encoding
from edgeq.analyse import heads, shifts, taken
from edgeq.analyse import place as placement
from edgeq.analyse.blame import blame
from edgeq.analyse.cost import concrete_shapes
from edgeq.analyse.coverage import read_back
from edgeq.analyse.measure import measure
from edgeq.analyse.readers import by_readers
from edgeq.analyse.rounding import round_weights
from edgeq.analyse.saturation import kernel_rows, saturates
from edgeq.analyse.segments import segments
from edgeq.analyse.sensitivity import Job, Noise, Probe, decibel, from_decibel, only, sensitivity, together
from edgeq.analyse.stats import Stats
from edgeq.context import Context
from edgeq.halving import Held, held, islands
from edgeq.ir import query, verify
from edgeq.ir.ops import OPS
from edgeq.ir.pixels import codes_of
from edgeq.lower.fuse import fuse
from edgeq.lower.kernels import in_own_kernels
from edgeq.num.formats import Float
from edgeq.num.quant import Coded
from edgeq.report.record import AtomNoise, Coverage
from edgeq.rewrite.qdq import insert_qdq
from edgeq.run.record import Samples
from edgeq.run.samples import split, take
from edgeq.target import kernels
from edgeq.target.record import CPU

SENSITIVITY_SAMPLES, FEWEST_SAMPLES = 32, 4
SENSITIVITY_MACS = 10**13  # some minutes; asking about an atom costs half of the model on each sample
REFINE_SAMPLES = 8
RANGE_SAMPLES = 16
TOLD_DB = 40.0  # SNR up to which few samples tell methods apart; 16 of Magika, 66 dB each, hold nothing that is cut
READER_SAMPLES = 8
LEAST_REDUCTION = 0.9  # noise a tensor's own range method must cut to, against the model's choice
RANGES = (encoding.Ranges("mse"), encoding.Ranges("percentile"), encoding.Ranges("minmax"))
PROFILE_SAMPLES = 4
BIASES = ("weights", "sequential")  # what a bias makes up for: rounded weights, or all that comes before it too
BIAS_HELD, BIAS_SAMPLES = 0.25, 64  # share of the samples that judges and doesn't teach; how many teach at most
BIAS_REDUCTION = 0.95  # noise left there: MobileNetV2's 20.0 to 20.1 dB there were 20.6 to 20.5 on 200 other photos
ATOMS_A_CUT = 3  # atoms run again for each other's sake, and fewer, narrower cuts to keep values at
FUSION_ROUNDS = 4
ONE_KERNEL = ("Attention", "RotaryEmbedding", "RMSNormalization")  # of nodes that are integer products and sums else
PIXELS = "pixels are codes already, away from their zero point"


class Quantizer:
    """A float model ready to be quantized by any plan. Statistics are taken once, for every tensor a plan may want."""

    def __init__(
        self,
        model: ir.Model,
        context: Context,
        ranges: str,
        rounding: str = "nearest",
        relief_db: float = 0.0,
        bias: str = BIASES[0],
        narrow: Float | None = None,
    ) -> None:
        """``relief_db``: how much less noise than all that fuses makes is wanted, whatever limits say. ``narrow``: the
        16-bit floats that what is left float computes in."""
        self.model, self.context, self.rounding, self.relief_db = model, context, rounding, relief_db
        self.bias, self.narrow = bias, narrow
        self.held: Held | None = None  # by what, of the nodes that could compute in ``narrow``
        self.asked_ranges = ranges
        self.ranges: encoding.Ranges | None = None if ranges in ("auto", "search") else encoding.Ranges(ranges, ranges)
        self.shapes = concrete_shapes(model, context.example())
        oracle = context.oracle.at(self.shapes) if context.buckets else context.oracle
        with context.recorder.step("oracle") as facts:
            self.atoms = placement.find_atoms(model, context.target, oracle)
            facts.update(atoms=len(self.atoms), probes=oracle.sessions)
        self.costs = placement.default_costs(self.atoms, self.shapes)
        moved = [node for node in model.graph if node.outputs and codes_of(node.outputs[0]) is not None]
        self.keep_float = {**context.keep_float, **dict.fromkeys((str(node.name) for node in moved), PIXELS)}
        self.profiled = False  # whether the costs are this machine's
        self.stats: dict[str, Stats] = {}
        self.noises: tuple[AtomNoise, ...] = ()  # of the plan that was last asked about
        self.rounded: dict[encoding.Edge, Coded] | None = None

    def taken_in(self) -> dict[str, str]:
        """Atoms that one kernel of the target takes in with what is around them, where all of it is left float."""
        whole = tuple(op for op in self.context.target.fuse if op in ONE_KERNEL)
        lowered, _ = fuse(self.model, replace(self.context.target, fuse=whole))
        left = {str(node.name): node.op_type for node in lowered.graph}
        return {
            atom.name: "left float, one kernel takes it in with what is around it"
            for atom in self.atoms
            if any(left.get(str(node.name)) != node.op_type for node in atom.nodes)
        }

    def over(self, model: ir.Model) -> Quantizer:
        """A quantizer with the same options for another form of the model."""
        options = (self.asked_ranges, self.rounding, self.relief_db, self.bias, self.narrow)
        return Quantizer(model, self.context, *options)

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
        if self.rounded is None:
            self.rounded = self._best_rounding(plan, self.ranges)
        return self._built(plan, self.ranges)

    def _built(self, plan: placement.Plan, ranges: encoding.Ranges) -> ir.Model:
        return insert_qdq(self.model, plan, self._encoded(plan, ranges))

    def _encoded(self, plan: placement.Plan, ranges: encoding.Ranges) -> encoding.Encodings:
        return encoding.encode(plan, self.stats, self.context.target, ranges=ranges, rounded=self.rounded)

    def _best_rounding(self, plan: placement.Plan, ranges: encoding.Ranges) -> dict[encoding.Edge, Coded]:
        """Codes by ``rounding`` if they leave less noise on the outputs than nearest ones: a layer's own error falls
        always, but where activations make the noise the outputs may not tell."""
        if self.rounding == "nearest":
            return {}
        rounded = self._round()
        with self.context.recorder.step("compare rounding") as facts:
            probe = Probe(self.model, take(self.context.calibration, RANGE_SAMPLES), self.context.target)
            noise = {}
            for name, codes in (("nearest", {}), (self.rounding, rounded)):
                self.rounded = codes
                noise[name] = probe.noise(self._built(plan, ranges))
            facts["snr_db"] = {name: decibel(value) for name, value in noise.items()}
            facts["chosen"] = min(noise, key=noise.__getitem__)
        return rounded if facts["chosen"] == self.rounding else {}

    def _round(self) -> dict[encoding.Edge, Coded]:
        """Codes of every weight a plan may quantize. Ones that the target's kernels can't add without saturation are
        left out."""
        weighed = {
            (atom.name, index): atom
            for atom in self.atoms
            for index in atom.constants
            if atom.verdict.kind == "integer" and index == OPS[atom.head.op_type].weight
        }
        wanted = {edge: encoding.constant_params(atom, edge[1], self.context.target) for edge, atom in weighed.items()}
        with self.context.recorder.step("round", len(wanted)) as facts:
            rounded = round_weights(
                self.model, wanted, self.context.calibration, rounding=self.rounding, centred=True,
                threads=self.context.threads, done=self.context.recorder.progress.advance,
            )  # fmt: skip
            sound = {
                edge: coded
                for edge, coded in rounded.items()
                if not saturates(kernel_rows(weighed[edge].head, coded.codes), self.context.target)
            }
            facts.update(rounding=self.rounding, weights=len(sound), saturating=len(rounded) - len(sound))
        return sound

    def _best_ranges(self, plan: placement.Plan) -> encoding.Ranges:
        """One method for the model or, where that is searched too, for each tensor the one its readers want: what puts
        the least noise on the outputs."""
        samples = take(self.context.calibration, RANGE_SAMPLES)
        with self.context.recorder.step("ranges") as facts:
            choices = {ranges.base: ranges for ranges in RANGES}
            if self.asked_ranges == "search":
                choices["by reader"] = replace(RANGES[0], exact=self._by_readers(plan, take(samples, READER_SAMPLES)))
            noise = self._noise_of(plan, choices, samples)
            if max(noise.values()) < from_decibel(TOLD_DB):
                noise = self._noise_of(plan, choices, self.context.calibration)
            best = min(noise, key=noise.__getitem__)
            facts["snr_db"] = {name: decibel(value) for name, value in noise.items()}
            facts["chosen"] = best
        return choices[best]

    def _noise_of(
        self, plan: placement.Plan, choices: Mapping[str, encoding.Ranges], samples: Samples
    ) -> dict[str, float]:
        probe = Probe(self.model, samples, self.context.target)
        return {name: probe.noise(self._built(plan, ranges)) for name, ranges in choices.items()}

    def _by_readers(self, plan: placement.Plan, samples: Samples) -> dict[str, str]:
        context = self.context
        return by_readers(self.model, plan, self.stats, samples, context.target, threads=context.threads)

    def refine_ranges(self, plan: placement.Plan, names: Iterable[str]) -> int:
        """Try every range method on the tensors of the atoms ``names`` alone; keep what hurts the outputs least.
        Returns how many tensors changed."""
        atoms = [atom for atom in plan.atoms if atom.name in set(names)]
        changed = 0
        with self.context.recorder.step("refine ranges", len(atoms)) as facts:
            probe = Probe(self.model, take(self.context.calibration, REFINE_SAMPLES), self.context.target)
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
        wanted = dict.fromkeys((*encoding.observed(plan), *heads.observed(plan)))
        missing = [name for name in wanted if name not in self.stats]
        if missing:
            self.stats.update(self.context.observe(self.model, missing))

    def _holdable(self, extra: Mapping[str, str] | None) -> placement.Plan:
        """The best plan of tensors that integers can hold, by what calibration saw of them."""
        while True:
            plan = self.plan(extra)
            self._observe(plan)
            joins = heads.crowded(plan, self.stats)
            wrong = {**joins, **encoding.unholdable(plan, self.stats)}
            if not wrong:
                return plan
            for reason in dict.fromkeys(joins.values()):
                self.context.recorder.info("join-kept-float", f"{reason}: it and what is around it stay float")
            self.keep_float.update(wrong)

    def fused(self, extra: Mapping[str, str] | None = None) -> tuple[placement.Plan, ir.Model, Coverage]:
        """Plan, build, lower and read back; what the runtime did not fuse is left float, until all planned runs. The
        model returned isn't lowered."""
        for _ in range(FUSION_ROUNDS):
            plan = self._holdable(extra)
            model = self.build(plan)
            read = read_back if self.context.target.provider == CPU.name else taken.read_back
            lowered, _ = fuse(self.finished(plan, model), self.context.target)
            seen, wrong = read(self.context.at_largest(lowered), plan, self.shapes, self.context.target)
            if not wrong:
                break
            self.keep_float.update(wrong)
        if self.bias == "sequential" and plan.integer:
            model = self._corrected(plan, model)
        verify.verify(model, "inserting Q/DQ")
        return plan, model, seen

    def finished(self, plan: placement.Plan, model: ir.Model) -> ir.Model:
        """The QDQ model of a plan as it ships, but for the kernels of its target: what stays float in 16 bits, where
        the recipe asks for it."""
        if self.narrow is None:
            return model
        self.held = self.held or held(self.model, self.context, self.narrow)
        integer = {str(node.name) for atom in plan.atoms if atom.name in plan.integer for node in atom.nodes}
        return islands(model, self.held, self.context, integer)

    def _corrected(self, plan: placement.Plan, model: ir.Model) -> ir.Model:
        """``model`` with biases that make up for all errors before them, if samples not learnt from gain by it."""
        calibration, target = self.context.calibration, self.context.target
        if len(calibration) < 2:
            return model
        learnt, held = split(calibration, fraction=BIAS_HELD, seed=self.context.seed)
        cuts = segments(self.model, self.atoms, self.shapes, self.costs.float_ns, len(self.atoms) // ATOMS_A_CUT + 1)
        job = replace(self.job(plan), segments=cuts, samples=take(learnt, BIAS_SAMPLES))
        layers = shifts.layers_of(job)
        with self.context.recorder.step("correct biases", len(layers)) as facts:
            found = insert_qdq(self.model, plan, shifts.corrected(job, self.context.recorder.progress.advance))
            probe = Probe(self.model, take(held, SENSITIVITY_SAMPLES), target)
            noise = [probe.noise(one) for one in (model, found)]
            kept = noise[1] < BIAS_REDUCTION * noise[0]
            facts.update(biases=len(layers), snr_db=[round(decibel(value), 1) for value in noise], kept=kept)
        return found if kept else model

    def learn_costs(self, plan: placement.Plan, integer_model: ir.Model) -> None:
        """Replace the default costs by profiles of this machine."""
        feeds = list(take(self.context.calibration, PROFILE_SAMPLES))
        with self.context.recorder.step("profile"):
            lowered, _ = fuse(integer_model, self.context.target)
            if self.context.target.kernels and isinstance(kernels.here(), Path):
                lowered, _ = in_own_kernels(lowered, self.context.target)
            self.costs = measure(self.model, lowered, plan, feeds, self.shapes, self.context.target)
        self.profiled = True

    def sensitivity(self, plan: placement.Plan) -> dict[str, float]:
        """Noise-to-signal of the outputs by atom of ``plan``, each quantized alone. ``noises`` keeps them as rows."""
        self.noises = self.ranking(plan, restore=False)
        return {row.atom: from_decibel(row.noise_db) for row in self.noises}

    def ranking(self, plan: placement.Plan, *, restore: bool) -> tuple[AtomNoise, ...]:
        """What each atom of ``plan`` costs the outputs and why, loudest first. ``restore``: also what is gained when it
        alone is float again."""
        job = self.job(plan)
        progress = self.context.recorder.progress
        with self.context.recorder.step("sensitivity", len(job.atoms) * (2 if restore else 1)) as facts:
            alone = sensitivity(job, "alone", progress.advance)
            restored = sensitivity(job, "restored", progress.advance) if restore else {}
            every = together(job) if restore else None
            facts.update(atoms=len(job.atoms), segments=len(job.segments), samples=len(job.samples))
        rows = [self._row(atom, job, alone[atom.name], restored.get(atom.name), every) for atom in job.atoms]
        return tuple(sorted(rows, key=lambda row: row.noise_db))

    def job(self, plan: placement.Plan) -> Job:
        """What ``ranking`` measures."""
        self._observe(plan)
        encodings = self._encoded(plan, self.ranges or RANGES[0])
        return Job(
            self.model, plan, encodings, insert_qdq,
            segments(self.model, self.atoms, self.shapes, self.costs.float_ns),
            take(self.context.calibration, self._sensitivity_samples(plan)), self.context.target, self.context.threads,
            self.context.store,
        )  # fmt: skip

    def _sensitivity_samples(self, plan: placement.Plan) -> int:
        """How many samples each atom is asked about: fewer of a large model, whose samples hold many positions."""
        macs = sum(map(self.work, self.atoms)) * len(plan.integer) // 2
        return min(max(SENSITIVITY_MACS // max(macs, 1), FEWEST_SAMPLES), SENSITIVITY_SAMPLES)

    def _row(
        self, atom: placement.Atom, job: Job, alone: Noise, restored: Noise | None, every: Noise | None
    ) -> AtomNoise:
        gain = None if restored is None or every is None else decibel(restored.power) - decibel(every.power)
        saved = self.costs.float_ns[atom.name] - self.costs.integer_ns[atom.name] if self.profiled else None
        why = blame(atom, job.plan, job.encodings, self.stats)
        return AtomNoise(atom.name, atom.head.op_type, decibel(alone.power), gain, alone.kl, saved, why)
