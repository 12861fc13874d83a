"""Ops written out as arithmetic get their names back, in each spelling that exporters use."""

from __future__ import annotations

import numpy as np
import pytest

from tests.graphs import normal, number, ops, rewritten

CONSTANTS = {
    "half": number(0.5),
    "one": number(1),
    "two": number(2),
    "three": number(3),
    "six": number(6),
    "zero": number(0),
    "root2": number(2**0.5),
    "inverse_root2": number(0.7071067811865476),
    "cube": number(0.044715),
    "tanh_scale": number(0.7978845608028654),
    "sixth": number(1 / 6),
    "epsilon": number(1e-5),
    "minus_half": number(-0.5),
    "last": np.array([-1]),
    "first": np.array([1]),
}


def unary(body: str, shape: str = "2,5") -> str:
    return f"(float[{shape}] x) => (float[{shape}] y) {{ {body} }}"


def used(body: str) -> dict[str, np.ndarray]:
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return {name: array for name, array in CONSTANTS.items() if name in words}


GELUS = [
    "u = Div(x, root2) e = Erf(u) a = Add(e, one) m = Mul(x, a) y = Mul(m, half)",
    "u = Mul(x, inverse_root2) e = Erf(u) a = Add(one, e) h = Mul(x, half) y = Mul(h, a)",
    "u = Mul(inverse_root2, x) e = Erf(u) a = Add(one, e) h = Mul(half, a) y = Mul(h, x)",
    "u = Div(x, root2) e = Erf(u) a = Add(e, one) m = Mul(a, x) y = Div(m, two)",
]
TANHS = [
    (
        "p = Pow(x, three) c = Mul(p, cube) s = Add(x, c) k = Mul(s, tanh_scale) t = Tanh(k) "
        "a = Add(t, one) h = Mul(x, half) y = Mul(h, a)"
    ),
    (
        "q = Mul(x, x) p = Mul(q, x) c = Mul(cube, p) s = Add(c, x) k = Mul(tanh_scale, s) t = Tanh(k) "
        "a = Add(one, t) h = Mul(half, a) y = Mul(x, h)"
    ),
    (
        "q = Mul(x, x) c = Mul(q, cube) i = Add(c, one) m = Mul(x, tanh_scale) k = Mul(m, i) t = Tanh(k) "
        "a = Add(t, one) m2 = Mul(x, a) y = Mul(m2, half)"
    ),
]


@pytest.mark.parametrize("body", [*GELUS, *TANHS])
def test_gelu_in_every_spelling(body: str) -> None:
    result = rewritten(unary(body), used(body))
    (node,) = result.graph
    assert node.op_type == "Gelu"
    assert ("approximate" in node.attributes) == (body in TANHS)


def test_gelu_needs_opset_20_and_the_right_constant() -> None:
    assert "Gelu" not in ops(rewritten(unary(GELUS[0]), used(GELUS[0]), opset=19))
    assert "Gelu" not in ops(rewritten(unary(GELUS[0]), {**used(GELUS[0]), "root2": number(1.5)}))
    other = GELUS[0].replace("m = Mul(x, a)", "m = Mul(u, a)")
    assert "Gelu" not in ops(rewritten(unary(other), used(other)))


def test_a_gelu_whose_inside_is_an_output_keeps_it() -> None:
    body = GELUS[0]
    text = f"(float[2,5] x) => (float[2,5] y, float[2,5] e) {{ {body} }}"
    assert ops(rewritten(text, used(body))) == ["Mul", "Erf", "Gelu"]


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six)",
        "a = Add(three, x) c = Clip(a, zero, six) d = Div(c, six) y = Mul(d, x)",
        "a = Add(x, three) c = Clip(a, zero, six) d = Mul(c, sixth) y = Mul(x, d)",
        "h = HardSigmoid<alpha=0.1666667, beta=0.5>(x) y = Mul(x, h)",
    ],
)
def test_hard_swish_in_every_spelling(body: str) -> None:
    assert ops(rewritten(unary(body), used(body))) == ["HardSwish"]
    assert "HardSwish" not in ops(rewritten(unary(body), used(body), opset=13))


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(x, three) c = Clip(a, zero, six) y = Div(c, six)",
        "m = Mul(x, sixth) a = Add(m, half) y = Clip(a, zero, one)",
    ],
)
def test_hard_sigmoid_in_every_spelling(body: str) -> None:
    assert ops(rewritten(unary(body), used(body))) == ["HardSigmoid"]


def test_what_is_only_like_hard_swish_is_left() -> None:
    keras = "h = HardSigmoid<alpha=0.2, beta=0.5>(x) y = Mul(x, h)"
    assert ops(rewritten(unary(keras))) == ["HardSigmoid", "Mul"]
    other = "a = Add(x, three) c = Clip(a, zero, six) n = Neg(x) m = Mul(n, c) y = Div(m, six)"
    assert "HardSwish" not in ops(rewritten(unary(other), used(other)))


def test_relu_and_clip_become_one() -> None:
    body = "r = Relu(x) y = Clip(r, minus_half, six)"
    result = rewritten(unary(body), used(body))
    assert ops(result) == ["Clip"]
    assert ops(rewritten(unary("c = Clip(x, minus_half) y = Relu(c)"), used("minus_half"))) == ["Relu"]


