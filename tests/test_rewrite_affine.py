"""Scales and shifts fold into weights, and stay where folding would change the result."""

from __future__ import annotations

import numpy as np
import pytest

from edgeq.ir.text import to_text
from tests.graphs import Arrays, normal, number, ops, rewritten

BN = "<epsilon = 0.001>(c, gamma, beta, mean, var)"


def statistics(channels: int) -> dict[str, np.ndarray]:
    parts = {name: normal(channels) for name in ("gamma", "beta", "mean")}
    return {**parts, "var": np.abs(normal(channels)) + np.float32(0.1)}


@pytest.mark.parametrize(
    ("layer", "weights", "out"),
    [
        ("Conv<pads=[1,1,1,1]>(x, w, b)", {"w": normal(6, 4, 3, 3), "b": normal(6)}, 6),
        ("Conv<pads=[1,1,1,1], group=2>(x, w)", {"w": normal(6, 2, 3, 3)}, 6),
        ("Conv<group=4>(x, w)", {"w": normal(4, 1, 3, 3)}, 4),
        ("ConvTranspose<strides=[2,2]>(x, w, b)", {"w": normal(4, 6, 2, 2), "b": normal(6)}, 6),
        ("ConvTranspose<group=2>(x, w)", {"w": normal(4, 3, 2, 2)}, 6),
    ],
)
def test_batch_norm_goes_into_convolutions_of_any_grouping(layer: str, weights: Arrays, out: int) -> None:
    text = f"(float[N,4,8,8] x) => (float[N,O,H,W] y) {{ c = {layer} y = BatchNormalization{BN} }}"
    assert ops(rewritten(text, {**weights, **statistics(out)})) == [layer.split("<")[0]]


@pytest.mark.parametrize(
    ("layers", "left"),
    [
        ("c = Gemm<transB=1>(x, w, b)", ["Gemm"]),
        ("c = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b)", ["Gemm"]),
        ("c = MatMul(x, v)", ["Gemm"]),
        ("m = MatMul(x, v) c = Add(b, m)", ["Gemm"]),
    ],
)
def test_batch_norm_goes_into_linear_layers(layers: str, left: list[str]) -> None:
    text = f"(float[N,4] x) => (float[N,6] y) {{ {layers} y = BatchNormalization{BN} }}"
    weight = normal(6, 4)
    used = {"w": weight} if "w" in layers else {"v": weight.T.copy()}
    bias = {"b": normal(6)} if "b" in layers else {}
    assert ops(rewritten(text, {**used, **bias, **statistics(6)})) == left


def test_scale_goes_into_a_matmul_of_three_axes_and_its_bias() -> None:
    text = "(float[N,5,4] x) => (float[N,5,6] y) { m = MatMul(x, w) a = Add(m, b) s = Mul(a, k) y = Add(s, t) }"
    result = rewritten(text, {"w": normal(4, 6), "b": normal(6), "k": normal(6), "t": normal(6)})
    assert ops(result) == ["MatMul", "Add"]


def test_names_of_layers_and_weights_stay() -> None:
    text = "(float[N,4,8,8] x) => (float[N,6,6,6] y) { c = Conv(x, w) d = Mul(c, k) y = Add(d, t) }"
    result = rewritten(text, {"w": normal(6, 4, 3, 3), "k": normal(6, 1, 1), "t": number(3)})
    assert to_text(result).splitlines() == [
        "in  x f32[N,4,8,8]",
        "w   w f32[6,4,3,3]",
        "w   Conv_node_bias f32[6] = [3., 3., 3., 3., 3., 3.]",
        "y = Conv(x, w, Conv_node_bias)",
        "out y f32[N,6,6,6]",
    ]


def test_a_layer_that_others_read_keeps_its_weight() -> None:
    weights = {"w": normal(6, 4, 1, 1), **statistics(6)}
    twice = "(float[N,4,8,8] x) => (float[N,6,8,8] y) { c = Conv(x, w) n = BatchNormalization" + BN + " y = Add(n, c) }"
    assert ops(rewritten(twice, weights)) == ["Conv", "Mul", "Add", "Add"]
    output = "(float[N,4,8,8] x) => (float[N,6,8,8] y, float[N,6,8,8] c)"
    output += "{ c = Conv(x, w) y = BatchNormalization" + BN + " }"
    assert ops(rewritten(output, weights)) == ["Conv", "Mul", "Add"]


