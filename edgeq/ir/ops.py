"""What is true of an op on every target: one literal table, a row an op type (L2).

What a target *does* with an op isn't here: the oracle asks the installed runtime.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Op:
    """Facts of an op type.

    ``data``: input indices that carry real values worth quantizing. ``weight``/``bias``: input indices, when constant.
    ``out_axis``: axis of the weight that becomes the output channel. ``keeps_scale``: output values are a subset of the
    first input's values, so scale and zero point pass through unchanged. ``shares_scale``: several inputs and the
    output must share one scale for the op to move codes only. ``fixed``: output range known without data.
    """

    data: tuple[int, ...] = (0,)
    weight: int | None = None
    bias: int | None = None
    out_axis: int | None = None
    keeps_scale: bool = False
    shares_scale: bool = False
    fixed: tuple[float, float] | None = None


OPS: dict[str, Op] = {
    # multiply-accumulate
    "Conv": Op(weight=1, bias=2, out_axis=0),
    "ConvTranspose": Op(weight=1, bias=2, out_axis=1),
    "Gemm": Op(data=(0, 1), weight=1, bias=2, out_axis=1),  # 0 when transB
    "MatMul": Op(data=(0, 1), weight=1, out_axis=-1),
    # elementwise and joins
    "Add": Op(data=(0, 1)),
    "Sub": Op(data=(0, 1)),
    "Mul": Op(data=(0, 1)),
    "Div": Op(data=(0, 1)),
    "Concat": Op(data=(-1,)),  # every input
    "Where": Op(data=(1, 2)),
    # functions
    "Sigmoid": Op(fixed=(0.0, 1.0)),
    "HardSigmoid": Op(fixed=(0.0, 1.0)),
    "Softmax": Op(fixed=(0.0, 1.0)),
    "Tanh": Op(fixed=(-1.0, 1.0)),
    "LeakyRelu": Op(),
    "Relu": Op(),
    "Clip": Op(),
    "PRelu": Op(),
    "HardSwish": Op(),
    "Gelu": Op(),
    "Erf": Op(fixed=(-1.0, 1.0)),
    "AveragePool": Op(),
    "GlobalAveragePool": Op(),
    "ReduceMean": Op(),
    "LayerNormalization": Op(),
    "InstanceNormalization": Op(),
    "BatchNormalization": Op(),
    # data movers: codes pass through
    "MaxPool": Op(keeps_scale=True),
    "GlobalMaxPool": Op(keeps_scale=True),
    "ReduceMax": Op(keeps_scale=True),
    "ReduceMin": Op(keeps_scale=True),
    "Reshape": Op(keeps_scale=True),
    "Transpose": Op(keeps_scale=True),
    "Squeeze": Op(keeps_scale=True),
    "Unsqueeze": Op(keeps_scale=True),
    "Flatten": Op(keeps_scale=True),
    "Identity": Op(keeps_scale=True),
    "Slice": Op(keeps_scale=True),
    "Split": Op(keeps_scale=True),
    "Gather": Op(keeps_scale=True),
    "GatherElements": Op(keeps_scale=True),
    "Expand": Op(keeps_scale=True),
    "Tile": Op(keeps_scale=True),
    "DepthToSpace": Op(keeps_scale=True),
    "SpaceToDepth": Op(keeps_scale=True),
    "Resize": Op(keeps_scale=True),  # nearest only; the oracle refuses linear
    "Pad": Op(keeps_scale=True),  # constant 0 and edge/reflect
}
