"""No-ops, movers, constants' places, linear layers, pools, duplicates: each to one form."""

from __future__ import annotations

import numpy as np
import pytest

from edgeq.ir.text import to_text
from tests.graphs import Arrays, normal, number, ops, rewritten

NOTHING = [
    ("i = Identity(x)", {}),
    ("i = Dropout(x)", {}),
    ("i = Dropout(x, r, t)", {"r": number(0.5), "t": np.array(False)}),
    ("i = Cast<to=1>(x)", {}),
    ("i = Reshape(x, s)", {"s": np.array([-1, 3, 4])}),
    ("i = Reshape(x, s)", {"s": np.array([0, 0, -1])}),
    ("i = Transpose<perm=[0,1,2]>(x)", {}),
    ("i = Pad(x, s)", {"s": np.zeros(6, np.int64)}),
    ("i = Concat<axis=1>(x)", {}),
    ("i = Slice(x, a, b, c)", {"a": np.array([0, 0]), "b": np.array([2**31 - 1, 3]), "c": np.array([0, 1])}),
    ("i = Expand(x, s)", {"s": np.array([1, 1])}),
    ("i = Tile(x, s)", {"s": np.array([1, 1, 1])}),
    ("i = AveragePool<kernel_shape=[1]>(x)", {}),
    ("i = Mul(one, x)", {"one": np.ones((1, 4), np.float32)}),
    ("i = Div(x, one)", {"one": number(1)}),
    ("i = Add(x, zero)", {"zero": np.zeros((3, 1), np.float32)}),
    ("i = Max(x, low)", {"low": number(-np.inf)}),
    ("t = Transpose<perm=[2,0,1]>(x) i = Transpose<perm=[1,2,0]>(t)", {}),
    ("u = Unsqueeze(x, z) i = Squeeze(u, z)", {"z": np.array([1])}),
    ("u = Unsqueeze(x, z) i = Reshape(u, s)", {"z": np.array([0]), "s": np.array([-1, 3, 4])}),
]


@pytest.mark.parametrize(("body", "weights"), NOTHING)
def test_what_changes_nothing_goes(body: str, weights: Arrays) -> None:
    text = f"(float[N,3,4] x) => (float[N,3,4] y) {{ {body} y = Sigmoid(i) }}"
    assert ops(rewritten(text, weights)) == ["Sigmoid"]
    as_output = f"(float[N,3,4] s0) => (float[N,3,4] i) {{ x = Sigmoid(s0) {body} }}"
    result = rewritten(as_output, weights)
    assert ops(result) == ["Sigmoid"] and [value.name for value in result.graph.outputs] == ["i"]


SOMETHING = [
    ("i = Mul(x, one)", {"one": np.ones((2, 1, 1, 1), np.float32)}),
    ("i = Add(x, zero)", {"zero": np.zeros((5, 3, 4), np.float32)}),
    ("i = Reshape(x, s)", {"s": np.array([-1, 4, 3])}),
    ("i = Slice(x, a, b, c)", {"a": np.array([0]), "b": np.array([3]), "c": np.array([2])}),
    ("i = Sub(zero, x)", {"zero": number(0)}),
    ("i = Div(one, x)", {"one": number(1)}),
    ("i = Expand(x, s)", {"s": np.array([2, 1, 1, 1])}),
]


@pytest.mark.parametrize(("body", "weights"), SOMETHING)
def test_what_only_looks_like_nothing_stays(body: str, weights: Arrays) -> None:
    text = f"(float[1,3,4] x) => (float y) {{ {body} y = ReduceSum<keepdims=0>(i) }}"
    assert len(ops(rewritten(text, weights))) == 2


def test_an_identity_that_joins_an_input_to_an_output_stays() -> None:
    text = "(float[2] x) => (float[2] y, float[2] z, float[2] v) { y = Identity(x) z = Relu(x) v = Identity(z) }"
    assert to_text(rewritten(text)).splitlines() == [
        "in  x f32[2]",
        "y = Identity(x)",
        "z = Relu(x)",
        "v = Identity(z)",
        "out y f32[2], z f32[2], v f32[2]",
    ]


