"""What an oracle is asked: a pattern of nodes, and which of its edges carry Q/DQ (L3).

Two questions with one signature get one answer. Ranks, ones, symbolic dimensions and kernel sizes are part of it, as
the runtime's fusions look at them; how many channels there are is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import onnx_ir as ir

from edgeq.ir.ops import OPS, Op
from edgeq.num.quant import Quant
from edgeq.target.record import Target

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})


@dataclass(frozen=True)
class Question:
    """A pattern and the edges that carry Q/DQ. ``shapes`` overrides the shapes of values, by name."""

    nodes: tuple[ir.Node, ...]
    quantized: frozenset[ir.Value]
    activations: Quant
    weights: Quant
    opset: int
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def values(self) -> list[ir.Value]:
        """Every value of the pattern, once, by order of appearance."""
        seen: dict[ir.Value, None] = {}
        for node in self.nodes:
            seen.update(dict.fromkeys(value for value in (*node.inputs, *node.outputs) if value is not None))
        return list(seen)

    def names(self) -> dict[ir.Value, str]:
        """What each value is called in a micro-model: ``v0``, ``v1`` … by order of appearance."""
        return {value: f"v{index}" for index, value in enumerate(self.values())}

    def leaves(self) -> list[ir.Value]:
        """Values that leave the pattern: read outside, output of the graph, or read by nobody."""
        inside = set(self.nodes)
        return [
            value
            for node in self.nodes
            for value in node.outputs
            if value.is_graph_output() or not value.uses() or any(use.node not in inside for use in value.uses())
        ]


def question(
    nodes: Sequence[ir.Node],
    quantized: Set[ir.Value],
    target: Target,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    activations: Quant | None = None,
    weights: Quant | None = None,
) -> Question:
    """The question in a target's formats, or in other ones of the same target."""
    return Question(
        tuple(nodes),
        frozenset(quantized),
        activations or target.activations,
        weights or target.weights,
        target.opset,
        shapes or {},
    )


def constant(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node, else None."""
    return ir.convenience.get_const_tensor(value)


def facts(node: ir.Node) -> Op:
    """The row of an op type; a row without weight or bias for an op that has none."""
    return OPS.get(node.op_type, Op()) if node.domain == "" else Op()


def is_real(value: ir.Value) -> bool:
    """Whether a value holds floats. A value of unknown dtype counts as float when it is its node's first output."""
    return value.dtype in FLOATS if value.dtype is not None else not value.index()


def quantizable_inputs(node: ir.Node) -> tuple[int, ...]:
    """Input indices that would carry Q/DQ: the data inputs, and weight and bias where they are constant."""
    op = facts(node)
    data = range(len(node.inputs)) if -1 in op.data else op.data
    fixed = [index for index in (op.weight, op.bias) if index is not None]
    found = []
    for index in sorted({*data, *fixed}):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and is_real(value) and (index in data or constant(value) is not None):
            found.append(index)
    return tuple(found)


def holds_graph(node: ir.Node) -> bool:
    """Whether a node has a body of its own (If, Loop, Scan)."""
    return any(attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attr in node.attributes.values())


def channel_axis(node: ir.Node, rank: int) -> int:
    """Axis of ``node``'s weight that becomes the output channel."""
    if node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int():
        return 0
    return (facts(node).out_axis or 0) % rank


def block_axis(node: ir.Node, rank: int) -> int:
    """Axis of ``node``'s weight that is summed over, along which block scales run."""
    return (channel_axis(node, rank) - 1) % rank if rank < 3 or node.op_type == "MatMul" else 1


def signature(asked: Question) -> str:
    """Text equal for questions that must get the same answer: ``Conv,Relu:3f2a…``."""
    names = asked.names()
    lines = [f"{asked.activations} {asked.weights} {asked.opset}"]
    for node in asked.nodes:
        read, made = (
            " ".join(names[value] if value is not None else "-" for value in side)
            for side in (node.inputs, node.outputs)
        )
        lines.append(f"{node.domain}.{node.op_type} {read} > {made} {_attributes(node)}")
    leaves = set(asked.leaves())
    for value, name in names.items():
        marks = (_constancy(asked, value), value in asked.quantized, value in leaves)
        lines.append(f"{name} {value.dtype} {_shape_class(asked, value)} {marks}")
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:24]
    return ",".join(node.op_type for node in asked.nodes) + ":" + digest


def _constancy(asked: Question, value: ir.Value) -> str:
    """Whether a value is constant; a float that stays one (the bounds of a Clip) in full, as fusions look at it."""
    tensor = constant(value)
    if tensor is None:
        return "computed"
    scalar = tensor.size == 1 and tensor.dtype in FLOATS and value not in asked.quantized
    return str(tensor.numpy().item()) if scalar else "constant"


def _attributes(node: ir.Node) -> str:
    """Attributes as text. The number of groups counts only as one, many, or depthwise."""
    parts = []
    for name, attr in sorted(node.attributes.items()):
        text = str(attr.value)
        if attr.type == ir.AttributeType.TENSOR:
            text = hashlib.sha256(attr.as_tensor().tobytes()).hexdigest()
        elif name == "group" and node.op_type == "Conv":
            text = _grouping(node, attr.as_int())
        parts.append(f"{name}={text}")
    return " ".join(parts)


def _grouping(node: ir.Node, group: int) -> str:
    weight = node.inputs[1]
    channels = weight.shape[0] if weight is not None and weight.shape is not None else None
    return "one" if group == 1 else "depthwise" if group == channels else "grouped"


def _shape_class(asked: Question, value: ir.Value) -> str:
    """Rank, and which dimensions are 1, symbolic (s) or more (n); kernel sizes of constants in full."""
    shape = shape_of(asked, value)
    if shape is None:
        return "?"
    kernel = constant(value) is not None
    return " ".join(
        "s" if not isinstance(dim, int) else str(dim) if dim == 1 or (kernel and axis > 1) else "n"
        for axis, dim in enumerate(shape)
    )


def shape_of(asked: Question, value: ir.Value) -> list[int | str | None] | None:
    """Shape of a value: given by the asker, or as in its model. None where its rank is unknown."""
    given = asked.shapes.get(value.name or "")
    if given is not None:
        return list(given)
    if value.shape is None:
        tensor = constant(value)
        return list(tensor.shape.numpy()) if tensor is not None else None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]
