"""What really runs: the runtime's own optimised graph, read back and named after the user's nodes (L5).

The plan is a wish; this is the proof. The optimised graph renames and merges nodes, so they are traced by what they
write: a fused kernel still writes the tensor (or its codes) that the user's node wrote.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from edgeq.analyse.place import Atom, Plan, Shapes
from edgeq.ir import io, query
from edgeq.ir.ops import OPS
from edgeq.report.record import Coverage, Island
from edgeq.run.session import Level, open_session
from edgeq.target.kernels import DOMAIN, KERNELS
from edgeq.target.record import Target

INTEGERS = (
    ir.DataType.INT8,
    ir.DataType.UINT8,
    ir.DataType.INT16,
    ir.DataType.UINT16,
    ir.DataType.INT4,
    ir.DataType.UINT4,
)
# Kernels that compute in integers though a float enters or leaves them.
INTEGER_KERNELS = frozenset({
    "QLinearConv", "QLinearMatMul", "QGemm", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearSigmoid",
    "QLinearLeakyRelu", "QLinearSoftmax", "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearWhere",
    "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits", "MatMulInteger", "ConvInteger",
    "DynamicQuantizeLSTM", "QAttention", "GatherBlockQuantized", *KERNELS,
})  # fmt: skip
QDQ = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Trace:
    """Optimised node -> name of the user's node it came from, or "" for what the runtime added."""

    graph: ir.Graph
    origin: dict[str, str]


def optimised(model: ir.Model, target: Target, level: Level = "extended") -> ir.Model:
    """The graph the runtime would run at ``level``. Raises ModelError when it refuses the model."""
    with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
        path = Path(folder) / "optimised.onnx"
        open_session(model, level=level, provider=target.execution, optimized_path=path)
        return io.read(path)


def trace(model: ir.Model, graph: ir.Graph) -> Trace:
    """Name the nodes of an optimised ``graph`` after the nodes of the ``model`` it was made of."""
    producer = {str(value.name): str(node.name) for node in model.graph for value in node.outputs}
    for node in model.graph:
        if node.op_type in QDQ and node.inputs[0] is not None:  # codes stand for the tensor they encode
            source = str(node.inputs[0].name)
            producer[str(node.outputs[0].name)] = producer.get(source, str(node.name))
    known = {str(node.name) for node in model.graph}
    return Trace(graph, {str(node.name): _origin(node, producer, known) for node in graph})


def _origin(node: ir.Node, producer: Mapping[str, str], known: set[str]) -> str:
    """By name, by name less what layout passes append, by output, by the output's name in the node's name."""
    name = str(node.name)
    if name in known:
        return name
    plain = re.sub(r"/MatMulAddFusion$", "", re.sub(r"_token_\d+$", "", name))  # the latter is of layout passes
    if plain in known:
        return plain
    if node.op_type in ("Transpose", "ReorderInput", "ReorderOutput", *QDQ):
        return ""
    for value in node.outputs:
        if str(value.name) in producer:
            return producer[str(value.name)]
    return producer.get(re.sub(r"_nchwc$", "", name), "")


def is_integer(node: ir.Node) -> bool:
    """Whether an optimised node computes in integers."""
    return node.op_type in INTEGER_KERNELS


def is_mover(node: ir.Node) -> bool:
    """Whether an optimised node moves or compares codes (a plain op on an 8-bit tensor)."""
    first = node.inputs[0] if node.inputs else None
    return node.op_type not in QDQ and first is not None and first.dtype in INTEGERS and not is_integer(node)


def _lays_out(node: ir.Node) -> bool:
    """Whether a node puts the channels last for one of edgeq's own kernels: the runtime drops it where it lays out
    convolutions so, which it does last of all."""
    around = (*(value.producer() for value in node.inputs[:1] if value is not None), *query.users(node.outputs[0]))
    return node.op_type == "Transpose" and any(near is not None and near.domain == DOMAIN for near in around)