def test_transposes_join_and_a_reshape_that_copies_sizes_does_not() -> None:
    text = "(float[2,3,4] x) => (float[4,3,2] y) { t = Transpose<perm=[1,2,0]>(x) y = Transpose<perm=[1,0,2]>(t) }"
    assert ops(rewritten(text)) == ["Transpose"]
    text = "(float[2,3,4] x) => (float[6,4] y) { r = Reshape(x, a) y = Reshape(r, b) }"
    weights = {"a": np.array([6, 2, 2]), "b": np.array([0, 4])}
    assert ops(rewritten(text, weights)) == ["Reshape", "Reshape"]
    assert ops(rewritten(text, {**weights, "b": np.array([6, 4])})) == ["Reshape"]
    text = "(float[N,3,4] x) => (float[N,2,6] y) { r = Reshape(x, a) y = Reshape(r, b) }"
    assert ops(rewritten(text, {"a": np.array([0, 12]), "b": np.array([0, 2, 6])})) == ["Reshape"], "N is N before too"
    assert ops(rewritten(text, {"a": np.array([-1, 4]), "b": np.array([-1, 2, 6])})) == ["Reshape"]


@pytest.mark.parametrize(
    ("widths", "left"), [((0, 3), ["Neg"]), ((2, 0, 3), ["Concat", "Neg"]), ((2, 3), ["Concat", "Neg"])]
)
def test_parts_that_hold_nothing_are_not_joined(widths: tuple[int, ...], left: list[str]) -> None:
    names = [f"x{index}" for index in range(len(widths))]
    inputs = ", ".join(f"float[N,{width}] {name}" for name, width in zip(names, widths, strict=True))
    text = f"({inputs}) => (float[N,W] y) {{ c = Concat<axis=-1>({', '.join(names)}) y = Neg(c) }}"
    assert ops(rewritten(text)) == left


def test_axes_that_move_are_not_regrouped_away() -> None:
    text = "(float[1,N,1,4] x) => (float[N,1,4,1] y) { s = Squeeze(x, a) y = Unsqueeze(s, b) }"
    weights = {"a": np.array([0]), "b": np.array([3])}
    assert ops(rewritten(text, weights)) == ["Squeeze", "Unsqueeze"]


def test_equal_nodes_and_weights_become_one_but_not_random_ones() -> None:
    text = (
        "(float[N,3] x) => (float[N,2] y)"
        "{ a = MatMul(x, u) b = MatMul(x, v) s = Sigmoid(a) t = Sigmoid(b) y = Mul(s, t) }"
    )
    weight = normal(3, 2)
    result = rewritten(text, {"u": weight, "v": weight.copy()})
    assert ops(result) == ["MatMul", "Sigmoid", "Mul"] and list(result.graph.initializers) == ["u"]
    random = (
        "(float[2,3] x) => (float[2,3] y)"
        "{ a = RandomNormalLike(x) b = RandomNormalLike(x) d = Sub(a, b) z = Mul(d, o) p = Mul(z, z) y = Add(p, x) }"
    )
    assert ops(rewritten(random, {"o": number(0)})).count("RandomNormalLike") == 2


def test_both_of_two_equal_outputs_stay() -> None:
    text = "(float[2] x) => (float[2] y, float[2] z) { y = Relu(x) z = Relu(x) }"
    assert ops(rewritten(text)) == ["Relu", "Relu"]


def test_constants_come_second_as_add_or_mul() -> None:
    text = "(float[N,3] x) => (float[N,3] y) { a = Add(k, x) r = Relu(a) s = Sub(r, k) t = Relu(s) y = Div(t, k) }"
    assert to_text(rewritten(text, {"k": np.array([1, 2, 4], np.float32)})).splitlines() == [
        "in  x f32[N,3]",
        "w   k f32[3] = [1., 2., 4.]",
        "w   k_2 f32[3] = [-1., -2., -4.]",
        "w   k_3 f32[3] = [1.  , 0.5 , 0.25]",
        "a = Add(x, k)",
        "r = Relu(a)",
        "s = Add(r, k_2)",
        "t = Relu(s)",
        "y = Mul(t, k_3)",
        "out y f32[N,3]",
    ]


