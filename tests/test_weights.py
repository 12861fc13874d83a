"""Weights stored in every format, for every op: the runtime computes with exactly what the codes stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgeq import pipeline, steps
from edgeq.analyse.weights import nearest, snr_db, storable
from edgeq.context import Context
from edgeq.errors import ModelError, RecipeError
from edgeq.ir import io, query, verify
from edgeq.num.fit import fit_weight
from edgeq.num.quant import CHANNEL, TENSOR, Coded, dequantize, parse_quant, quantize
from edgeq.recipe import parse
from edgeq.report.recorder import Recorder
from edgeq.rewrite.weights import store_weights, ways_of
from edgeq.run.session import open_session, run_session
from edgeq.search import settle
from edgeq.source import read_model
from edgeq.target.load import load_target
from tests import small_net
from tests.graphs import graph, normal, ops
from tests.placed import VNNI, all_integer, oracle_of, run, samples_of

EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}  # f32 activations in MatMulNBits; 4, the default, has int8 ones

# op -> graph, the weight's shape, its input index, the axes of its channels and blocks
GRAPHS: dict[str, tuple[str, tuple[int, ...], int, int, int]] = {
    "MatMul": ("(float[5,70] x) => (float[5,48] y) { y = MatMul(x, w) }", (70, 48), 1, 1, 0),
    "Gemm": ("(float[5,64] x) => (float[5,48] y) { y = Gemm(x, w, b) }", (64, 48), 1, 1, 0),
    "Gemm transB": ("(float[5,64] x) => (float[5,48] y) { y = Gemm<transB=1>(x, w, b) }", (48, 64), 1, 0, 1),
    "Gemm alpha": ("(float[5,64] x) => (float[5,48] y) { y = Gemm<alpha=0.5>(x, w, b) }", (64, 48), 1, 1, 0),
    "MatMul stack": ("(float[3,5,33] x) => (float[3,5,48] y) { y = MatMul(x, w) }", (3, 33, 48), 1, 2, 1),
    "Conv": ("(float[1,40,5,5] x) => (float[1,48,3,3] y) { y = Conv(x, w, b) }", (48, 40, 3, 3), 1, 0, 1),
    "Gather": ("(int64[2,3] x) => (float[2,3,71] y) { y = Gather(w, x) }", (48, 71), 0, 0, 1),
    "Gather columns": ("(int64[2] x) => (float[71,2] y) { y = Gather<axis=1>(w, x) }", (71, 48), 0, 1, 0),
}
# format -> how MatMul's and Gemm's weights in it run at opset 21
FORMATS = {
    "u4/block32/asym": "kernel", "i4/block32": "kernel", "i4/channel": "kernel", "i4/tensor": "kernel",
    "u8/channel/asym": "kernel", "i8/channel": "kernel", "i8/tensor": "kernel", "i8/block16": "kernel",
    "u4/block32/asym/f16": "kernel", "i4/block16/f8e4m3": "kernel", "mxint8": "kernel", "u8/channel": "kernel",
    "u2/block16/asym": "load", "i2/channel": "load", "i16/channel": "load", "u4/block48/asym": "load",
    "mxfp4": "load", "mxfp6": "load", "mxfp8": "load", "nvfp4": "load", "f6e3m2/block16": "load",
    "f4e2m1/channel": "load", "f8e4m3/tensor": "load", "f8e5m2/channel": "load", "f8e4m3/block16": "load",
    "f16": "load", "bf16": "load",
}  # fmt: skip


def made(op: str, text: str, opset: int = 21) -> tuple[ir.Model, tuple[str, int], Coded]:
    """A graph with one weight, and this weight's codes."""
    source, shape, index, out, summed = GRAPHS[op]
    model = graph(source, {"w": normal(*shape) / 8, "b": normal(48)}, opset)
    quant, w = parse_quant(text), weight(model)
    axis = {TENSOR: None, CHANNEL: out}.get(quant.block, summed)
    params = fit_weight(w, quant, axis)
    node = next(iter(model.graph))
    node.name = "n"
    return model, ("n", index), Coded(params, quantize(w, params))


