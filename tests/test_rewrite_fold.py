"""What constants and shapes decide is computed, unless the file would grow."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from edgeq.ir import io
from edgeq.ir.text import to_text
from edgeq.rewrite.canonicalize import canonicalize
from edgeq.rewrite.fold import fold_constants
from edgeq.run.session import open_session, run_session
from tests.graphs import graph, normal, ops, random_feed, reference, rewritten


def test_movers_and_casts_behind_weights_are_folded() -> None:
    text = (
        "(float[N,5,6] x) => (float[N,5,4] y)"
        "{ f = Cast<to=1>(w) r = Reshape(f, s) t = Transpose<perm=[1,0]>(r) y = MatMul(x, t) }"
    )
    result = rewritten(text, {"w": normal(4, 2, 3).astype(np.float16), "s": np.array([4, 6])})
    assert to_text(result).splitlines() == [
        "in  x f32[N,5,6]",
        "w   t f32[6,4]",
        "y = MatMul(x, t)",
        "out y f32[N,5,4]",
    ]


def test_constant_nodes_of_every_kind_become_initializers() -> None:
    text = (
        "(float[3] x) => (float[3] y) { a = Constant<value_float=2.0>() b = Constant<value=float[3] {1.0, 2.0, 3.0}>()"
        " s = Constant<value_ints=[-1]>() r = Reshape(b, s) p = Pow(x, a) y = Mul(r, p) }"
    )
    assert ops(rewritten(text)) == ["Mul", "Mul"]


def test_a_fold_that_makes_much_of_little_stays() -> None:
    text = "(float[N,1024,1024] x) => (float[N,1024,1024] y) { z = ConstantOfShape(s) e = Exp(z) y = Sub(x, e) }"
    model = graph(text, {"s": np.array([1024, 1024])})
    result, _ = canonicalize(model)
    assert ops(result) == ["ConstantOfShape", "Exp", "Sub"] and io.weight_bytes(result) < 100
    small = graph(text.replace("1024", "32"), {"s": np.array([32, 32])})
    assert ops(canonicalize(small)[0]) == ["Add"]


def test_a_transpose_of_a_tied_weight_does_not_double_it() -> None:
    text = (
        "(int64[N] i, float[N,64] h) => (float[N,64] e, float[N,4096] y)"
        "{ e = Gather(w, i) t = Transpose<perm=[1,0]>(w) y = MatMul(h, t) }"
    )
    model = graph(text, {"w": normal(4096, 64)})
    result, _ = canonicalize(model)
    assert io.weight_bytes(result) == io.weight_bytes(model) and "Transpose" in ops(result)


def test_quantized_weights_and_random_numbers_are_never_folded() -> None:
    text = (
        "(float[N,3] x) => (float[N,4] y)"
        "{ w = DequantizeLinear(q, k) n = RandomNormalLike(b) m = Add(n, b) a = MatMul(x, w) y = Add(a, m) }"
    )
    weights = {"q": np.ones((3, 4), np.int8), "k": np.array(0.5, np.float32), "b": normal(4)}
    found = ops(canonicalize(graph(text, weights))[0])
    assert "DequantizeLinear" in found and "RandomNormalLike" in found


def test_a_node_without_a_kernel_costs_itself_and_its_readers_only() -> None:
    text = (
        "(float[3] x) => (float[3] y, int16[1] d)"
        "{ a = Exp(w) b = Max(h, h) c = Add(b, h) d = Sub(c, h) s = Sin(a) y = Mul(x, s) }"
    )
    model = graph(text, {"w": normal(3), "h": np.array([3], np.int16)})
    assert len(fold_constants(model, frozenset())) == 2
    assert ops(model) == ["Max", "Add", "Sub", "Mul"]


def test_known_sizes_are_constants_and_reshapes_keep_one_unknown() -> None:
    text = (
        "(float[N,S,12] x) => (float[N,S,3,4] y, int64[1] k)"
        "{ z = Shape(x) i = Cast<to=6>(z) n = Slice(i, zero, one) m = Gather(i, at) u = Unsqueeze(m, zero)"
        " h = Cast<to=6>(head) c = Concat<axis=0>(n, u, h) t = Cast<to=7>(c) y = Reshape(x, t)"
        " w = Slice(z, two, three) k = Mul(w, two) }"
    )
    weights = {name: np.array([value]) for name, value in (("zero", 0), ("one", 1), ("two", 2), ("three", 3))}
    weights |= {"at": np.array(1), "head": np.array([3, 4])}
    model = graph(text, weights)
    result, _ = canonicalize(model)
    assert ops(result) == ["Reshape", "Mul"]
    reshape = result.graph[0]
    assert reshape.inputs[1] is not None and reshape.inputs[1].const_value is not None
    assert reshape.inputs[1].const_value.numpy().tolist() == [0, 0, 3, 4]
    for sizes in ({"N": 2, "S": 5}, {"N": 1, "S": 1}):
        feed = random_feed(model, sizes)
        found = run_session(open_session(result), feed)
        for expected, array in zip(reference(model, feed), found.values(), strict=True):
            np.testing.assert_array_equal(array, expected)


def test_dynamo_reshapes_keep_their_axes() -> None:
    """Where 0 would mean no elements, but none is asked for, axes are copied as well."""
    text = "(float[N,S,12] x) => (float[N,S,A,4] y) { z = Shape<end=2>(x) t = Concat<axis=0>(z, k) y = {} }"
    model = graph(text.replace("{}", "Reshape<allowzero=1>(x, t)"), {"k": np.array([-1, 4])})
    result, _ = canonicalize(model)
    (reshape,) = result.graph
    assert reshape.inputs[1] is not None and reshape.inputs[1].const_value is not None
    assert reshape.inputs[1].const_value.numpy().tolist() == [0, 0, -1, 4] and "allowzero" not in reshape.attributes
    feed = random_feed(model, {"N": 2, "S": 5})
    np.testing.assert_array_equal(run_session(open_session(result), feed)["y"], reference(model, feed)[0])
    text = "(float[N,0] x) => (float[0,N] y) { z = Shape(x) t = Gather(z, turned) y = Reshape<allowzero=1>(x, t) }"
    empty = canonicalize(graph(text, {"turned": np.array([1, 0])}))[0]
    assert empty.graph[-1].attributes["allowzero"].value == 1


def test_an_expand_by_constants_takes_one_where_axes_stay() -> None:
    """TorchScript asks for -1 there and chooses by Where."""
    text = """(float[N,2,1,S] x, float[N,2,1,S] v) => (float[N,2,3,S] y) {
        z = Shape(v) n = Gather(z, at0) s = Gather(z, at3) t = Concat<axis=0>(n, two, three, s)
        m = Equal(t, minus) w = Where(m, ones, t) e = Expand(x, w) y = Neg(e) }"""
    weights = {name: np.array([number]) for name, number in (("at0", 0), ("at3", 3), ("two", 2), ("three", 3))}
    weights |= {"minus": -np.ones(4, np.int64), "ones": np.ones(4, np.int64)}
    model = graph(text, weights)
    result, _ = canonicalize(model)
    assert ops(result) == ["Expand", "Neg"]
    wanted = result.graph[0].inputs[1]
    assert wanted is not None and wanted.const_value is not None
    assert wanted.const_value.numpy().tolist() == [1, 1, 3, 1]
    feed = random_feed(model, {"N": 2, "S": 5})
    np.testing.assert_array_equal(run_session(open_session(result), feed)["y"], reference(model, feed)[0])


def test_two_unknown_sizes_stay_computed() -> None:
    text = "(float[N,S,12] x, float[S,N,12] v) => (float[A,B,12] y){ z = Shape(v) y = Reshape(x, z) }"
    model = graph(text)
    result, _ = canonicalize(model)
    assert ops(result) == ["Shape", "Reshape"]
    feed = random_feed(model, {"N": 2, "S": 3})
    np.testing.assert_array_equal(run_session(open_session(result), feed)["y"], reference(model, feed)[0])


def test_an_expand_to_the_shape_it_has_goes() -> None:
    text = "(float[N,3] x) => (float[N,3] y) { z = Shape(x) e = Expand(x, z) y = Relu(e) }"
    assert ops(rewritten(text)) == ["Relu"]
    wider = "(float[N,1] x, float[N,3] v) => (float[N,3] y) { z = Shape(v) e = Expand(x, z) y = Relu(e) }"
    assert ops(rewritten(wider)) == ["Expand", "Relu"], "to [1, 3]: N stays, whatever it is"
    other = wider.replace("[N,3] v", "[M,3] v").replace("(float[N,3] y)", "(float[A,3] y)")
    assert ops(rewritten(other, N=1)) == ["Shape", "Expand", "Relu"]


def test_bodies_are_rewritten_with_what_they_read_from_outside() -> None:
    text = (
        "(float[N,4] x, bool c) => (float[N,4] y) { o = Neg(x) g = Exp(k) y = If(c)"
        "<then_branch = t () => (float[N,4] a) { i = Identity(o) d = Div(i, k) a = Sub(d, g) },"
        " else_branch = e () => (float[N,4] b) { b = Identity(o) }> }"
    )
    model = graph(text, {"k": np.array([1, 2, 4, 8], np.float32)})
    result, _ = canonicalize(model)
    assert ops(result) == ["Neg", "If", "Mul", "Add", "Identity"]
    for branch in (True, False):
        feed = {"x": normal(2, 4), "c": np.array(branch)}
        expected = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, feed)[0]
        np.testing.assert_allclose(run_session(open_session(result), feed)["y"], expected, rtol=1e-6)


def test_a_dead_branch_does_not_keep_what_it_read_alive() -> None:
    text = (
        "(float[N,4] x, bool c) => (float[N,4] y) { o = Neg(x) y = Relu(x) u = If(c)"
        "<then_branch = t () => (float[N,4] a) { a = Exp(o) }, else_branch = e () => (float[N,4] b) { b = Sin(o) }> }"
    )
    result, _ = canonicalize(graph(text))
    assert ops(result) == ["Relu"]
