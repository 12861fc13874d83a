"""Costs of atoms measured on this machine: two profiles, one of the float model and one of the integer one (L5).

What only one of the two profiles saw (an atom the first plan left float) is estimated with the default cost, scaled
by the median ratio of measured to default on what was seen, so that measured and estimated prices stay comparable.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edgeq.analyse.coverage import QDQ, trace
from edgeq.analyse.place import Atom, Costs, Plan, Shapes, default_costs
from edgeq.ir import query
from edgeq.run.profile import profile
from edgeq.run.record import Feed
from edgeq.target.record import Target

LAYOUT = ("Transpose", "ReorderInput", "ReorderOutput")


def measure(
    float_model: ir.Model, integer_model: ir.Model, plan: Plan, feeds: Sequence[Feed], shapes: Shapes, target: Target,
    *, threads: int = 1,
) -> Costs:  # fmt: skip
    """Nanoseconds of every atom of ``plan`` in both worlds and of every border, from two profiles."""
    default = default_costs(plan.atoms, shapes)
    in_float, _ = _by_atom(float_model, plan.atoms, feeds, target, threads)
    in_integer, borders = _by_atom(integer_model, plan.atoms, feeds, target, threads)
    seen_integer = {name: ns for name, ns in in_integer.items() if name in plan.integer}
    crossed = _crossed(plan)
    estimate = sum(default.boundary_ns[name] for name in crossed)
    rate = borders / estimate if estimate else _rate(in_float, default.float_ns)
    return Costs(
        _fill(default.float_ns, in_float),
        _fill(default.integer_ns, seen_integer, fallback=_rate(in_float, default.float_ns)),
        {name: ns * rate for name, ns in default.boundary_ns.items()},
    )


def _by_atom(
    model: ir.Model, atoms: Sequence[Atom], feeds: Sequence[Feed], target: Target, threads: int
) -> tuple[dict[str, float], float]:
    """Nanoseconds by atom, and those of Q, DQ and layout changes that belong to none."""
    times, graph = profile(model, feeds, threads=threads, provider=target.execution)
    traced = trace(model, graph.graph)
    atom_of = {str(node.name): atom.name for atom in atoms for node in atom.nodes}
    kinds = {str(node.name): node.op_type for node in graph.graph}
    total: dict[str, float] = defaultdict(float)
    borders = 0.0
    for name, ns in times.items():
        origin = traced.origin.get(name, "")
        if kinds.get(name) in QDQ or (kinds.get(name) in LAYOUT and not origin):
            borders += ns
        elif origin in atom_of:
            total[atom_of[origin]] += ns
    return dict(total), borders


def _crossed(plan: Plan) -> list[str]:
    """Tensors that pass between the two worlds under ``plan``: a Q where integer atoms read what is float, a DQ where
    anything else reads what they write as codes, the caller of the model included."""
    integer = [atom for atom in plan.atoms if atom.name in plan.integer]
    inner = {node for atom in integer for node in atom.nodes}
    codes = {value for atom in integer if atom.name not in plan.bare for value in atom.outputs}
    quantized = {value for atom in integer for value in atom.inputs if value not in codes}
    shown = {v for v in codes if v.is_graph_output() or any(node not in inner for node in query.users(v))}
    return [str(value.name) for value in (*quantized, *shown)]


def _rate(measured: Mapping[str, float], default: Mapping[str, float]) -> float:
    ratios = [ns / default[name] for name, ns in measured.items() if default.get(name)]
    return float(np.median(ratios)) if ratios else 1.0


def _fill(default: Mapping[str, float], measured: Mapping[str, float], fallback: float = 1.0) -> dict[str, float]:
    rate = _rate(measured, default) if measured else fallback
    return {name: measured.get(name, ns * rate) for name, ns in default.items()}