def weight(model: ir.Model) -> np.ndarray:
    array = query.constant(model.graph.initializers["w"])
    assert array is not None
    return array


def with_weight(model: ir.Model, w: np.ndarray) -> ir.Model:
    clone = model.clone()
    clone.graph.initializers["w"].const_value = ir.tensor(w, name="w")
    return clone


def feed_of(model: ir.Model) -> dict[str, Any]:
    (x,) = (value for value in model.graph.inputs)
    shape = [int(dim) for dim in query.dims(x) or () if dim is not None]
    return {"x": np.random.default_rng(1).integers(-40, 48, shape) if x.dtype == ir.DataType.INT64 else normal(*shape)}


def optimized(model: ir.Model, folder: Path, config: dict[str, str] | None = None) -> tuple[Any, list[str]]:
    """A session, and the op types it runs."""
    path = folder / "optimized.onnx"
    session = open_session(model, optimized_path=path, config=config)
    return session, [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("op", GRAPHS)
def test_the_runtime_computes_with_what_the_codes_stand_for(op: str, text: str, tmp_path: Path) -> None:
    model, edge, coded = made(op, text)
    before = io.digest(model)
    stored = store_weights(model, {edge: coded})
    assert io.digest(model) == before
    verify.verify(stored, "storing weights")
    session, kinds = optimized(stored, tmp_path, EXACT)
    feed = feed_of(model)
    exact = with_weight(model, dequantize(coded.codes, coded.params))
    expected = run_session(open_session(exact), feed)["y"]
    # Both sum up to 360 products of f32, in other orders: relative 2**-24 * sqrt(360), ten times that to be sure.
    np.testing.assert_allclose(run_session(session, feed)["y"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert "DequantizeLinear" not in kinds
    way = ways_of(model, {edge: coded})[edge]
    if op in ("MatMul", "Gemm", "Gemm transB"):
        assert way == FORMATS[text]
    elif op == "Gather":
        assert way == "rows"
    else:
        assert way == "load"
    if way == "kernel":
        assert kinds == ["MatMulNBits"]
    elif way == "load":
        assert "Mul" not in kinds and "Cast" not in kinds, "decoding is folded when the model is loaded"
    reference = onnx.reference.ReferenceEvaluator(ir.to_proto(stored)).run(None, feed)[0]
    np.testing.assert_allclose(reference, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("text", ["u2/block16/asym", "i2/channel"])
@pytest.mark.parametrize("op", ["MatMul", "Gemm transB"])
def test_two_bits_have_a_kernel_from_opset_25_on(op: str, text: str, tmp_path: Path) -> None:
    model, edge, coded = made(op, text, 25)
    session, kinds = optimized(store_weights(model, {edge: coded}), tmp_path, EXACT)
    assert kinds == ["MatMulNBits"]
    feed = feed_of(model)
    expected = run_session(open_session(with_weight(model, dequantize(coded.codes, coded.params))), feed)["y"]
    np.testing.assert_allclose(run_session(session, feed)["y"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("text", ["u4/block32/asym", "mxfp4"])
def test_a_weight_read_twice(text: str, tmp_path: Path) -> None:
    """Two kernels need constants of their own; what is decoded once serves both."""
    source = "(float[5,64] x) => (float[5,64] y) { a = MatMul(x, w) y = MatMul(a, w) }"
    model = graph(source, {"w": normal(64, 64) / 8})
    for index, node in enumerate(model.graph):
        node.name = f"n{index}"
    coded = nearest(model, storable(model, parse_quant(text), ["MatMul"]))
    assert list(coded) == [("n0", 1), ("n1", 1)]
    stored = store_weights(model, dict(reversed(coded.items())))
    session, kinds = optimized(stored, tmp_path, EXACT)
    assert kinds == (["MatMulNBits"] * 2 if "u4" in text else ["MatMul"] * 2)
    feed, constant = feed_of(model), coded["n0", 1]
    expected = run_session(open_session(with_weight(model, dequantize(constant.codes, constant.params))), feed)["y"]
    np.testing.assert_allclose(run_session(session, feed)["y"], expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_halves_stay_halves() -> None:
    text = "(float16[5,64] x) => (float16[5,48] y) { y = MatMul(x, w) }"
    model = graph(text, {"w": (normal(64, 48) / 8).astype(np.float16)})
    next(iter(model.graph)).name = "n"
    for form in ("u4/block32/asym", "mxfp6"):
        coded = nearest(model, storable(model, parse_quant(form), ["MatMul"]))
        stored, feed = store_weights(model, coded), {"x": normal(5, 64).astype(np.float16)}
        constant = coded["n", 1]
        exact = with_weight(model, dequantize(constant.codes, constant.params).astype(np.float16))
        expected = run_session(open_session(exact), feed)["y"]
        np.testing.assert_allclose(run_session(open_session(stored), feed)["y"], expected, rtol=1e-3, atol=1e-3)


def test_an_opset_too_low_is_told() -> None:
    model, edge, coded = made("MatMul", "mxfp8", 18)
    with pytest.raises(ModelError, match="needs opset 19, the model of node 'n' has 18") as caught:
        store_weights(model, {edge: coded})
    assert "opset" in caught.value.hint
    model, edge, coded = made("MatMul", "mxfp4", 18)
    verify.verify(store_weights(model, {edge: coded}), "storing weights")


def test_files_shrink_as_the_formats_say() -> None:
    model = graph("(float[5,512] x) => (float[5,512] y) { y = MatMul(x, w) }", {"w": normal(512, 512)})
    next(iter(model.graph)).name = "n"
    for text in (
        "u4/block32/asym",
        "i8/channel",
        "mxfp4",
        "mxfp6",
        "nvfp4",
        "f8e4m3/tensor",
        "bf16",
        "u2/block16/asym",
    ):
        quant = parse_quant(text)
        stored = store_weights(model, nearest(model, storable(model, quant, ["MatMul"])))
        # Scales a channel (2 KiB), and tables of up to 4 KiB, are not counted in bits an element.
        assert 0 <= io.weight_bytes(stored) - 512 * 512 * quant.bits / 8 <= 6400, text


def test_what_can_be_stored() -> None:
    text = """(float[1,8,8,8] x, int64[2] i, float[2,64] v)
        => (float[2,96] y, float[1,32,6,6] z, float[2,96] u, float[2,2] q) {
        t = Gather(table, i) y = MatMul(t, w) z = Conv(x, k) r = MatMul(v, s) u = MatMul(r, w) q = MatMul(v, tiny) }"""
    arrays = {"table": normal(90, 64), "w": normal(64, 96), "k": normal(32, 8, 3, 3), "s": normal(64, 64)}
    model = graph(text, {**arrays, "tiny": normal(64, 2)})
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    quant = parse_quant("mxfp4")
    assert set(storable(model, quant, ["MatMul", "Gather", "Conv"])) == {("t", 0), ("y", 1), ("r", 1), ("u", 1)}
    channels = storable(model, parse_quant("i8/channel"), ["Conv", "Gather", "MatMul"])
    assert {edge: params.scale.shape for edge, params in channels.items()} == {
        ("t", 0): (90,), ("y", 1): (96,), ("z", 1): (32,), ("r", 1): (64,), ("u", 1): (96,),
    }  # fmt: skip
    assert channels["y", 1] is channels["u", 1], "a weight is fitted once"
    with pytest.raises(RecipeError, match="'Convolution' can't be stored") as caught:
        storable(model, quant, ["Convolution"])
    assert "Conv" in caught.value.hint


# --- the step --------------------------------------------------------------------------------------------------------

NET = """(int64[1,6] ids, float[1,6,64] v) => (float[1,6,32] y) {
    e = Gather(table, ids) h = Add(e, v) a = MatMul(h, w) r = Relu(a) y = MatMul(r, o) }"""


def net() -> tuple[ir.Model, Context]:
    weights = {"table": normal(500, 64), "w": normal(64, 128) / 8, "o": normal(128, 32) / 11}
    model, _ = read_model(graph(NET, weights), opset=21)
    rng = np.random.default_rng(3)
    feeds = [{"ids": rng.integers(0, 500, (1, 6)), "v": normal(1, 6, 64)} for _ in range(4)]
    return model, Context(load_target(VNNI), oracle_of(VNNI), samples_of(feeds), Recorder())


def test_the_step_stores_and_tells() -> None:
    model, context = net()
    result = steps.weights(model, context, format="mxfp4", ops="MatMul+Gather")
    verify.verify(result, "weights")
    (record,) = context.recorder.steps
    assert record.facts["format"] == "f4e2m1/block32/e8m0"
    assert (record.facts["weights"], record.facts["rows"], record.facts["load"]) == (3, 1, 2)
    assert record.facts["bytes_after"] < 0.2 * record.facts["bytes_before"]
    assert record.facts["snr_db"] == pytest.approx(19, abs=0.5)
    (notice,) = context.recorder.notices
    assert notice.code == "decoded-at-load"
    assert notice.message.startswith("2 weights in f4e2m1/block32/e8m0 are decoded when the model is loaded")
    feed = context.calibration.read(0)
    exact, found = (run_session(open_session(m), feed)["y"] for m in (model, result))
    assert 10 * np.log10((exact**2).sum() / ((exact - found) ** 2).sum()) > 12


def test_kernels_take_codes_and_need_no_notice() -> None:
    model, context = net()
    result = steps.weights(model, context)
    assert ops(result).count("DequantizeLinear") == 2
    assert ops(result).count("Gather") == 1, "embeddings aren't in the default ops"
    assert context.recorder.notices == []
    coded = nearest(model, storable(model, parse_quant("u4/block32/asym"), ["MatMul"]))
    assert context.recorder.steps[0].facts["snr_db"] == round(snr_db(model, coded), 1)


@pytest.mark.parametrize(("stored_ops", "integer"), [("MatMul", 0), ("Gather", 2)])
def test_quantize_leaves_stored_weights_alone(stored_ops: str, integer: int) -> None:
    model, context = net()
    stored = steps.weights(model, context, format="i8/channel", ops=stored_ops)
    quantizer = steps.quantize(stored, context, ranges="minmax")
    quantizer.costs = all_integer(quantizer.atoms)
    plan, result, _ = quantizer.fused()
    assert sum("MatMul" in name for name in plan.integer) == integer
    assert "its weights are stored as i8/channel" in plan.left_float.values()
    feed = context.calibration.read(0)
    exact, found = (run_session(open_session(m), feed)["y"] for m in (stored, result))
    assert np.square(exact - found).sum() < 10**-2.5 * np.square(exact).sum()


def test_a_second_format_takes_what_the_first_left() -> None:
    model, context = net()
    once = steps.weights(model, context, format="u2/block16/asym", ops="Gather")
    twice = steps.weights(once, context, format="i8/channel", ops="MatMul+Gather")
    assert [record.facts["weights"] for record in context.recorder.steps] == [1, 2]
    assert ops(twice).count("DequantizeLinear") == 2


@pytest.mark.parametrize("name", ["canonicalize", "smooth"])
def test_what_reads_weights_comes_first(name: str) -> None:
    model, context = net()
    recipe = parse(f"weights(format=f16); {name}", steps.KNOWN)
    with pytest.raises(RecipeError, match=f"step '{name}' stands behind weights"):
        steps.apply(recipe, model, context)
    prepared = steps.apply(parse("canonicalize; smooth; weights(format=mxfp8)", steps.KNOWN), model, context)
    assert [name for name, _ in prepared.intermediates] == ["canonicalize", "smooth", "weights"]


@pytest.mark.slow
def test_stored_weights_ship_when_they_are_accurate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they are faster or not: the recipe asked for them. What isn't accurate doesn't ship."""
    monkeypatch.setattr(settle, "DECIDE_SECONDS", 0.2)
    monkeypatch.setattr(pipeline, "VALIDATE_SECONDS", 0.2)
    small_net.write(tmp_path)
    for text, ships in (("f16", True), ("u2/block16/asym", False)):
        report = pipeline.export(
            tmp_path / "net.onnx", out=tmp_path / f"{ships}.edgeq", calibration=str(tmp_path / "calibration.npz"),
            evaluation=str(tmp_path / "evaluation.npz"), threads=[1],
            inputs=[f"image=1,3,{small_net.SIZE},{small_net.SIZE}"],
            recipe=f"canonicalize; weights(format={text}, ops=Conv)",
        )  # fmt: skip
        shipped = next(row["name"] for row in report.candidates if row["ships"])
        assert shipped == ("float prepared" if ships else "float as given")
        codes = {notice.code for notice in report.notices}
        assert codes == {"decoded-at-load"} | (set() if ships else {"prepared-differs"})
        assert (report.check("size_ratio").value < 0.7) is ships


LOUD = np.where(np.arange(64) % 16 == 3, 40, 1).astype(np.float32)  # channels of a LayerNormalization


@pytest.mark.parametrize(
    ("before", "added"), [("n = LayerNormalization(x, g)", 0), ("n = Mul(x, g)", 0), ("n = Relu(x)", 1)]
)
def test_rows_that_large_activations_meet_lose_less(before: str, added: int) -> None:
    text = f"(float[1,24,64] x) => (float[1,24,48] y) {{ {before} y = MatMul(n, w) }}"
    weights = {"g": LOUD, "w": normal(64, 48) / 8}
    model = read_model(graph(text, {name: weights[name] for name in ("g", "w") if name in text}), opset=21)[0]
    feeds = [{"x": normal(1, 24, 64) * (LOUD if added else 1)} for _ in range(8)]
    noise = {}
    for scales in ("plain", "awq"):
        context = Context(load_target(VNNI), oracle_of(VNNI), samples_of(feeds[:4]), Recorder())
        result = steps.weights(model, context, format="i4/channel", scales=scales)
        verify.verify(result, "weights")
        noise[scales] = sum(np.square(run(result, feed)["y"] - run(model, feed)["y"]).mean() for feed in feeds[4:])
    facts = {step.name: step.facts for step in context.recorder.steps}
    assert facts["scale"]["tensors"] == 1
    assert noise["awq"] < 0.9 * noise["plain"]
    assert ops(result).count("Mul") - ops(model).count("Mul") == added


def test_scales_leave_inputs_alone_that_other_weights_read() -> None:
    model, context = net()
    context.keep_float["head"] = "a test"
    model.graph[-1].name = "head"
    steps.weights(model, context, format="i4/channel", scales="awq")
    assert context.recorder.steps[0].facts["tensors"] == 0, "w is read behind even channels, o isn't stored"


def test_nothing_to_store_is_told() -> None:
    model, context = net()
    assert ops(steps.weights(model, context, ops="Conv")) == ops(model)
    assert [notice.code for notice in context.recorder.notices] == ["nothing-to-store"]


def test_an_unknown_format_is_told() -> None:
    model, context = net()
    with pytest.raises(RecipeError, match="unknown number format 'u5'"):
        steps.weights(model, context, format="u5/channel")
    with pytest.raises(RecipeError, match="rounding=up"):
        steps.weights(model, context, rounding="up")
    with pytest.raises(RecipeError, match="scales=awk"):
        steps.weights(model, context, scales="awk")
