"""Q/DQ insertion at the places where graphs are awkward: outputs with readers, shared weights, bodies, odd names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgeq.analyse.coverage import optimised, read_back
from edgeq.analyse.encode import encode
from edgeq.analyse.sensitivity import only
from edgeq.ir import io, query
from edgeq.rewrite.qdq import insert_qdq
from tests.graphs import normal, ops
from tests.placed import MINMAX, Placed, placed, run

POINT = "Conv<kernel_shape=[1,1]>"
WEIGHTS = {"w": normal(8, 8, 1, 1) * 0.3, "b": normal(8)}
PRODUCT = {"w": normal(8, 8), "b": normal(8)}


def check(made: Placed, steps: float = 3.0) -> None:
    """All three ways to run it agree to a code, outputs keep names and order, float is within a few steps."""
    exact, found, plain = made.exact(), made.fused(), made.unfused()
    assert list(found) == list(exact)
    for name, wanted in exact.items():
        step = float(np.ptp(wanted)) / 255
        np.testing.assert_allclose(found[name], plain[name], atol=1.01 * step)
        assert np.sqrt(np.mean(np.square(found[name] - wanted))) <= steps * step


def readers_of(made: Placed, name: str) -> list[str]:
    """Op types that read a value by name, sorted."""
    values = {str(value.name): value for node in made.model.graph for value in node.outputs}
    values.update({str(value.name): value for value in made.model.graph.inputs})
    return sorted(node.op_type for node in query.users(values[name]))


def test_an_output_with_readers_is_dequantized_once_under_its_own_name() -> None:
    made = placed(
        f"(float[1,8,6,6] x) => (float[1,8,6,6] t, float[1,8,6,6] y) {{ t = {POINT}(x, w, b) y = {POINT}(t, w, b) }}",
        WEIGHTS,
    )
    check(made)
    (output, _) = made.model.graph.outputs
    assert output.producer().op_type == "DequantizeLinear"
    assert readers_of(made, "t") == ["Conv"]
    assert ops(made.model).count("QuantizeLinear") == 3


def test_an_input_that_is_an_output_too_is_passed_on_exactly() -> None:
    made = placed(f"(float[1,8,6,6] x) => (float[1,8,6,6] x, float[1,8,6,6] y) {{ y = {POINT}(x, w, b) }}", WEIGHTS)
    check(made)
    np.testing.assert_array_equal(made.fused()["x"], made.feeds[0]["x"])
    assert [str(value.name) for value in made.model.graph.inputs] == ["x"]


def test_an_input_keeps_its_exact_value_for_float_readers() -> None:
    made = placed(
        f"(float[1,8,6,6] x) => (float[1,8,6,6] y, float[1,8,6,6] z) {{ y = {POINT}(x, w, b) z = Tanh(x) }}", WEIGHTS
    )
    check(made)
    assert readers_of(made, "x") == ["QuantizeLinear", "Tanh"]


def test_readers_behind_an_integer_kernel_all_take_its_codes() -> None:
    made = placed(
        "(float[1,8,6,6] x) => (float[1,8,6,6] y, float[1,8,6,6] z) "
        f"{{ t = {POINT}(x, w, b) y = Tanh(t) z = {POINT}(t, w, b) }}",
        WEIGHTS,
    )
    check(made)
    assert readers_of(made, "t") == ["QuantizeLinear"]


@pytest.mark.parametrize("tied", [False, True])
def test_shared_weights(tied: bool) -> None:
    """Two readers of one initializer; with ``tied`` their biases too, which their inputs' scales quantize apart."""
    second = "b" if tied else "c"
    made = placed(
        f"(float[1,8,6,6] x) => (float[1,8,6,6] y) {{ t = {POINT}(x, w, b) y = {POINT}(t, w, {second}) }}",
        {**WEIGHTS, "c": normal(8)},
    )
    check(made)
    seen, lost = read_back(made.model, made.plan, made.shapes, made.target)
    assert (lost, seen.kernels) == ({}, {"QLinearConv": 2})
    assert [name for name in made.model.graph.initializers if name.startswith("w")] == [
        "w_quantized", "w_quantized_scale", "w_quantized_zero_point"
    ], "one copy of the codes, none of the floats"  # fmt: skip


