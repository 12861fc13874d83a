"""How much each atom's quantization hurts the outputs, measured (L5).

Two questions an atom: the noise on the outputs when it *alone* is quantized, and the noise left when everything is but
it is *restored*. Instead of weight norms or Hessian traces: measured noise ranks layers far better (onnxsim's study:
Spearman .81-.97 on 16 samples against -.48 to .57 for norms).

Everything in front of an atom is equal for all: the samples' values are kept at the cuts of ``segments``, and an atom
costs one run of its own segment, whose session is small, and of what is behind, whose session it shares with the rest
of its segment. Samples run side by side on sessions of one thread, which two cores do faster than one sample on two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from edgeq.analyse.encode import Encodings
from edgeq.analyse.place import Atom, Plan
from edgeq.analyse.segments import Segment
from edgeq.analyse.store import Store, key_of
from edgeq.ir import io
from edgeq.ir.part import part
from edgeq.num.metrics import class_like, kl_divergence
from edgeq.num.quant import QParams
from edgeq.run.record import Array, Feed, Samples
from edgeq.run.session import open_session, run_session
from edgeq.target.detect import cpu_flags
from edgeq.target.record import Target

VERSION = 2  # raised when the same question would get another answer: stored ones are then not found
BYTE_BUDGET = 256 << 20

Direction = Literal["alone", "restored"]
Insert = Callable[[ir.Model, Plan, Encodings], ir.Model]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Noise:
    """On the outputs: ``power`` of the error over the signal's, mean over float outputs (0 is perfect); ``kl`` in nats,
    mean over positions of class-like outputs, None without one."""

    power: float
    kl: float | None = None


@dataclass(frozen=True)
class Job:
    """What is measured on what. ``insert`` makes integer what a plan says of a part of ``model``, with parameters like
    ``encodings``; at most ``byte_budget`` bytes of values are kept (one sample's excepted)."""

    model: ir.Model
    plan: Plan
    encodings: Encodings
    insert: Insert
    segments: Sequence[Segment]
    samples: Samples
    target: Target
    threads: int = 2
    store: Store | None = None
    byte_budget: int = BYTE_BUDGET

    @cached_property
    def atoms(self) -> tuple[Atom, ...]:
        """Those whose noise is asked for: data movers only pass on the noise of others."""
        return tuple(a for a in self.plan.atoms if a.name in self.plan.integer and a.verdict.kind == "integer")

    @cached_property
    def facts(self) -> tuple[object, ...]:
        """What every answer depends on."""
        target = self.target
        surroundings = (
            onnxruntime.__version__,
            sorted(cpu_flags()),
            target.simulation.name,
            sorted(target.simulation.session.items()),
        )
        return VERSION, io.digest(self.model), self.samples.digest, len(self.samples), *surroundings


def only(plan: Plan, names: AbstractSet[str]) -> Plan:
    """The plan in which the atoms of ``names`` alone are integer."""
    kept = [atom for atom in plan.atoms if atom.name in names]
    touched = {str(value.name) for atom in kept for value in _edges(atom, plan)}
    return replace(
        plan,
        tensors={name: quant for name, quant in plan.tensors.items() if name in touched},
        integer={name: kernel for name, kernel in plan.integer.items() if name in names},
        bare=plan.bare & names,
        ties=plan.ties,
    )


def _edges(atom: Atom, plan: Plan) -> tuple[ir.Value, ...]:
    return atom.inputs if atom.name in plan.bare else (*atom.inputs, *atom.outputs)


class Probe:
    """Tells how much noise a quantized model puts on the outputs of ``reference``, on a few samples."""

    def __init__(self, reference: ir.Model, feeds: Iterable[Feed], target: Target, threads: int = 2) -> None:
        self._feeds, self._target, self._threads = list(feeds), target, threads
        self._expected = self._outputs(reference)

    def noise(self, model: ir.Model) -> float:
        """Noise-to-signal power of ``model``'s float outputs (dimensionless, 0 is perfect)."""
        return noise_to_signal(self._expected, self._outputs(model))

    def _outputs(self, model: ir.Model) -> list[Mapping[str, Array]]:
        target = self._target
        session = open_session(model, threads=self._threads, provider=target.simulation)
        return [run_session(session, feed) for feed in self._feeds]


def sensitivity(job: Job, direction: Direction, done: Callable[[], None] = lambda: None) -> dict[str, Noise]:
    """Atom -> noise on the outputs when it *alone* is quantized, or when all are and it is *restored* to float.

    ``done`` is called after each atom. What the store has is not measured again, and each answer is kept at once."""
    lost: dict[str, F64] = {}
    blocks = _blocks(job)
    for block in blocks:
        for name, tally in _answers(job, direction, block):
            lost[name] = lost[name] + tally if name in lost else tally
            if block is blocks[-1]:
                done()
    if job.store is not None:
        job.store.evict()
    return {atom.name: _noise(lost[atom.name]) for atom in job.atoms}


def together(job: Job) -> Noise:
    """The noise on the outputs when all of the plan is quantized."""
    everything = frozenset(job.plan.integer)
    lost = sum((_Pass(job, everything, block).whole() for block in _blocks(job)), np.zeros((1, 4)))
    return _noise(lost)


def _answers(job: Job, direction: Direction, block: range) -> Iterator[tuple[str, F64]]:
    """Each atom with its tally over the samples of ``block``: stored ones first."""
    base = frozenset(job.plan.integer) if direction == "restored" else frozenset[str]()
    shared = key_of([*job.facts, direction, block, *(_parameters(a, job) for a in job.atoms if a.name in base)])
    keys = {atom.name: key_of([shared, *_parameters(atom, job)]) for atom in job.atoms}
    missing = []
    for name, key in keys.items():
        stored = job.store.load(key) if job.store is not None else None
        if stored is None:
            missing.append(name)
        else:
            yield name, stored["tally"]
    for name, tally in _Pass(job, base, block).run(missing):
        if job.store is not None:
            job.store.save(keys[name], {"tally": tally})
        yield name, tally


def _parameters(atom: Atom, job: Job) -> list[object]:
    """All that makes an atom of the plan integer, as texts."""
    edges = [str(value.name) for value in _edges(atom, job.plan)]
    codes = [(name, _text(job.encodings.activations[name])) for name in edges]
    coded = [job.encodings.constants[atom.name, index] for index in atom.constants]
    constants = [(_text(one.params), hashlib.sha256(one.codes.tobytes()).hexdigest()) for one in coded]
    node, index = (str(atom.bias[0].name), atom.bias[1]) if atom.bias is not None else ("", 0)
    bias = [array.tobytes().hex() for array in job.encodings.biases.get((node, index), ())]
    return [atom.name, codes, constants, bias]


def _text(params: QParams) -> tuple[str, ...]:
    arrays = (params.scale.tobytes().hex(), params.zero_point.tobytes().hex())
    return str(params.quant), str(params.axis), str(params.codes), *arrays


def _blocks(job: Job) -> list[range]:
    """The samples in runs whose kept values stay within the budget, as the first one's shapes tell."""
    sizes = [segment.live_bytes for segment in job.segments]
    here = max(a + b for a, b in zip(sizes, [*sizes[1:], 0], strict=True))
    feed = sum(array.nbytes for array in job.samples.read(0).values())
    count = max(int(job.byte_budget // max(here + feed, 1)), 1)
    return [range(start, min(start + count, len(job.samples))) for start in range(0, len(job.samples), count)]


class Session:
    """A part of the model, opened on one thread."""

    def __init__(self, model: ir.Model, target: Target) -> None:
        self.session = open_session(model, threads=1, provider=target.simulation)
        self.inputs = [value.name for value in self.session.get_inputs()]

    def run(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """The part's outputs for what is alive in front of it."""
        return run_session(self.session, {name: values[name] for name in self.inputs})


class _Pass:
    """A block of samples on its way through the segments, where the atoms ``base`` are quantized."""

    def __init__(self, job: Job, base: frozenset[str], block: range) -> None:
        self.job, self.base = job, base
        self.values: list[Feed] = [job.samples.read(index) for index in block]  # alive in front of the segment
        self.outputs: list[Feed] = [{} for _ in block]  # of the model, written before it
        self.expected: list[Feed] = []
        self.classes: list[str] = []
        self.parts: dict[range, ir.Model] = {}  # float

    def run(self, names: Sequence[str]) -> Iterator[tuple[str, F64]]:
        """Each atom of ``names`` with its tally, segment by segment."""
        left = set(names)
        with ThreadPoolExecutor(self.job.threads) as pool:
            if left:
                self._expect(pool)
            for index, segment in enumerate(self.job.segments):
                if left & segment.atoms:
                    behind = self._open(range(index + 1, len(self.job.segments)), self.base)
                    for name in sorted(left & segment.atoms):
                        yield name, self._tally(pool, [self._open(range(index, index + 1), self.base ^ {name}), behind])
                    left -= segment.atoms
                if not left:
                    return
                self._advance(pool, index)

    def whole(self) -> F64:
        """The tally of ``base`` itself."""
        with ThreadPoolExecutor(self.job.threads) as pool:
            self._expect(pool)
            return self._tally(pool, [self._open(range(len(self.job.segments)), self.base)])

    def _expect(self, pool: ThreadPoolExecutor) -> None:
        """Run the float model whole."""
        exact = self._open(range(len(self.job.segments)), frozenset())
        assert exact is not None, "a model has outputs"
        self.expected = list(pool.map(exact.run, self.values))
        first, labels = self.expected[0], self.job.samples.each_label
        self.classes = [name for name, array in first.items() if class_like(name, array, labels)]

    def _open(self, stretch: range, integer: frozenset[str]) -> Session | None:
        """The segments of ``stretch`` with the atoms ``integer`` quantized; None when nothing reads what they write."""
        segments = [self.job.segments[index] for index in stretch]
        written = [*(segments[-1].writes if segments else ()), *(name for s in segments for name in s.outputs)]
        if not written:
            return None
        fed = [*segments[0].reads, *(str(value.name) for value in self.job.model.graph.inputs)]
        inside = integer & frozenset[str]().union(*(segment.atoms for segment in segments))
        if stretch not in self.parts:
            self.parts[stretch] = part(self.job.model, fed, dict.fromkeys(written))
        model = self.parts[stretch]
        if inside:
            model = self.job.insert(model, only(self.job.plan, inside), self.job.encodings)
        return Session(model, self.job.target)

    def _advance(self, pool: ThreadPoolExecutor, index: int) -> None:
        """Run the segment ``index`` and forget what nothing behind it reads."""
        here, segment = self._open(range(index, index + 1), self.base), self.job.segments[index]
        inputs = {str(value.name) for value in self.job.model.graph.inputs}
        alive = inputs.union(self.job.segments[index + 1].reads)
        found = pool.map(here.run, self.values) if here is not None else ({} for _ in self.values)
        for place, outputs in enumerate(found):
            self.outputs[place].update((name, outputs[name]) for name in segment.outputs)
            self.values[place] = {k: v for k, v in {**self.values[place], **outputs}.items() if k in alive}

    def _tally(self, pool: ThreadPoolExecutor, sessions: Sequence[Session | None]) -> F64:
        """What is lost over the samples when ``sessions`` run one after the other from here."""

        def lost(place: int) -> F64:
            values, outputs = self.values[place], dict(self.outputs[place])
            for session in (session for session in sessions if session is not None):
                found = session.run(values)
                values = {**values, **found}
                outputs.update(found)
            return _lost(self.expected[place], outputs, self.classes)

        return sum(pool.map(lost, range(len(self.values))), np.zeros((1, 4)))


def decibel(noise: float) -> float:
    """Noise-to-signal power as SNR in dB; 150 for none, -inf for infinite noise."""
    if noise == float("inf"):
        return float("-inf")
    return float(min(-10 * np.log10(noise), 150.0)) if noise else 150.0


def from_decibel(snr_db: float) -> float:
    """The inverse of ``decibel``."""
    return 0.0 if snr_db >= 150.0 else float(10 ** (-snr_db / 10))


def noise_to_signal(expected: Sequence[Mapping[str, Array]], found: Sequence[Mapping[str, Array]]) -> float:
    """Mean over float outputs of error power over signal power; inf when anything isn't finite or changed shape."""
    pairs = zip(expected, found, strict=True)
    return _noise(sum((_lost(want, got, ()) for want, got in pairs), np.zeros((1, 4)))).power


def _lost(expected: Mapping[str, Array], found: Mapping[str, Array], classes: Sequence[str]) -> F64:
    """Of one sample f64[float outputs, 4]: error and signal power, divergence and 1 where classes can diverge."""
    rows = [(0.0, 0.0, 0.0, 0.0)]
    for name, want in ((name, want) for name, want in expected.items() if want.dtype.kind == "f"):
        got, wanted = found[name], want.astype(np.float64)
        if want.shape != got.shape:
            rows.append((np.inf, 1.0, np.inf, float(name in classes)))
            continue
        error, power = float(np.square(wanted - got).sum()), float(np.square(wanted).sum())
        apart = float(kl_divergence(want, got).mean()) if name in classes else 0.0
        rows.append((error, power, apart, float(name in classes)))
    return np.array(rows[1:] or rows)


def _noise(tally: F64) -> Noise:
    """The sums of ``_lost`` over samples -> Noise."""
    error, power, apart, counted = tally.T
    ratios = np.where(power > 0, error / np.where(power > 0, power, 1.0), (error != 0).astype(np.float64))
    mean = float(ratios.mean())
    kl = float((apart[counted > 0] / counted[counted > 0]).mean()) if counted.any() else None
    return Noise(mean if np.isfinite(mean) else float("inf"), kl)
