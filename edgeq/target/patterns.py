"""The standard questions: what `edgeq explain TARGET` shows, one literal row a pattern (L3).

Each row is put to the oracle on the installed runtime when it is shown; no answer is written down here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeq.target.oracle import Oracle
from edgeq.target.question import quantizable_inputs
from edgeq.target.record import Target
from edgeq.target.verdict import Verdict


@dataclass(frozen=True)
class Real:
    """A float operand: computed at run time, or a constant."""

    shape: tuple[int, ...]
    constant: bool = False
    fill: float | tuple[float, ...] = 0.5


@dataclass(frozen=True)
class Ints:
    """An int64 operand: constant values, or computed at run time when there are none."""

    values: tuple[int, ...] = ()


@dataclass(frozen=True)
class Bools:
    """A condition computed at run time."""

    shape: tuple[int, ...]


Operand = Real | Ints | Bools | str | None  # text: the output of the pattern's node of that op type


@dataclass(frozen=True)
class Call:
    """One node of a pattern."""

    op_type: str
    operands: tuple[Operand, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    codes_out: bool = True  # False: the output is an index


@dataclass(frozen=True)
class Pattern:
    """Neighbours asked together. ``bare`` are the op types whose output, or "input", carries no Q/DQ."""

    name: str
    calls: tuple[Call, ...]
    bare: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One answered pattern: the verdict on each of its nodes."""

    pattern: str
    ops: tuple[str, ...]
    dtype: str
    verdicts: tuple[Verdict, ...]

    @property
    def verdict(self) -> Verdict:
        """The verdict on the node that costs: the first one."""
        return self.verdicts[0]


IMAGE, TOKENS, ROWS = Real((1, 8, 6, 6)), Real((1, 4, 16)), Real((4, 16))
BIAS = Real((8,), constant=True)
CONV_W, DEPTHWISE_W = Real((8, 8, 3, 3), constant=True), Real((8, 1, 3, 3), constant=True)
WEIGHT, WEIGHT_T = Real((16, 8), constant=True), Real((8, 16), constant=True)
ZERO, SIX = Real((), constant=True, fill=0.0), Real((), constant=True, fill=6.0)
NORM = Real((6,), constant=True)
UPSCALE = Real((4,), constant=True, fill=(1.0, 1.0, 2.0, 2.0))
TABLE = Real((32, 16), constant=True)

CONV = Call("Conv", (IMAGE, CONV_W, BIAS))
MATMUL = Call("MatMul", (TOKENS, WEIGHT))
MATMUL_BIAS = (MATMUL, Call("Add", ("MatMul", BIAS)))
SWISH = (Call("Sigmoid", (IMAGE,)), Call("Mul", ("Sigmoid", IMAGE)))


def _alone(op_type: str, *operands: Operand, **attributes: Any) -> Pattern:
    return Pattern(op_type, (Call(op_type, operands or (IMAGE,), attributes),))


PATTERNS: tuple[Pattern, ...] = (
    Pattern("Conv", (CONV,)),
    Pattern("Conv, float out", (CONV,), bare=("Conv",)),
    Pattern("Conv, float in and out", (CONV,), bare=("input", "Conv")),
    Pattern("Conv depthwise", (Call("Conv", (IMAGE, DEPTHWISE_W, BIAS), {"group": 8}),)),
    Pattern("Conv+Relu", (CONV, Call("Relu", ("Conv",))), bare=("Conv",)),
    Pattern("Conv+Clip", (CONV, Call("Clip", ("Conv", ZERO, SIX))), bare=("Conv",)),
    _alone("ConvTranspose", IMAGE, CONV_W, BIAS),
    Pattern("MatMul", (MATMUL,)),
    Pattern("MatMul, float out", (MATMUL,), bare=("MatMul",)),
    Pattern("MatMul, float in and out", (MATMUL,), bare=("input", "MatMul")),
    Pattern("MatMul of activations", (Call("MatMul", (Real((1, 2, 4, 8)), Real((1, 2, 8, 4)))),)),
    Pattern("MatMul+Add", MATMUL_BIAS, bare=("MatMul",)),
    Pattern("MatMul+Add, Q/DQ between", MATMUL_BIAS),
    Pattern("Gemm", (Call("Gemm", (ROWS, WEIGHT, BIAS)),)),
    Pattern("Gemm transB", (Call("Gemm", (ROWS, WEIGHT_T, BIAS), {"transB": 1}),)),
    Pattern("Gemm, float out", (Call("Gemm", (ROWS, WEIGHT, BIAS)),), bare=("Gemm",)),
    _alone("Add", IMAGE, Real((1, 8, 1, 1))),
    _alone("Sub", IMAGE, IMAGE),
    _alone("Mul", IMAGE, Real((1, 8, 1, 1))),
    _alone("Div", IMAGE, IMAGE),
    _alone("Concat", IMAGE, IMAGE, axis=1),
    _alone("Where", Bools((1, 8, 6, 6)), IMAGE, IMAGE),
    _alone("Sigmoid"),
    Pattern("x*Sigmoid(x), Q/DQ between", SWISH),
    Pattern("x*Sigmoid(x)", SWISH, bare=("Sigmoid",)),
    _alone("Softmax"),
    _alone("LeakyRelu"),
    _alone("HardSwish"),
    _alone("HardSigmoid"),
    _alone("Gelu"),
    _alone("Tanh"),
    _alone("Erf"),
    _alone("Relu"),
    _alone("AveragePool", kernel_shape=(2, 2)),
    _alone("GlobalAveragePool"),
    _alone("ReduceMean", IMAGE, Ints((2, 3))),
    _alone("LayerNormalization", IMAGE, NORM, NORM),
    _alone("InstanceNormalization", IMAGE, BIAS, BIAS),
    _alone("MaxPool", kernel_shape=(2, 2)),
    _alone("GlobalMaxPool"),
    _alone("ReduceMax", IMAGE, Ints((2, 3))),
    _alone("ReduceMin", IMAGE, Ints((2, 3))),
    Pattern("ArgMax", (Call("ArgMax", (IMAGE,), {"axis": 1}, codes_out=False),)),
    _alone("Reshape", IMAGE, Ints((1, -1))),
    _alone("Transpose", perm=(0, 2, 3, 1)),
    _alone("Squeeze", IMAGE, Ints((0,))),
    _alone("Unsqueeze", IMAGE, Ints((0,))),
    _alone("Flatten"),
    _alone("Identity"),
    _alone("Slice", IMAGE, Ints((0,)), Ints((4,)), Ints((1,))),
    Pattern("Split", (Call("Split", (IMAGE,), {"axis": 1, "num_outputs": 2}, outputs=2),)),
    _alone("Gather", IMAGE, Ints((0, 2)), axis=1),
    _alone("GatherElements", Real((2,)), Ints((0, 1))),
    Pattern("Gather from a constant table", (Call("Gather", (TABLE, Ints())),)),
    _alone("Expand", IMAGE, Ints((2, 8, 6, 6))),
    _alone("Tile", IMAGE, Ints((1, 1, 2, 2))),
    _alone("Pad", IMAGE, Ints((0, 0, 1, 1, 0, 0, 1, 1))),
    Pattern("Resize nearest", (Call("Resize", (IMAGE, None, UPSCALE), {"mode": "nearest"}),)),
    Pattern("Resize linear", (Call("Resize", (IMAGE, None, UPSCALE), {"mode": "linear"}),)),
    _alone("DepthToSpace", blocksize=2),
    _alone("SpaceToDepth", blocksize=2),
)