def test_tied_products() -> None:
    made = placed("(float[5,8] x) => (float[5,8] y) { t = MatMul(x, w) u = Sigmoid(t) y = MatMul(u, w) }", PRODUCT)
    check(made)
    seen, lost = read_back(made.model, made.plan, made.shapes, made.target)
    assert (lost, seen.kernels) == ({}, {"QLinearMatMul": 1, "QLinearSigmoid": 1, "MatMulIntegerToFloat": 1})


def test_a_weight_read_by_float_nodes_too_stays_for_them() -> None:
    made = placed(
        "(float[5,8] x) => (float[5,8] y, float[8,8] z) { y = MatMul(x, w) s = Identity(n) z = Pow(w, s) }",
        {**PRODUCT, "n": np.array(2, np.float32)},
    )
    check(made)
    np.testing.assert_allclose(made.fused()["z"], np.square(PRODUCT["w"]), rtol=1e-6)


def test_bodies_read_the_codes_of_outer_values() -> None:
    bodies = (
        "then_branch = p() => (float[1,8,6,6] o) { o = Neg(t) }",
        "else_branch = q() => (float[1,8,6,6] n) { n = Abs(t) }",
    )
    branches = ", ".join(bodies)
    made = placed(
        "(float[1,8,6,6] x, bool c) => (float[1,8,6,6] y, float[1,8,6,6] z) "
        f"{{ t = {POINT}(x, w, b) y = If(c)<{branches}> z = {POINT}(t, w, b) }}",
        WEIGHTS,
        feeds=[{"x": normal(1, 8, 6, 6), "c": np.array(flag)} for flag in (True, False)],
    )
    check(made)
    np.testing.assert_allclose(made.fused(made.feeds[1])["y"], made.exact(made.feeds[1])["y"], atol=0.1)


def test_loops_read_the_codes_of_outer_values() -> None:
    body = "body = l(int64 i, bool c, float[1,8,6,6] a) => (bool d, float[1,8,6,6] o) { d = Identity(c) o = Add(a, t) }"
    made = placed(
        f"(float[1,8,6,6] x, int64 n) => (float[1,8,6,6] y) {{ t = {POINT}(x, w, b) y = Loop(n, , t)<{body}> }}",
        WEIGHTS,
        feeds=[{"x": normal(1, 8, 6, 6), "n": np.array(3)}],
    )
    check(made, steps=8)


def test_an_absent_optional_output_stays_absent() -> None:
    made = placed(
        f"(float[1,8,6,6] x) => (float[1,8,6,6] y) {{ t = {POINT}(x, w, b) y, = MaxPool<kernel_shape=[1,1]>(t) }}",
        WEIGHTS,
    )
    check(made)
    assert made.plan.ties == {"y": "t"}


def test_names_in_use_are_not_taken() -> None:
    made = placed(
        f"(float[1,8,6,6] x) => (float[1,8,6,6] x_quantized, float[1,8,6,6] x_scale) {{ x_quantized = {POINT}(x, w, b)"
        f" x_scale = {POINT}(x_quantized, w, b) }}",
        WEIGHTS,
    )
    check(made)
    values = [str(value.name) for node in made.model.graph for value in node.outputs]
    known = [*values, *made.model.graph.initializers, "x"]
    assert len(known) == len(set(known))


