"""What a compiling provider really took of a quantized model, node by node (L5).

Such a provider leaves no optimised graph to read back; the runtime says which nodes it was given, and its own account
what it computes them in.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import onnx_ir as ir

from edgeq.analyse.coverage import QDQ, computes, why_float
from edgeq.analyse.place import Plan, Shapes
from edgeq.ir import io, query
from edgeq.report.record import Coverage, Island
from edgeq.run.session import input_specs, random_feed
from edgeq.target.compiled import verdict
from edgeq.target.placement import Placement, placement
from edgeq.target.provider import silent
from edgeq.target.record import CPU, Target


def placed_on(model: ir.Model, target: Target) -> Placement:
    """How the runtime places ``model`` on the target's provider. Only a run of a ``silent`` one tells, on anything."""
    feed = random_feed(input_specs(model)) if silent(target.execution) else None
    with tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.onnx"
        io.write(model, path)
        return placement(path, target.execution, {}, feed)


def read_back(model: ir.Model, plan: Plan, shapes: Shapes, target: Target) -> tuple[Coverage, dict[str, str]]:
    """As ``coverage.read_back`` for a target whose provider compiles."""
    placed = placed_on(model, target)
    found = {atom.name: verdict(atom.head, atom.name, placed, target) for atom in plan.atoms}
    work = {atom.name: query.macs(atom.head, shapes.get(str(atom.head.outputs[0].name))) for atom in plan.atoms}
    done = [atom for atom in plan.atoms if atom.name in plan.integer and found[atom.name].kind != "float"]
    lost = [name for name in plan.integer if found[name].kind == "float"]
    islands = [
        Island(atom.name, atom.head.op_type, _why(atom.name, plan, found[atom.name].reason), work[atom.name])
        for atom in plan.atoms
        if atom not in done and computes(atom)
    ]
    on_cpu = {name: owner.op for name, owner in placed.assigned.items() if owner.provider == CPU.name}
    ends = {name for name, op in on_cpu.items() if op in QDQ}
    if len(ends) > len(own := _ends(model)):  # layout passes may rename those of inputs and outputs
        ends &= own
    movers = sum(found[atom.name].kind == "mover" for atom in done)
    summary = Coverage(
        integer_macs_share=sum(work[atom.name] for atom in done) / max(sum(work.values()), 1),
        integer_nodes=len(done) - movers,
        mover_nodes=movers,
        float_nodes=len(islands),
        boundary_qdq=len(ends),
        float_islands=tuple(sorted(islands, key=lambda island: -island.macs)),
        unexplained=tuple(name for name in on_cpu if name not in ends),
        kernels=dict(Counter(kernel.op for kernel in placed.kernels or ())),
        providers=dict(Counter(owner.provider for owner in placed.assigned.values())),
    )
    return summary, {name: found[name].reason for name in lost}


def _why(name: str, plan: Plan, reason: str) -> str:
    return reason if name in plan.integer else why_float(name, plan)


def _ends(model: ir.Model) -> set[str]:
    """Q of the model's inputs and DQ of its outputs, which the CPU does wherever the rest runs."""
    return {
        str(node.name)
        for node in model.graph
        if node.op_type in QDQ
        and ((node.inputs[0] is not None and node.inputs[0].is_graph_input()) or node.outputs[0].is_graph_output())
    }
