"""One table drives op x number format x target: place, encode, insert Q/DQ, run, and compare with independent answers.

A row is a small graph in which the op stands behind a product that makes it worth quantizing, since regions without
multiply-accumulates stay float. Three answers must agree: the kernels ONNX Runtime fuses, the same Q/DQ model with
every node computed as ONNX defines it (the runtime without optimisation and onnx's reference evaluator), and float
within a bound counted in quantization steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from edgeq.analyse.coverage import read_back
from edgeq.ir import query
from edgeq.ir.ops import OPS
from edgeq.lower.fuse import fuse
from edgeq.lower.legalize import legalize
from edgeq.num.formats import Int
from edgeq.target.load import load_target
from tests.graphs import number
from tests.placed import Placed, placed, run

TARGETS = ("cpu-x64-vnni", "cpu-x64-avx2", "cpu-arm64")

RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (RNG.standard_normal(shape) * 0.4).astype(np.float32)


def whole(*values: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(values, np.int64)


@dataclass(frozen=True)
class Row:
    """``body`` computes ``y`` from ``t``. ``kernel``: what the runtime makes of the op, "" when its Q/DQ are dropped
    with it, None when it stays float. ``exact`` is False where the kernel rounds once more than its Q/DQ form."""

    body: str
    kernel: str | None
    weights: dict[str, Any] = field(default_factory=dict)
    image: bool = True
    exact: bool = True


MATRIX = {"g": normal(16, 8), "v": normal(8, 8), "m": normal(8, 5), "b": normal(8)}
PICKED = RNG.integers(8, size=(1, 2, 6, 6))
IMAGE = {
    "w": normal(8, 8, 1, 1),
    "b": normal(8),
    "zero": number(0),
    "six": number(6),
    "minus": number(-1),
    "one": number(1),
}

ROWS: dict[str, Row] = {
    "Conv": Row("y = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(t, k, b)", "QLinearConv", {"k": normal(8, 8, 3, 3)}),
    "Conv no bias": Row("y = Conv<kernel_shape=[3,3]>(t, k)", "QLinearConv", {"k": normal(6, 8, 3, 3)}),
    "Conv depthwise": Row("y = Conv<kernel_shape=[3,3], group=8>(t, k, b)", "QLinearConv", {"k": normal(8, 1, 3, 3)}),
    "Conv grouped": Row("y = Conv<kernel_shape=[1,1], group=2>(t, k, b)", "QLinearConv", {"k": normal(8, 4, 1, 1)}),
    "Conv strided": Row("y = Conv<kernel_shape=[1,1], strides=[2,2]>(t, w, b)", "QLinearConv"),
    "Conv Relu": Row("u = Conv<kernel_shape=[1,1]>(t, w, b) y = Relu(u)", "QLinearConv"),
    "Conv Relu6": Row("u = Conv<kernel_shape=[1,1]>(t, w, b) y = Clip(u, zero, six)", "QLinearConv"),
    "Conv Clip both ways": Row("u = Conv<kernel_shape=[1,1]>(t, w, b) y = Clip(u, minus, one)", "QLinearConv"),
    "Conv Clip above": Row("u = Conv<kernel_shape=[1,1]>(t, w, b) y = Clip(u, , six)", "QLinearConv"),
    "Conv Clip below": Row("u = Conv<kernel_shape=[1,1]>(t, w, b) y = Clip(u, zero)", "QLinearConv"),
    "Conv Clip unbounded": Row("u = Conv<kernel_shape=[1,1]>(t, w, b) y = Clip(u)", "QLinearConv"),
    "ConvTranspose": Row("y = ConvTranspose<kernel_shape=[2,2], strides=[2,2]>(t, k)", None, {"k": normal(8, 4, 2, 2)}),
    "Gemm": Row("y = Gemm(t, v, b)", "QGemm", image=False),
    "Gemm transB": Row("y = Gemm<transB=1>(t, v, b)", "QGemm", image=False),
    "Gemm transA": Row("s = Gemm<transA=1>(t, k, b) y = MatMul(s, v)", "QGemm", {"k": normal(5, 8)}, image=False),
    "Gemm alpha": Row("y = Gemm<alpha=0.5>(t, v)", "QGemm", image=False),
    "Gemm alpha and bias": Row("y = Gemm<alpha=0.5>(t, v, b)", None, image=False),
    "Gemm beta": Row("y = Gemm<beta=0.5>(t, v, b)", None, image=False),
    "Gemm row": Row("y = Gemm(t, v, c)", "QGemm", {"c": normal(1, 8)}, image=False),
    "Gemm scalar": Row("y = Gemm(t, v, c)", "QGemm", {"c": number(0.3)}, image=False),
    "Gemm matrix": Row("y = Gemm(t, v, c)", None, {"c": normal(5, 8)}, image=False),
    "Gemm column": Row("y = Gemm(t, v, c)", None, {"c": normal(5, 1)}, image=False),
    "MatMul": Row("s = MatMul(t, v) y = Softmax(s)", "QLinearMatMul", image=False, exact=False),
    "MatMul float out": Row("y = MatMul(t, v)", "MatMulIntegerToFloat", image=False),
    "MatMul bias": Row("s = MatMul(t, v) r = Add(s, b) y = Sigmoid(r)", "QGemm", image=False),
    "MatMul bias first": Row("s = MatMul(t, v) r = Add(b, s) y = Sigmoid(r)", "QGemm", image=False),
    "MatMul bias Relu": Row("s = MatMul(t, v) r = Add(s, b) q = Relu(r) y = MatMul(q, v)", "QGemm", image=False),
    "MatMul of two": Row("s = Transpose<perm=[1,0]>(t) y = MatMul(t, s)", "MatMulIntegerToFloat", image=False),
    "MatMul of itself": Row("s = MatMul(t, m) y = MatMul(s, s)", "MatMulIntegerToFloat", image=False),
    "Add": Row("u = Sigmoid(t) y = Add(t, u)", "QLinearAdd"),
    "Add itself": Row("y = Add(t, t)", "QLinearAdd"),
    "Add constant": Row("y = Add(t, c)", "QLinearAdd", {"c": normal(8, 1, 1)}),
    "Sub": Row("u = Sigmoid(t) y = Sub(t, u)", None),
    "Mul": Row("u = Sigmoid(t) y = Mul(t, u)", "QLinearMul"),
    "Mul constant": Row("y = Mul(c, t)", "QLinearMul", {"c": normal(8, 1, 1)}),
    "Div": Row("y = Div(t, c)", None, {"c": np.abs(normal(8, 1, 1)) + 1}),
    "Concat": Row("y = Concat<axis=1>(t, x, t)", "QLinearConcat"),
    "Where": Row("c = Greater(t, z) y = Where(c, t, n)", "QLinearWhere", {"z": number(0.1), "n": number(-0.2)}),
    "Sigmoid": Row("y = Sigmoid(t)", "QLinearSigmoid"),
    "HardSigmoid": Row("y = HardSigmoid(t)", "Clip"),
    "Softmax": Row("y = Softmax(t)", "QLinearSoftmax", image=False, exact=False),
    "Tanh": Row("y = Tanh(t)", None),
    "LeakyRelu": Row("y = LeakyRelu<alpha=0.1>(t)", "QLinearLeakyRelu"),
    "Relu": Row("u = MaxPool<kernel_shape=[2,2]>(t) y = Relu(u)", None),
    "Clip": Row("u = MaxPool<kernel_shape=[2,2]>(t) y = Clip(u, zero, six)", None),
    "PRelu": Row("y = PRelu(t, c)", None, {"c": normal(8, 1, 1)}),
    "HardSwish": Row("y = HardSwish(t)", "QLinearMul"),
    "Gelu": Row("y = Gelu(t)", None),
    "Erf": Row("y = Erf(t)", None),
    "AveragePool": Row("y = AveragePool<kernel_shape=[2,2]>(t)", "QLinearAveragePool"),
    "GlobalAveragePool": Row("y = GlobalAveragePool(t)", "QLinearGlobalAveragePool"),
    "ReduceMean": Row("y = ReduceMean(t, a)", None, {"a": whole(1)}),
    "LayerNormalization": Row("y = LayerNormalization(t, b, b)", None, image=False),
    "InstanceNormalization": Row("y = InstanceNormalization(t, b, b)", None),
    "BatchNormalization": Row("y = BatchNormalization(t, b, b, b, c)", None, {"c": np.ones(8, np.float32)}),
    "MaxPool": Row("y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(t)", "MaxPool"),
    "MaxPool with indices": Row("y, i = MaxPool<kernel_shape=[2,2]>(t)", None),
    "GlobalMaxPool": Row("y = GlobalMaxPool(t)", None),
    "ReduceMax": Row("y = ReduceMax(t, a)", "ReduceMax", {"a": whole(2, 3)}),
    "ReduceMin": Row("y = ReduceMin(t, a)", "ReduceMin", {"a": whole(2, 3)}),
    "Reshape": Row("y = Reshape(t, a)", "Reshape", {"a": whole(1, 4, -1)}),
    "Transpose": Row("y = Transpose<perm=[0,2,3,1]>(t)", "Transpose"),
    "Squeeze": Row("y = Squeeze(t, a)", "Squeeze", {"a": whole(0)}),
    "Unsqueeze": Row("y = Unsqueeze(t, a)", "Unsqueeze", {"a": whole(0)}),
    "Flatten": Row("y = Flatten(t)", "Flatten"),
    "Identity": Row("y = Identity(t)", ""),
    "Slice": Row("y = Slice(t, s, e, a)", "Slice", {"s": whole(1), "e": whole(5), "a": whole(1)}),
    "Split, one part unread": Row("p, q = Split<axis=1, num_outputs=2>(t) y = Sigmoid(p)", None),
    "Split": Row("p, q = Split<axis=1, num_outputs=2>(t) y = Concat<axis=1>(q, p)", "Split"),
    "Gather": Row("y = Gather<axis=1>(t, i)", "Gather", {"i": whole(3, 0, 3)}),
    "GatherElements": Row("y = GatherElements<axis=1>(t, i)", "GatherElements", {"i": PICKED}),
    "Expand": Row("y = Expand(t, a)", "Expand", {"a": whole(2, 8, 6, 6)}),
    "Tile": Row("y = Tile(t, a)", "Tile", {"a": whole(2, 1, 1, 1)}),
    "DepthToSpace": Row("y = DepthToSpace<blocksize=2>(t)", "DepthToSpace"),
    "SpaceToDepth": Row("y = SpaceToDepth<blocksize=2>(t)", None),
    "Resize": Row('y = Resize<mode="nearest">(t, , a)', "Resize", {"a": np.array([1, 1, 2, 2], np.float32)}),
    "Resize linear": Row('y = Resize<mode="linear">(t, , a)', None, {"a": np.array([1, 1, 2, 2], np.float32)}),
    "Pad": Row("y = Pad(t, a)", "Pad", {"a": whole(0, 0, 1, 1, 0, 0, 1, 1)}),
}  # fmt: skip


def quantized(row: Row, target: str) -> Placed:
    """The row's graph with everything integer that fuses."""
    if row.image:
        head, weights = "(float[1,8,6,6] x) => (float[A,B,C,D] y) { t = Conv<kernel_shape=[1,1]>(x, w, b) ", IMAGE
    else:
        head, weights = "(float[5,16] x) => (float[A,B] y) { t = MatMul(x, g) ", MATRIX
    return placed(head + row.body + " }", {**weights, **row.weights}, target=target)