@pytest.mark.parametrize("bias", [(8,), (1, 8), (1,), ()])
def test_stored_biases_declare_the_shape_they_have(bias: tuple[int, ...]) -> None:
    """A Gemm's C may be [1, N], [1] or a scalar; stored with a scale a channel it is [N]."""
    made = placed(
        "(float[5,8] x) => (float[5,8] y) { y = Gemm(x, w, c) }",
        {"w": PRODUCT["w"], "c": np.full(bias, 0.4, np.float32)},
    )
    check(made)
    for node in made.model.graph:
        if node.op_type == "DequantizeLinear" and (codes := query.constant(node.inputs[0])) is not None:
            assert query.dims(node.outputs[0]) == codes.shape


def test_the_input_model_is_untouched_and_the_result_survives_a_round_trip(tmp_path: Path) -> None:
    made = placed(f"(float[1,8,6,6] x) => (float[1,8,6,6] y) {{ t = {POINT}(x, w, b) y = Relu(t) }}", WEIGHTS)
    before = io.digest(made.source)
    again = insert_qdq(made.source, made.plan, made.encodings)
    assert io.digest(made.source) == before
    io.write(again, tmp_path / "m.onnx")
    np.testing.assert_array_equal(run(io.read(tmp_path / "m.onnx"), made.feeds[0])["y"], made.fused()["y"])


def test_parts_of_a_plan_can_be_built_alone() -> None:
    """One atom integer and the rest float, from the whole plan's encodings: ties and scales stay those of the whole."""
    made = placed(
        f"(float[1,8,6,6] x) => (float[1,8,6,6] y) {{ t = {POINT}(x, w, b) m = MaxPool<kernel_shape=[1,1]>(t)"
        f" u = {POINT}(m, w, b) y = Add(u, m) }}",
        WEIGHTS,
    )
    for name in made.plan.integer:
        part = only(made.plan, {name})
        model = insert_qdq(made.source, part, encode(part, made.stats, made.target, ranges=MINMAX))
        other = insert_qdq(made.source, part, made.encodings)
        assert io.digest(model) == io.digest(other)
        found = run(model, made.feeds[0])["y"]
        assert np.sqrt(np.mean(np.square(found - made.exact()["y"]))) <= 3 * np.ptp(found) / 255
        assert [str(value.name) for value in model.graph.outputs] == ["y"]


def test_a_plan_for_another_model_is_refused() -> None:
    made = placed(f"(float[1,8,6,6] x) => (float[1,8,6,6] y) {{ y = {POINT}(x, w, b) }}", WEIGHTS)
    other = placed("(float[5,8] x) => (float[5,8] z) { z = MatMul(x, w) }", PRODUCT)
    assert isinstance(other.source, ir.Model)
    with pytest.raises(KeyError):
        insert_qdq(other.source, made.plan, made.encodings)


def test_a_product_kept_float_between_integers_stays_float() -> None:
    """The runtime would quantize its weights with one scale for all channels (WeightBiasQuantization)."""
    point = "Conv<kernel_shape=[1,1]>"
    weights = {name: normal(8, 8, 1, 1) * 0.3 for name in ("w", "v", "u")} | {"b": normal(8)}
    weights["v"][0] *= 100  # one channel would take all of a common scale
    for behind in ("m = Relu(c)", "m = Clip(c, low, high)", "m = Identity(c)"):
        text = (
            f"(float[1,8,6,6] x) => (float[1,8,6,6] y) {{ a = {point}(x, w, b) c = {point}(a, v, b) {behind}"
            f" y = {point}(m, u, b) }}"
        )
        bounds = {"low": np.array(-50, np.float32), "high": np.array(50, np.float32)} if "Clip" in text else {}
        kept = placed(text, {**weights, **bounds}, keep_float={"Conv_node_2": "sensitive"})
        assert {"Conv_node", "Conv_node_3"} <= set(kept.plan.integer)
        fused = optimised(kept.model, kept.target)
        assert sum(node.op_type in ("Conv", "FusedConv") for node in fused.graph) == 1, behind
        np.testing.assert_allclose(kept.fused()["y"], kept.unfused()["y"], atol=np.abs(kept.exact()["y"]).max() / 50)