def table(target: Target, oracle: Oracle | None = None) -> list[Row]:
    """Every standard pattern with what the installed runtime makes of it, in the target's formats."""
    asker = oracle or Oracle(target)
    return [_row(pattern, target, asker) for pattern in PATTERNS]


def _row(pattern: Pattern, target: Target, oracle: Oracle) -> Row:
    nodes = build(pattern)
    verdicts = oracle.ask_pattern(nodes, carried(pattern, nodes))
    return Row(pattern.name, tuple(node.op_type for node in nodes), str(target.activations), verdicts)


def build(pattern: Pattern) -> list[ir.Node]:
    """The nodes of a pattern. Equal Real operands of run time are one value; outputs are named by op type."""
    made: dict[Operand, ir.Value] = {}
    nodes = []
    for call in pattern.calls:
        inputs = [_value(operand, made) for operand in call.operands]
        dtype = ir.DataType.FLOAT if call.codes_out else ir.DataType.INT64
        outputs = [ir.val(call.op_type + "'" * index, dtype) for index in range(call.outputs)]
        made[call.op_type] = outputs[0]
        nodes.append(ir.node(call.op_type, inputs, call.attributes, outputs=outputs))
    return nodes


def carried(pattern: Pattern, nodes: Iterable[ir.Node]) -> frozenset[str]:
    """Names of the values of a built pattern that carry Q/DQ."""
    names = set()
    for node in nodes:
        inputs = [node.inputs[index] for index in quantizable_inputs(node)]
        names |= {str(value.name) for value in inputs if value is not None}
        names |= {str(value.name) for value in node.outputs if value.dtype == ir.DataType.FLOAT}
    return frozenset(name for name in names if name.rstrip("'0123456789") not in pattern.bare)


def _value(operand: Operand, made: dict[Operand, ir.Value]) -> ir.Value | None:
    if operand is None:
        return None
    if operand not in made:
        made[operand] = _new_value(operand, f"{len(made)}")
    return made[operand]


def _new_value(operand: Operand, suffix: str) -> ir.Value:
    if isinstance(operand, Ints) and not operand.values:
        return ir.val(f"index{suffix}", ir.DataType.INT64, ir.Shape([1, 4]))
    if isinstance(operand, Bools):
        return ir.val(f"condition{suffix}", ir.DataType.BOOL, ir.Shape(operand.shape))
    if isinstance(operand, Real) and not operand.constant:
        return ir.val(f"input{suffix}", ir.DataType.FLOAT, ir.Shape(operand.shape))
    if isinstance(operand, Real):
        tensor = ir.tensor(np.full(operand.shape, operand.fill, np.float32))
    elif isinstance(operand, Ints):
        tensor = ir.tensor(np.asarray(operand.values, np.int64))
    else:
        raise ValueError(f"no node of op type {operand!r} above in the pattern")
    return ir.val(f"constant{suffix}", tensor.dtype, ir.Shape(tensor.shape.numpy()), const_value=tensor)