LAYER_NORMS = [
    (
        "m = ReduceMean(x, last) d = Sub(x, m) p = Pow(d, two) v = ReduceMean(p, last) "
        "a = Add(v, epsilon) r = Sqrt(a) n = Div(d, r)"
    ),
    (
        "m = ReduceMean(x, last) d = Sub(x, m) d2 = Sub(x, m) p = Mul(d2, d2) v = ReduceMean(p, last) "
        "a = Add(epsilon, v) r = Sqrt(a) i = Reciprocal(r) n = Mul(i, d)"
    ),
    (
        "m = ReduceMean(x, last) d = Sub(x, m) p = Mul(d, d) v = ReduceMean(p, last) a = Add(v, epsilon) "
        "i = Pow(a, minus_half) n = Mul(d, i)"
    ),
    (
        "m = ReduceMean(x, last) d = Sub(x, m) c = Cast<to=11>(d) p = Mul(c, c) v = ReduceMean(p, last) "
        "w = Cast<to=1>(v) a = Add(w, epsilon) r = Sqrt(a) n = Div(d, r)"
    ),
    (
        "m = ReduceMean(x, last) d = Sub(x, m) q = Mul(x, x) s = ReduceMean(q, last) k = Mul(m, m) "
        "g = Sub(s, k) v = Max(zero, g) a = Add(v, epsilon) r = Sqrt(a) i = Reciprocal(r) n = Mul(d, i)"
    ),
]


@pytest.mark.parametrize("body", LAYER_NORMS)
def test_layer_norm_in_every_spelling(body: str) -> None:
    weights = {**used(body), "gamma": normal(5), "beta": normal(5)}
    text = unary(body + " h = Mul(gamma, n) y = Add(h, beta)", "2,3,5")
    assert ops(rewritten(text, weights)) == ["LayerNormalization"]


def test_layer_norm_of_old_opsets_has_its_axes_as_attribute() -> None:
    body = LAYER_NORMS[0].replace("ReduceMean(x, last)", "ReduceMean<axes=[-1]>(x)")
    body = body.replace("ReduceMean(p, last)", "ReduceMean<axes=[2]>(p)").replace("n =", "y =")
    assert ops(rewritten(unary(body, "2,3,5"), used(body), opset=17)) == ["LayerNormalization"]
    assert "LayerNormalization" not in ops(rewritten(unary(body, "2,3,5"), used(body), opset=16))


def test_layer_norm_over_two_axes_and_over_channels_in_front() -> None:
    both = {"last": np.array([1, 2])}
    body = LAYER_NORMS[0].replace("n =", "y =")
    result = rewritten(unary(body, "2,3,5"), {**used(body), **both})
    assert ops(result) == ["LayerNormalization"]
    channels = LAYER_NORMS[0] + " h = Mul(n, gamma) y = Add(h, beta)"
    weights = {**used(channels), "last": np.array([1]), "gamma": normal(3, 1, 1), "beta": normal(1, 3, 1, 1)}
    assert ops(rewritten(unary(channels, "2,3,5,4"), weights)) == ["Transpose", "LayerNormalization", "Transpose"]


def test_statistics_along_another_axis_than_they_are_used_are_no_layer_norm() -> None:
    """x f32[5, 5]: a mean without its axis broadcasts along the wrong one, and no shape error says so."""
    body = (
        "m = ReduceMean<keepdims=0>(x, last) d = Sub(x, m) p = Mul(d, d) v = ReduceMean<keepdims=0>(p, last) "
        "a = Add(v, epsilon) r = Sqrt(a) y = Div(d, r)"
    )
    assert "LayerNormalization" not in ops(rewritten(unary(body, "5,5"), used(body)))


def test_softmax_with_kept_and_with_restored_axes() -> None:
    kept = "m = ReduceMax(x, first) d = Sub(x, m) e = Exp(d) s = ReduceSum(e, first) y = Div(e, s)"
    assert ops(rewritten(unary(kept, "2,3,5"), used(kept), opset=18)) == ["Softmax"]
    jax = (
        "m = ReduceMax<keepdims=0>(x, first) r = Reshape(m, shape) d = Sub(x, r) e = Exp(d) "
        "s = ReduceSum<keepdims=0>(e, first) t = Reshape(s, shape) y = Div(e, t)"
    )
    weights = {**used(jax), "shape": np.array([-1, 1])}
    assert ops(rewritten(unary(jax, "N,5"), weights)) == ["Softmax"]
    mixed = kept.replace("s = ReduceSum(e, first)", "s = ReduceSum(e, last)")
    assert "Softmax" not in ops(rewritten(unary(mixed, "2,3,5"), used(mixed), opset=18))


def test_softmax_of_rows_from_old_opsets() -> None:
    body = "f = Flatten<axis=2>(x) z = Shape(x) s = Softmax<axis=-1>(f) y = Reshape(s, z)"
    assert ops(rewritten(unary(body, "N,M,5"))) == ["Softmax"]
    over_two = body.replace("axis=2", "axis=1")
    assert ops(rewritten(unary(over_two, "N,M,5"))) == ["Flatten", "Softmax", "Reshape"]


def test_silu_stays_two_nodes() -> None:
    assert ops(rewritten(unary("s = Sigmoid(x) y = Mul(x, s)"))) == ["Sigmoid", "Mul"]