def test_every_op_has_a_row() -> None:
    assert {name.split()[0].rstrip(",") for name in ROWS} >= set(OPS)


@pytest.mark.parametrize(
    "target", ["cpu-x64-vnni", *(pytest.param(name, marks=pytest.mark.slow) for name in TARGETS[1:])]
)
@pytest.mark.parametrize("name", ROWS)
def test_kernels_compute_what_onnx_defines(name: str, target: str) -> None:
    row = ROWS[name]
    made = quantized(row, target)
    legalize(made.model, made.target)
    lowered, _ = fuse(made.model, made.target)
    seen, lost = read_back(lowered, made.plan, made.shapes, made.target)
    assert not lost
    assert not seen.unexplained
    kernels = {**seen.kernels, "": 1}
    if row.kernel is None:
        assert any(
            str(node.op_type) == name.split()[0].rstrip(",")
            for node in made.source.graph
            if node.name in made.plan.left_float
        )
    else:
        assert row.kernel in kernels
    exact, plain, defined = made.exact(), made.unfused(), made.by_definition()
    found = run(lowered, made.feeds[0], config=made.target.session)
    for output, wanted in exact.items():
        if wanted.dtype.kind != "f":
            continue
        step = _step(made, output, wanted)
        slack = step * (1.01 if row.exact else 2.01)  # a code where two roundings meet a tie, from either side
        np.testing.assert_allclose(found[output], plain[output], atol=slack, rtol=0)
        np.testing.assert_allclose(found[output], defined[output], atol=slack, rtol=0)
        error = np.sqrt(np.mean(np.square(found[output] - wanted)))
        assert error <= 3 * step, "an op adds at most a step of noise to each of the few before it"