def read_back(model: ir.Model, plan: Plan, shapes: Shapes, target: Target) -> tuple[Coverage, dict[str, str]]:
    """What the QDQ ``model`` becomes on ``target``, and the atoms that were planned integer but run in float, with the
    reason to plan them float. ``shapes``: concrete ones of the float model's values."""
    seen = optimised(model, target)
    propagate_types(seen.graph)
    traced = trace(model, seen.graph)
    integer: list[ir.Node] = []
    movers: list[ir.Node] = []
    floats: list[ir.Node] = []
    boundary: list[ir.Node] = []
    for node in seen.graph:
        group = (
            None
            if _lays_out(node)
            else boundary
            if node.op_type in QDQ
            else integer
            if is_integer(node)
            else movers
            if is_mover(node)
            else floats
            if any(query.is_float(value) for value in node.outputs)
            else None
        )
        if group is not None:
            group.append(node)
    heads = {str(node.name): atom for atom in plan.atoms for node in atom.nodes}
    done = {heads[traced.origin[str(n.name)]].name for n in integer if traced.origin[str(n.name)] in heads}
    odd = _unexplained(boundary, plan, traced)
    summary = _summary(plan, shapes, done, (integer, movers, floats, boundary), tuple(odd))
    lost = {name for name in odd.values() if name} | {
        island.node for island in summary.float_islands if island.node in plan.integer
    }
    return summary, dict.fromkeys(lost, "the runtime did not fuse it in its place in this graph")


def _summary(
    plan: Plan,
    shapes: Shapes,
    done: set[str],
    groups: tuple[list[ir.Node], list[ir.Node], list[ir.Node], list[ir.Node]],
    unexplained: tuple[str, ...],
) -> Coverage:
    integer, movers, floats, boundary = groups
    work = {atom.name: query.macs(atom.head, shapes.get(str(atom.head.outputs[0].name))) for atom in plan.atoms}
    total = sum(work.values())
    islands = tuple(
        Island(atom.name, atom.head.op_type, why_float(atom.name, plan), work[atom.name])
        for atom in plan.atoms
        if atom.name not in done and computes(atom) and not (atom.name in plan.integer and not work[atom.name])
    )
    return Coverage(
        integer_macs_share=sum(work[name] for name in done) / total if total else 0.0,
        integer_nodes=len(integer),
        mover_nodes=len(movers),
        float_nodes=len(floats),
        boundary_qdq=len(boundary),
        float_islands=tuple(sorted(islands, key=lambda island: -island.macs)),
        unexplained=unexplained,
        kernels=dict(Counter(node.op_type for node in (*integer, *movers))),
    )


def computes(atom: Atom) -> bool:
    """Whether an atom does arithmetic on floats: a mover left float costs nothing worth a row."""
    row = OPS.get(atom.head.op_type)
    moves = row is not None and row.keeps_scale
    return bool(atom.inputs) and any(query.is_float(value) for value in atom.head.outputs) and not moves


def why_float(name: str, plan: Plan) -> str:
    if name in plan.integer:
        return f"planned as {plan.integer[name]}, but the runtime did not fuse it here"
    return plan.left_float.get(name, "not considered")


def _unexplained(boundary: list[ir.Node], plan: Plan, traced: Trace) -> dict[str, str]:
    """Q/DQ that stand at no border -> the planned atom that did not fuse, or "" for a stored constant that is decoded
    on each run."""
    planned = {str(node.name): atom.name for atom in plan.atoms if atom.name in plan.integer for node in atom.nodes}

    def failed(node: ir.Node | None) -> str | None:
        if node is None or is_integer(node) or node.op_type in QDQ:
            return None
        return planned.get(traced.origin.get(str(node.name), ""))

    odd: dict[str, str] = {}
    for node in boundary:
        around: list[ir.Node | None] = (
            [*query.users(node.outputs[0])]
            if node.op_type == "DequantizeLinear"
            else [value.producer() for value in node.inputs[:1] if value is not None]
        )
        guilty = [name for name in map(failed, around) if name is not None]
        if guilty or (node.op_type == "DequantizeLinear" and query.is_constant(node.inputs[0])):
            odd[str(node.name)] = guilty[0] if guilty else ""
    return odd


def propagate_types(graph: ir.Graph) -> None:
    """Give the outputs of Q and QLinear kernels and of movers their integer type; saved graphs leave them out."""
    for node in graph:
        first = next((value for value in node.inputs if value is not None), None)
        for value in node.outputs:
            if value.dtype is not None:
                continue
            zero = node.inputs[2] if node.op_type == "QuantizeLinear" and len(node.inputs) > 2 else None
            source = zero if zero is not None else first if node.op_type != "DequantizeLinear" else None
            if source is not None and source.dtype is not None:
                value.dtype = source.dtype
