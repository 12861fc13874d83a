"""16-bit floats: which nodes may have them, where casts stand, and what a device would round. Oracles: onnx's reference
evaluator, which computes float16 in float16, ONNX Runtime's refusals, and counts of casts found by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import edgeq
from edgeq import steps
from edgeq.analyse import halves
from edgeq.context import Context
from edgeq.errors import RecipeError
from edgeq.ir import io, verify
from edgeq.num.formats import BF16, F16
from edgeq.packaging import read_directory
from edgeq.recipe import parse
from edgeq.report.recorder import Recorder
from edgeq.rewrite.halve import halve, rounded
from edgeq.run.record import Feed
from edgeq.source import read_model
from edgeq.target.load import load_target
from tests import small_net
from tests.graphs import Arrays, graph, normal, number, ops, random_feed, reference
from tests.placed import VNNI, oracle_of, run, samples_of

F32 = NDArray[np.float32]
HALF = "canonicalize; half(format=f16)"


def context_of(feeds: Sequence[Feed], target: str = VNNI) -> Context:
    return Context(replace(load_target(target), threads=(1,)), oracle_of(target), samples_of(feeds), Recorder())


def stepped(
    text: str, weights: Arrays | None = None, feeds: Sequence[Feed] = (), form: str = "f16", opset: int = 21
) -> tuple[ir.Model, ir.Model, Context]:
    """(As read, after ``half``, the context that tells what was decided)."""
    model, _ = read_model(graph(text, weights, opset), opset=21)
    context = context_of(list(feeds) or [random_feed(model)])
    result = steps.half(model, context, format=form)
    verify.verify(result, "half")
    return model, result, context


def kept(context: Context) -> dict[str, str]:
    """Node -> why it stayed f32, as the report has it."""
    (facts,) = [step.facts for step in context.recorder.steps if step.name == "half"]
    found: dict[str, str] = facts["kept_f32"]
    return found


def kept_ops(model: ir.Model, context: Context) -> dict[str, str]:
    """The same by op type."""
    types = {node.name: node.op_type for node in model.graph}
    return {types[name]: why for name, why in kept(context).items()}


def types(model: ir.Model) -> set[str]:
    return {str(value.dtype) for node in model.graph for value in node.outputs}


# --- what ONNX lets be narrow -----------------------------------------------------------------------------------------

NARROW: dict[str, tuple[str, Mapping[str, NDArray[np.generic]]]] = {
    "Conv": (
        "(float[1,3,6,6] x) => (float[1,4,6,6] y) { y = Conv<pads=[1,1,1,1]>(x, w, b) }",
        {"w": normal(4, 3, 3, 3) / 5, "b": normal(4)},
    ),
    "Gemm": ("(float[2,8] x) => (float[2,4] y) { y = Gemm<transB=1>(x, w, b) }", {"w": normal(4, 8), "b": normal(4)}),
    "MatMul": ("(float[2,8] x) => (float[2,4] y) { y = MatMul(x, w) }", {"w": normal(8, 4)}),
    "LayerNormalization": (
        "(float[2,8] x) => (float[2,8] y) { y = LayerNormalization(x, s, b) }", {"s": normal(8), "b": normal(8)}
    ),
    "Softmax": ("(float[2,8] x) => (float[2,8] y) { y = Softmax(x) }", {}),
    "Clip": ("(float[2,8] x) => (float[2,8] y) { y = Clip(x, lo, hi) }", {"lo": number(-1), "hi": number(3.4e38)}),
    "Where": ("(float[2,8] x) => (float[2,8] y) { c = Greater(x, z) y = Where(c, x, z) }", {"z": number(0)}),
    "Pad": ("(float[2,8] x) => (float[2,10] y) { y = Pad(x, p, v) }", {"p": np.array([0, 1, 0, 1]), "v": number(1.5)}),
    "Cast": ("(float[2,8] x) => (float[2,8] y) { i = Cast<to=7>(x) f = Cast<to=1>(i) y = Add(f, x) }", {}),
    "ConstantOfShape": (
        "(float[2,8] x) => (float[2,8] y) { s = Shape(x) o = ConstantOfShape<value=float[1] {2.5}>(s) y = Mul(o, x) }",
        {},
    ),
    "TopK": ("(float[2,8] x) => (float[2,3] y, int64[2,3] i) { y, i = TopK(x, k) }", {"k": np.array([3])}),
    "Concat": ("(float[2,8] x) => (float[2,16] y) { r = Relu(x) y = Concat<axis=1>(r, x) }", {}),
    "Split": (
        "(float[2,8] x) => (float[2,4] y, float[2,4] z) { y, z = Split<num_outputs=2,axis=1>(x) }", {}
    ),
    "ReduceMean": ("(float[2,8] x) => (float[2,1] y) { y = ReduceMean(x, a) }", {"a": np.array([1])}),
    "Resize": (
        '(float[1,2,4,4] x) => (float[1,2,8,8] y) { y = Resize<mode="nearest">(x, , s) }',
        {"s": np.array([1, 1, 2, 2], np.float32)},
    ),
    "output read again": ("(float[2,8] x) => (float[2,8] a, float[2,8] y) { a = Relu(x) y = Sigmoid(a) }", {}),
}  # fmt: skip


def whole(text: str, weights: Arrays, dtype: ir.DataType = ir.DataType.FLOAT16) -> tuple[ir.Model, ir.Model]:
    """(As written, with every node in ``dtype``, worth its casts or not)."""
    model, _ = read_model(graph(text, weights), opset=21)
    return model, halve(model, [str(node.name) for node in model.graph], dtype, halves.constants(model, F16)[1])


@pytest.mark.parametrize("name", NARROW)
def test_narrow_nodes_compute_what_float16_is(name: str) -> None:
    model, result = whole(*NARROW[name])
    verify.verify(result, "half")
    assert halves.incapable(model, F16) == {}
    assert {"FLOAT16"} <= types(result)
    assert [str(value.dtype) for value in result.graph.outputs] == [str(value.dtype) for value in model.graph.outputs]
    feed = random_feed(model)
    device = reference(result, feed)  # numpy's float16, node by node
    for found in (run(result, feed), run(rounded(result), feed)):
        for expected, array in zip(device, found.values(), strict=True):
            np.testing.assert_allclose(array, expected, rtol=4e-3, atol=4e-3)  # 4 steps of 2**-10 near 1
    for expected, array in zip(reference(model, feed), device, strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-2, atol=1e-2)


def test_what_onnx_has_in_float32_alone_stays_so() -> None:
    _, result = whole(*NARROW["Resize"])
    (resize,) = [node for node in result.graph if node.op_type == "Resize"]
    assert [str(value.dtype) for value in resize.inputs if value is not None] == ["FLOAT16", "FLOAT"]
    model, result, context = stepped(
        "(float[1] x) => (float[M] y) { s = Squeeze(x) r = Range(z, s, d) y = Exp(r) }",
        {"z": number(0), "d": number(1)}, [{"x": np.array([5], np.float32)}],
    )  # fmt: skip
    assert kept_ops(model, context)["Range"] == "ONNX has no Range of float16"
    assert ops(result) == ["Squeeze", "Range", "Exp"]  # no cast is worth an Exp


def test_a_body_reads_what_it_read() -> None:
    text = """(float[2,8] x, bool c) => (float[2,8] y) {
        m = MatMul(x, w)
        a = Relu(m)
        y = If(c) <
            then_branch = t () => (float[2,8] u) { u = Neg(a) }, else_branch = e () => (float[2,8] v) { v = Abs(a) }
        >
    }"""
    model, _ = read_model(graph(text, {"w": normal(8, 8)}), opset=21)
    feed: Feed = {"x": normal(2, 8), "c": np.array(True)}
    context = context_of([feed])
    result = steps.half(model, context, format="f16")
    verify.verify(result, "half")
    assert ops(result)[:4] == ["Cast", "MatMul", "Relu", "Cast"]
    assert kept_ops(model, context) == {"If": "If holds a graph of its own"}
    np.testing.assert_allclose(run(result, feed)["y"], run(model, feed)["y"], rtol=1e-2, atol=1e-2)


# --- where casts stand ------------------------------------------------------------------------------------------------

BORDERS = "(float[2,8] x) => (float[2,8] y, float[2,8] z) { m = MatMul(x, w) "


@pytest.mark.parametrize(
    ("body", "wide", "casts"),
    [
        ("a = Relu(m) y = MatMul(a, w) z = Exp(a) }", set(), 3),  # in, and both outputs
        ("a = Relu(m) y = MatMul(a, w) z = Neg(a) }", {"Relu"}, 4),  # Neg goes with Relu, which costs it no cast
        (
            "a = Exp(m) b = Neg(a) y = Relu(b) z = MatMul(y, w) }",
            {"Exp", "Relu"},
            4,
        ),  # Neg between them isn't worth two
        ("a = Exp(m) b = MatMul(a, w) y = Relu(b) z = Neg(y) }", {"Exp", "Relu"}, 4),  # a product is
    ],
)
def test_casts_are_as_few_as_can_be(body: str, wide: set[str], casts: int) -> None:
    model, _ = read_model(graph(BORDERS + body, {"w": normal(8, 8) / 8}), opset=21)
    feed = random_feed(model)
    forced = {str(node.name): "told so" for node in model.graph if node.op_type in wide}
    shapes = dict.fromkeys(("x", "m", "a", "b", "y", "z"), (2, 8))
    chosen = halves.decide(model, F16, forced, {}, shapes)
    result = halve(model, chosen.nodes, ir.DataType.FLOAT16)
    verify.verify(result, "half")
    assert ops(result).count("Cast") == casts
    assert forced.items() <= chosen.kept.items()
    for name, array in run(result, feed).items():
        np.testing.assert_allclose(array, run(model, feed)[name], rtol=1e-2, atol=1e-2)


# --- what the format doesn't hold -------------------------------------------------------------------------------------


def test_a_tensor_that_overflows_keeps_those_around_it() -> None:
    text = (
        "(float[2,8] x) => (float[2,8] y) { m = MatMul(x, w) s = Mul(m, m) r = Sqrt(s) n = Relu(r) y = MatMul(n, w) }"
    )
    feed: Feed = {"x": np.full((2, 8), 250, np.float32)}
    model, result, context = stepped(text, {"w": np.eye(8, dtype=np.float32)}, [feed])
    assert kept_ops(model, context) == dict.fromkeys(
        ("Mul", "Sqrt"), "'s' reaches 6.25e+04, f16's 65504 is less than 2 times that"
    )
    assert ops(result) == ["Cast", "MatMul", "Cast", "Mul", "Sqrt", "Cast", "Relu", "MatMul", "Cast"]
    (notice,) = [one for one in context.recorder.notices if one.code == "kept-f32"]
    assert "2 nodes stay float32" in notice.message


@pytest.mark.parametrize(
    ("body", "weights", "op", "why"),
    [
        ("a = Add(m, e) y = Sqrt(a)", {"e": number(1e-12)}, "Add", "constant 'e' would be off by 100% in f16"),
        ("a = Mul(m, e) y = Relu(a)", {"e": number(1e6)}, "Mul", "constant 'e' holds 1e+06, beyond f16's 65504"),
        ("a = Mul(m, e) y = Exp(a)", {"e": number(1e-5)}, "Mul", "'a' holds values of"),
        ("a = Abs(m) y = Log(a)", {}, "Log", "'a' comes as near to 0 as"),
    ],
)
def test_what_sinks_or_rises_beyond_the_format_stays(body: str, weights: Arrays, op: str, why: str) -> None:
    text = "(float[4,64] x) => (float[4,64] y) { m = MatMul(x, w) " + body + " }"
    feed: Feed = {"x": np.abs(normal(4, 64)) * np.float32(0.001)}
    feed["x"][0, 0] = 1e-6
    model, result, context = stepped(text, {**weights, "w": np.eye(64, dtype=np.float32)}, [feed])
    assert kept_ops(model, context)[op].startswith(why)
    found, exact = run(rounded(result), feed)["y"], run(model, feed)["y"]
    np.testing.assert_allclose(found[1:], exact[1:], rtol=1e-2)


ATTENTION = """(float[1,4,8] x, float[1,1,4] mask) => (float[1,4,8] y) {
    s = MatMul(x, w)
    h = Slice(s, zeros, four, two)
    i = Sub(one, mask)
    m = Mul(i, lowest)
    a = Add(h, m)
    p = Softmax(a)
    y = MatMul(p, x)
}"""
MASKS = {
    "w": normal(8, 8), "zeros": np.array([0]), "four": np.array([4]), "two": np.array([2]), "one": number(1),
    "lowest": number(np.finfo(np.float32).min),
}  # fmt: skip


def test_masks_are_cut_where_a_score_can_still_be_added() -> None:
    feed: Feed = {"x": normal(1, 4, 8), "mask": np.array([[[1, 1, 0, 0]]], np.float32)}
    nothing: Feed = {"x": normal(1, 4, 8), "mask": np.zeros((1, 1, 4), np.float32)}
    model, result, context = stepped(ATTENTION, MASKS, [feed, nothing])
    assert kept(context) == {}
    (notice,) = [one for one in context.recorder.notices if one.code == "constant-cut"]
    assert notice.message == "constant 'lowest' is cut at 32752: f16 holds nothing beyond"
    for one in (feed, nothing):  # a row of nothing but masks is a mean, not NaN
        np.testing.assert_allclose(run(rounded(result), one)["y"], run(model, one)["y"], rtol=1e-2, atol=1e-2)


def test_a_mask_that_is_fed_stays() -> None:
    text = "(float[2,4] x, float[2,4] mask) => (float[2,4] y) { m = MatMul(x, w) a = Add(m, mask) y = Softmax(a) }"
    fed = np.where(np.arange(8).reshape(2, 4) % 4 > 1, np.finfo(np.float32).min, np.float32(0))
    model, _, context = stepped(text, {"w": normal(4, 4)}, [{"x": normal(2, 4), "mask": fed}])
    reasons = kept_ops(model, context)
    assert set(reasons) == {"Add", "Softmax"}
    assert "holds masks that are no constants" in reasons["Add"]


def test_what_leads_to_no_number_is_taken_back() -> None:
    text = """(float[2,4] x, float[2,4] p) => (float[2,4] y) {
        m = MatMul(x, w) k = Mul(p, lowest) b = Add(k, k) c = Add(b, k) a = Add(m, c) y = Softmax(a)
    }"""
    feed: Feed = {"x": normal(2, 4), "p": np.ones((2, 4), np.float32)}
    weights = {"w": normal(4, 4), "lowest": number(-1e9)}
    model, result, context = stepped(text, weights, [feed])  # three masks of -32752 are infinite in float16
    assert "would be no number in f16" in " ".join(kept(context).values())
    found, exact = run(rounded(result), feed)["y"], run(model, feed)["y"]
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(1), exact.sum(1), rtol=1e-2)


# --- what the runtime does --------------------------------------------------------------------------------------------


def test_rounding_is_that_of_a_device_and_not_of_this_cpu() -> None:
    _, narrow = whole("(float[1,4] x) => (float[1,4] y) { a = Mul(x, x) y = Div(a, x) }", {})
    feed: Feed = {"x": np.full((1, 4), 1e4, np.float32)}
    with np.errstate(over="ignore"):
        assert np.isinf(reference(narrow, feed)[0]).all()
    assert np.isinf(run(rounded(narrow), feed)["y"]).all()
    assert (run(narrow, feed)["y"] == 1e4).all()  # ONNX Runtime computes both in f32


def test_rounding_knows_bfloat16() -> None:
    text = "(float[4,8] x) => (float[4,8] y) { a = MatMul(x, w) y = Relu(a) }"
    model, narrow = whole(text, {"w": normal(8, 8)}, ir.DataType.BFLOAT16)
    feed = random_feed(model)
    exact, found = run(model, feed)["y"], run(rounded(narrow), feed)["y"]
    assert 30 < _snr(exact, found) < 60  # 8 bits of mantissa
    assert (found.view(np.uint32) & 0xFFFF == 0).all()


def test_what_the_provider_refuses_stays_with_its_words() -> None:
    model, result, context = stepped(
        "(float[4,8] x) => (float[4,8] y) { a = MatMul(x, w) y = Relu(a) }", {"w": normal(8, 8)}, form="bf16"
    )
    reasons = kept_ops(model, context)
    assert set(reasons) == {"MatMul", "Relu"}
    assert reasons["MatMul"].startswith("CPUExecutionProvider has no bf16 MatMul: the runtime refuses it")
    assert types(result) == {"FLOAT"}


def test_what_runs_between_casts_is_told() -> None:
    _, _, context = stepped(*NARROW["Conv"])
    (notice,) = [one for one in context.recorder.notices if one.code == "half-emulated"]
    assert notice.level == "warning"
    assert notice.message.startswith("1 of 1 nodes have no f16 kernel in CPUExecutionProvider and run in f32")


# --- the step ---------------------------------------------------------------------------------------------------------


def test_a_target_of_float32_wants_none() -> None:
    model, _ = read_model(graph(*NARROW["MatMul"]), opset=21)
    context = context_of([random_feed(model)])
    assert steps.half(model, context) is model
    (notice,) = context.recorder.notices
    assert (notice.code, notice.level) == ("no-halves", "info")
    assert notice.message.startswith(f"target {VNNI!r} computes floats in f32: nothing is converted")


@pytest.mark.parametrize(
    ("recipe", "message", "hint"),
    [
        ("half(format=i8)", "half(format=i8) is no 16-bit float", "use f16, bf16 or target"),
        ("half(format=f16); quantize", "step 'quantize' stands behind half", "put half last"),
        ("weights(format=i8/channel); half(format=f16)", "step 'half' stands behind weights", "put half first"),
    ],
)
def test_what_does_not_go_together_is_refused(recipe: str, message: str, hint: str) -> None:
    model, _ = read_model(graph(*NARROW["MatMul"]), opset=21)
    with pytest.raises(RecipeError) as caught:
        steps.apply(parse(recipe, steps.KNOWN), model, context_of([random_feed(model)]))
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_codes_are_stored_behind_it() -> None:
    text = "(float[4,64] x) => (float[4,64] y) { a = MatMul(x, w) y = Relu(a) }"
    model, _ = read_model(graph(text, {"w": normal(64, 64)}), opset=21)
    feed = random_feed(model)
    prepared = steps.apply(
        parse("half(format=f16); weights(format=i8/channel)", steps.KNOWN), model, context_of([feed])
    )
    assert io.weight_bytes(prepared.model) < 64 * 64 * 1.1 + 64 * 4
    exact, found = run(model, feed)["y"], run(prepared.model, feed)["y"]
    assert _snr(exact, found) > 38


def test_it_ships_where_no_clock_says_otherwise_and_is_judged_as_rounded(tmp_path: Path) -> None:
    net, calibration, evaluation = small_net.write(tmp_path)
    report = edgeq.export(
        net, out=tmp_path / "net.edgeq", target="cpu-arm64-a76", recipe=HALF, calibration=str(calibration),
        evaluation=str(evaluation),
    )  # fmt: skip
    assert report.passed
    assert 0.5 < report.check("size_ratio").value < 0.53
    shipped = io.read(tmp_path / "net.edgeq" / "model.onnx")
    assert "FLOAT16" in types(shipped)
    feeds: list[Feed] = [{"image": image[None]} for image in small_net.images(24, seed=2)]
    told = [
        np.mean([_snr(run(small_net.model(), feed)["logits"], run(one, feed)["logits"]) for feed in feeds])
        for one in (rounded(shipped), shipped)
    ]
    assert abs(report.check("snr_db").value - told[0]) < 0.02 < abs(told[1] - told[0])  # this CPU rounds otherwise
    far = max(_far(small_net.model(), rounded(shipped), feed) for feed in feeds[:3])
    assert read_directory(tmp_path / "net.edgeq").golden.tolerances["logits"] > 0.5 * far


def _snr(exact: F32, found: F32) -> float:
    return float(10 * np.log10((exact**2).sum() / ((exact - found) ** 2).sum()))


def _far(exact: ir.Model, found: ir.Model, feed: Feed) -> float:
    return float(np.abs(run(exact, feed)["logits"] - run(found, feed)["logits"]).max())


def test_bf16_never_overflows_where_f32_does_not() -> None:
    assert halves.constants(graph("(float[2] x) => (float[2] y) { y = Mul(x, c) }", {"c": number(1e30)}), BF16) == (
        {},
        {},
    )
