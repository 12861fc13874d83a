"""Who will run each node of a model, in what, why, and what would mend it: before anything is built (L5).

The forecast is the oracle's word on each atom, node by node; ``ran`` is what the runtime then did with the whole model.
``tests/bench/forecast.py`` compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from edgeq.analyse.coverage import is_integer, is_mover, optimised, propagate_types, trace
from edgeq.analyse.place import Atom, Plan
from edgeq.analyse.taken import placed_on
from edgeq.ir import query
from edgeq.report.record import NodeForecast
from edgeq.target.compiled import verdict
from edgeq.target.oracle import Oracle
from edgeq.target.patterns import PATTERNS, build, carried
from edgeq.target.record import CPU, Target
from edgeq.target.verdict import COMPARING

# Op that stays float -> what computes the same in integers, and the standard pattern that proves the target has it.
FIXES: dict[str, tuple[str, str]] = {
    "Sub": ("add the negated operand", "Add"),
    "Div": ("multiply by the reciprocal, where the divisor is constant", "Mul"),
    "ReduceMean": ("GlobalAveragePool, where the mean is over height and width", "GlobalAveragePool"),
    "GlobalMaxPool": ("ReduceMax over height and width", "ReduceMax"),
    "Resize": ("mode=nearest, if the model allows it", "Resize nearest"),
    "SpaceToDepth": ("Reshape, Transpose, Reshape", "Transpose"),
    "ConvTranspose": ("Conv and DepthToSpace, where the kernel is as wide as the stride", "DepthToSpace"),
    "PRelu": ("LeakyRelu, where the slope is one number", "LeakyRelu"),
    "Relu": ("directly behind a product it is part of its kernel", "Conv+Relu"),
    "Clip": ("directly behind a product it is part of its kernel", "Conv+Clip"),
    "Pad": ("the pads of the convolution or pool behind it", "Conv"),
    "Gelu": ("x * Sigmoid(1.702 x), which is near it", "x*Sigmoid(x), Q/DQ between"),
    "Erf": ("x * Sigmoid(1.702 x) for the Gelu around it, which is near it", "x*Sigmoid(x), Q/DQ between"),
}


def forecast(atoms: tuple[Atom, ...], plan: Plan, target: Target, oracle: Oracle) -> Iterator[NodeForecast]:
    """A row a node of ``atoms``, in graph order."""
    for atom in atoms:
        if atom.name in plan.integer:
            kernel = plan.integer[atom.name]
            yield _row(atom.head, target.provider, atom.verdict.kind, kernel, atom.verdict.reason)
            for node in atom.tail:
                yield _row(node, target.provider, atom.verdict.kind, "", f"part of the kernel of {atom.name}")
            continue
        for node in atom.nodes:
            real = any(query.is_float(value) for value in node.outputs)
            fix = _fix(node, oracle) if real else ""
            provider = CPU.name if target.provider == CPU.name else oracle.owner(node)
            why = plan.left_float[str(node.name)] if real else "its output is not float"
            yield _row(node, provider, "float" if real else "index", node.op_type, why, fix)


def _row(node: ir.Node, provider: str, runs: str, kernel: str, why: str, fix: str = "") -> NodeForecast:
    return NodeForecast(str(node.name), node.op_type, provider, runs, kernel, why, fix)


def _fix(node: ir.Node, oracle: Oracle) -> str:
    """What would run in integers instead, "" where nothing is known or the target has no kernel for that either."""
    words, name = FIXES.get(node.op_type, ("", ""))
    if not words:
        return ""
    pattern = next(pattern for pattern in PATTERNS if pattern.name == name)
    nodes = build(pattern)
    verdicts = oracle.ask_pattern(nodes, carried(pattern, nodes))
    return words if all(verdict.kind != "float" for verdict in verdicts) else ""


def ran(model: ir.Model, plan: Plan, target: Target) -> dict[str, tuple[str, str]]:
    """Atom of ``plan`` -> (provider, ``integer``, ``mover`` or ``float``) as the runtime runs the quantized ``model``.
    Atoms of which nothing is left, as they were fused into others or dropped, are absent."""
    if target.provider != CPU.name:
        placed = placed_on(model, target)
        found = {atom.name: verdict(atom.head, atom.name, placed, target) for atom in plan.atoms}
        told = placed.kernels is not None  # else what has no Q/DQ is float
        return {
            name: (one.provider or target.provider, one.kind if told or name in plan.integer else "float")
            for name, one in found.items()
            if one.kernel
        }
    graph = optimised(model, target).graph
    propagate_types(graph)
    origin = trace(model, graph).origin
    heads = {str(node.name): atom.name for atom in plan.atoms for node in atom.nodes}
    kinds: dict[str, str] = {}
    for node in graph:
        name = heads.get(origin[str(node.name)], "")
        if name and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            codes = is_mover(node)
            computes = is_integer(node) or (codes and node.op_type in COMPARING)
            kind = "integer" if computes else "mover" if codes else "float"
            kinds[name] = kind if kinds.get(name) != "integer" else "integer"
    return {name: (CPU.name, kind) for name, kind in kinds.items()}