def _step(made: Placed, output: str, wanted: np.ndarray[Any, Any]) -> float:
    """Size of one code of a tensor: its own, or what an 8-bit one would have."""
    params = made.encodings.activations.get(output)
    return float(params.scale) if params is not None else float(np.ptp(wanted)) / 255


@pytest.mark.parametrize("target", TARGETS)
def test_stored_codes_are_the_targets(target: str) -> None:
    goal = load_target(target)
    assert isinstance(goal.activations.format, Int)
    signed = goal.activations.format.signed
    for name in ("Conv", "Conv depthwise", "MatMul bias Relu", "Gemm transB", "Add constant", "Mul constant"):
        made = quantized(ROWS[name], target)
        for node in made.model.graph:
            if node.op_type == "QuantizeLinear":
                assert node.outputs[0].dtype is not None
                assert str(node.outputs[0].dtype) == ("INT8" if signed else "UINT8")
            if node.op_type != "DequantizeLinear" or (codes := query.constant(node.inputs[0])) is None:
                continue
            reader, index = next(iter(node.outputs[0].uses()))
            if index == OPS[reader.op_type].weight:
                assert codes.dtype == np.int8
                whole = goal.limits.pair_sum_max > 2 * 255 * 127 or name == "Conv depthwise"
                assert np.abs(codes.astype(int)).max() == 127 or not whole, "the whole range is used"
            elif reader.op_type in ("Add", "Mul") and index != OPS[reader.op_type].bias and codes.dtype != np.int32:
                assert codes.dtype == (np.int8 if signed else np.uint8)
