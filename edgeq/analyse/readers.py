"""Which range method suits which activation: the one that disturbs least what reads it (L5).

The squared error of a tensor treats all its values alike; a product behind it does not. So each method's range is tried
on real values, and the error is taken where it matters: on the outputs of the products that read the tensor, run alone
in float. What reads it without weights of its own (sums, joins, data movers) passes the error on as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import onnxruntime

from edgeq.analyse.encode import root
from edgeq.analyse.place import Atom, Plan
from edgeq.analyse.slices import Slices
from edgeq.analyse.stats import Stats
from edgeq.ir.ops import OPS
from edgeq.ir.part import part
from edgeq.num import fit
from edgeq.num.quant import QParams, fake_quant
from edgeq.run.record import Array, Feed, Samples
from edgeq.run.session import open_session, run_session
from edgeq.target.record import Target

TAP_BYTES = 128 << 20  # of tapped tensors in a run


def by_readers(
    model: ir.Model, plan: Plan, stats: Mapping[str, Stats], samples: Samples, target: Target, *, threads: int = 2
) -> dict[str, str]:
    """Tensor whose parameters others may share -> the name in METHODS of its best range, over all ``samples``."""
    readers = _readers(plan)
    candidates = {name: _candidates(root(name, plan.ties), plan, stats, target) for name in readers}
    slices = Slices(model, list(readers), TAP_BYTES, threads)
    sessions: dict[str, onnxruntime.InferenceSession] = {}
    noise: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for feed in samples:
        for session, names in slices.of(feed):
            values = _values(session, feed, names)
            slices.learn(values)
            for name, array in values.items():
                for atom in readers[name]:
                    if atom is not None and atom.name not in sessions:
                        small = part(model, [name], [str(value.name) for value in atom.outputs])
                        sessions[atom.name] = open_session(small, threads=threads, provider=target.simulation)
                    run = None if atom is None else sessions[atom.name]
                    for method, value in _noise(name, array, candidates[name], run).items():
                        noise[root(name, plan.ties)][method] += value
    return {name: min(found, key=found.__getitem__) for name, found in noise.items()}


def _readers(plan: Plan) -> dict[str, list[Atom | None]]:
    """Value -> integer atoms that multiply it, and it alone, by constants; None for what reads it otherwise."""
    found: dict[str, list[Atom | None]] = defaultdict(list)
    for atom in (atom for atom in plan.atoms if atom.name in plan.integer):
        row = OPS[atom.head.op_type]
        if row.keeps_scale:
            continue
        multiplies = row.weight in atom.constants and len(atom.inputs) == 1
        for value in atom.inputs:
            found[str(value.name)].append(atom if multiplies else None)
    return dict(found)


def _candidates(name: str, plan: Plan, stats: Mapping[str, Stats], target: Target) -> dict[str, QParams]:
    """Every method's parameters of a tensor."""
    seen, quant = stats[name], plan.tensors.get(name, target.activations)
    ranges = {method: fit.fit_range(method, seen.histogram, seen.min, seen.max, quant) for method in fit.METHODS}
    return {m: fit.params_of_range(*r, quant, min_scale=target.limits.min_scale) for m, r in ranges.items()}


def _values(session: onnxruntime.InferenceSession | None, feed: Feed, names: list[str]) -> dict[str, Array]:
    computed = [name for name in names if name not in feed]
    values = run_session(session, feed, computed) if session is not None else {}
    return {**values, **{name: feed[name] for name in names if name in feed}}


def _noise(
    name: str, array: Array, candidates: Mapping[str, QParams], session: onnxruntime.InferenceSession | None
) -> dict[str, float]:
    """Method -> noise-to-signal power of what is made of the tensor, or of the tensor where nothing is."""
    exact = _made(name, array, session)
    power = sum(float(np.square(values, dtype=np.float64).sum()) for values in exact)
    known: dict[tuple[bytes, bytes], float] = {}
    noise = {}
    for method, params in candidates.items():
        key = params.scale.tobytes(), params.zero_point.tobytes()
        if key not in known:
            found = _made(name, fake_quant(array.astype(np.float32, copy=False), params).astype(array.dtype), session)
            lost = sum(float(np.square(a - b, dtype=np.float64).sum()) for a, b in zip(exact, found, strict=True))
            known[key] = lost / power if power else float(lost > 0)
        noise[method] = known[key]
    return noise


def _made(name: str, array: Array, session: onnxruntime.InferenceSession | None) -> list[Array]:
    return [array] if session is None else list(run_session(session, {name: array}).values())