def test_a_shared_weight_is_scaled_for_one_reader_only() -> None:
    text = (
        "(float[N,4,8,8] x) => (float[N,4,8,8] y)"
        "{ c = Conv(x, w) n = BatchNormalization" + BN + " d = Conv(n, w) y = Relu(d) }"
    )
    assert ops(rewritten(text, {"w": normal(4, 4, 1, 1), **statistics(4)})) == ["Conv", "Conv", "Relu"]


def test_batch_norm_is_not_folded_past_an_activation_or_into_a_padded_layer_behind() -> None:
    text = (
        "(float[N,4,8,8] x) => (float[N,6,8,8] y)"
        "{ r = Conv(x, w) c = Relu(r) n = BatchNormalization" + BN + " y = Conv<pads=[1,1,1,1]>(n, v) }"
    )
    weights = {"w": normal(5, 4, 1, 1), "v": normal(6, 5, 3, 3), **statistics(5)}
    assert ops(rewritten(text, weights)) == ["Conv", "Relu", "Mul", "Add", "Conv"]


def test_batch_norm_in_training_mode_is_left() -> None:
    text = (
        "(float[2,4,8,8] c) => (float[2,4,8,8] y)"
        "{ y, m, v = BatchNormalization<training_mode=1>(c, gamma, beta, mean, var) }"
    )
    assert ops(rewritten(text, statistics(4))) == ["BatchNormalization"]


@pytest.mark.parametrize(
    ("constant", "why"),
    [
        (normal(8), "varies along the width"),
        (normal(1, 4, 1, 1), "makes four channels of one"),
        (normal(1, 1, 1, 1, 1), "adds an axis"),
    ],
)
def test_constants_that_are_no_channel_vector_stay(constant: np.ndarray, why: str) -> None:
    out = "A,B,C,D" if constant.ndim < 5 else "A,B,C,D,E"
    text = f"(float[N,3,8,8] x) => (float[{out}] y) {{ c = Conv(x, w) y = Add(c, k) }}"
    assert ops(rewritten(text, {"w": normal(1, 3, 1, 1), "k": constant})) == ["Conv", "Add"], why


def test_a_scale_that_overflows_the_weight_stays_outside() -> None:
    text = "(float[N,1,2,2] x) => (float[N,1,2,2] y) { c = Conv(x, w) y = Mul(c, k) }"
    weights = {"w": np.full((1, 1, 1, 1), 1e25, np.float32), "k": number(1e25)}
    small = {"w": np.full((1, 1, 1, 1), 1e25, np.float32), "k": number(1e-25)}
    with np.errstate(over="ignore"):
        assert ops(rewritten(text, weights)) == ["Conv", "Mul"]
    assert ops(rewritten(text, small)) == ["Conv"]


def test_a_scalar_in_front_goes_in_and_a_shift_only_where_nothing_is_padded() -> None:
    head = "(float[N,3,8,8] x) => (float[N,4,A,B] y) { s = Mul(k, x) a = Add(s, t) "
    weights = {"k": number(2.5), "t": number(0.75), "w": normal(4, 3, 3, 3), "b": normal(4)}
    assert ops(rewritten(head + "y = Conv(a, w, b) }", weights)) == ["Conv"]
    assert ops(rewritten(head + 'y = Conv<auto_pad="SAME_UPPER">(a, w, b) }', weights)) == ["Add", "Conv"]
    assert ops(rewritten(head + "y = Conv<pads=[1,1,1,1]>(a, w, b) }", weights)) == ["Add", "Conv"]


def test_a_bias_behind_a_squeeze_goes_into_the_layer() -> None:
    text = "(float[N,3,8,1] x) => (float[N,4,6] y) { c = Conv(x, w) s = Squeeze(c, a) y = Add(s, b) }"
    weights = {"w": normal(4, 3, 3, 1), "a": np.array([3]), "b": normal(1, 4, 1)}
    assert ops(rewritten(text, weights)) == ["Conv", "Squeeze"]