def test_a_quotient_that_is_rounded_and_integer_arithmetic_stay() -> None:
    text = "(float[N,3] x) => (float[N,3] y) { d = Div(x, k) y = Floor(d) }"
    assert ops(rewritten(text, {"k": number(3)})) == ["Div", "Floor"]
    assert ops(rewritten(text, {"k": number(4)})) == ["Mul", "Floor"]
    whole = "(int64[3] x) => (int64[3] y) { d = Div(x, k) y = Sub(d, k) }"
    assert ops(rewritten(whole, {"k": np.array([3])})) == ["Div", "Sub"]
    assert ops(rewritten("(float[3] x) => (float[3] y) { y = Div(x, k) }", {"k": number(0)})) == ["Div"]


@pytest.mark.parametrize(
    ("attributes", "bias"),
    [("transB=1", (4,)), ("transB=1, alpha=2.0", (1, 4)), ("transB=1, beta=0.5", ()), ("transA=1, transB=1", (4,))],
)
def test_gemm_is_straightened(attributes: str, bias: tuple[int, ...]) -> None:
    rows = "3,N" if "transA" in attributes else "N,3"
    text = f"(float[{rows}] x) => (float[N,4] y) {{ y = Gemm<{attributes}>(x, w, b) }}"
    result = rewritten(text, {"w": normal(4, 3), "b": normal(*bias)})
    (node,) = result.graph
    assert set(node.attributes) == ({"transA"} if "transA" in attributes else set())
    assert [str(value.shape) for value in node.inputs[1:] if value is not None] == ["[3,4]", "[4]"]


def test_a_gemm_whose_bias_differs_by_row_stays() -> None:
    text = "(float[2,3] x) => (float[2,4] y) { y = Gemm<transB=1>(x, w, b) }"
    result = rewritten(text, {"w": normal(4, 3), "b": normal(2, 4)})
    assert "transB=1" in to_text(result)


def test_matmul_and_bias_become_gemm_with_two_axes_only() -> None:
    text = "(float[{}3] x) => (float[{}4] y) {{ m = MatMul(x, w) y = Add(b, m) }}"
    weights = {"w": normal(3, 4), "b": normal(4)}
    assert ops(rewritten(text.format("N,", "N,"), weights)) == ["Gemm"]
    assert ops(rewritten(text.format("N,5,", "N,5,"), weights)) == ["MatMul", "Add"]
    assert ops(rewritten(text.format("2,", "2,"), {**weights, "b": normal(2, 4)})) == ["MatMul", "Add"]


@pytest.mark.parametrize(
    ("reduction", "left"),
    [
        ("ReduceMean(x, hw)", ["GlobalAveragePool"]),
        ("ReduceMean<keepdims=0>(x, hw)", ["GlobalAveragePool", "Flatten"]),
        ("ReduceMean(x, h)", ["ReduceMean"]),
    ],
)
def test_spatial_means_are_pools(reduction: str, left: list[str]) -> None:
    out = "N,3" if "keepdims" in reduction else "N,3,A,B"
    text = f"(float[N,3,5,6] x) => (float[{out}] y) {{ y = {reduction} }}"
    axes = {"hw": np.array([-1, 2])} if "hw" in reduction else {"h": np.array([2])}
    assert ops(rewritten(text, axes)) == left


def test_a_mean_over_two_axes_of_a_sequence_is_no_pool() -> None:
    text = "(float[N,5,6] x) => (float[N,1,1] y) { y = ReduceMean<axes=[1,2]>(x) }"
    assert ops(rewritten(text, opset=13)) == ["ReduceMean"]
