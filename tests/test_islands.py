"""16-bit floats where a quantized model stays float. Oracles: ONNX Runtime on the same model without them, and types
read from the graph."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import edgeq
from edgeq import steps
from edgeq.analyse.place import Plan
from edgeq.context import Context
from edgeq.errors import RecipeError
from edgeq.ir import io, verify
from edgeq.num.metrics import snr_db
from edgeq.quantizer import Quantizer
from edgeq.recipe import parse
from edgeq.report.record import Coverage
from edgeq.rewrite.halve import rounded
from edgeq.run.record import Feed
from edgeq.source import read_model
from tests import small_net
from tests.graphs import graph, normal
from tests.placed import run
from tests.test_half import context_of

TEXT = """(float[1,64,16,16] x) => (float[1,64,16,16] y) {
    a = Conv(x, u)
    b = Relu(a)
    c = Conv(b, v)
    d = Relu(c)
    y = Conv(d, w)
}"""
RECIPE = "quantize(ranges=minmax)"


def convolutions() -> ir.Model:
    return read_model(graph(TEXT, {name: normal(64, 64, 1, 1) / 8 for name in "uvw"}), opset=21)[0]


def quantized(model: ir.Model, recipe: str, left: str = "") -> tuple[Context, Quantizer, Plan, ir.Model, Coverage]:
    """All that fuses in integers, but for the node that writes ``left``."""
    context = context_of([{"x": normal(1, 64, 16, 16)} for _ in range(4)])
    kept = [str(node.name) for node in model.graph if node.outputs[0].name == left]
    context.keep_float.update(dict.fromkeys(kept, "a test wants it"))
    quantizer = steps.apply(parse(recipe, steps.KNOWN), model, context).quantizer
    assert quantizer is not None
    return context, quantizer, *quantizer.fused()


def written_in(model: ir.Model, dtype: ir.DataType, *besides: str) -> set[str]:
    """Tensors of a type, but those of ops ``besides``."""
    return {
        str(value.name)
        for node in model.graph
        for value in node.outputs
        if value.dtype == dtype and node.op_type not in besides
    }


def test_what_stays_float_computes_in_16_bits_and_what_is_integer_as_before() -> None:
    model = convolutions()
    *_, expected = quantized(model, RECIPE, "c")
    context, quantizer, plan, draft, seen = quantized(model, f"{RECIPE}; half(format=f16)", "c")
    assert not written_in(draft, ir.DataType.FLOAT16), "repairs and proofs are made of the draft in f32"
    shipped = quantizer.finished(plan, draft)
    verify.verify(shipped, "half")
    assert written_in(shipped, ir.DataType.FLOAT16, "Cast") == {"c", "d"}
    assert [node.op_type for node in shipped.graph if node.op_type == "Cast"] == ["Cast"] * 2
    assert written_in(shipped, ir.DataType.FLOAT, "Cast", "DequantizeLinear") == {"a", "b", "y_raw"}
    assert seen.integer_nodes == expected.integer_nodes == 2
    weights = [value for value in shipped.graph.initializers.values() if value.dtype == ir.DataType.FLOAT16]
    assert [value.shape for value in weights] == [ir.Shape([64, 64, 1, 1])]
    feed = context.calibration.read(0)
    exact, found = run(draft, feed, level="none")["y"], run(rounded(shipped), feed, level="none")["y"]
    assert 40 < snr_db(exact, found).min() < 120  # one code more or less here and there


def test_half_alone_is_what_ships_where_nothing_is_quantized() -> None:
    context, model = context_of([{"x": normal(1, 64, 16, 16)}]), convolutions()
    prepared = steps.apply(parse(f"{RECIPE}; half(format=f16)", steps.KNOWN), model, context)
    assert prepared.halved and written_in(prepared.model, ir.DataType.FLOAT16) >= {"a", "b", "c", "d"}
    assert prepared.quantizer is not None and prepared.quantizer.model is model
    assert Counter(notice.code for notice in context.recorder.notices) == {"half-emulated": 1}


def test_a_target_of_float32_wants_none() -> None:
    context, quantizer, plan, draft, _ = quantized(convolutions(), f"{RECIPE}; half", "c")
    assert quantizer.narrow is None and quantizer.finished(plan, draft) is draft
    assert [notice.code for notice in context.recorder.notices] == ["no-halves"]


def test_nothing_else_stands_behind_quantize() -> None:
    with pytest.raises(RecipeError, match="step 'canonicalize' stands behind quantize") as error:
        quantized(convolutions(), "quantize; half(format=f16); canonicalize")
    assert error.value.hint == "put quantize last, but for half"


def test_stored_weights_are_left_alone() -> None:
    text = "(int64[64] x) => (float[64,64] y) { e = Gather(table, x) a = MatMul(e, u) y = MatMul(a, v) }"
    weights = {"table": normal(64, 64), "u": normal(64, 64) / 8, "v": normal(64, 64) / 8}
    model, _ = read_model(graph(text, weights), opset=21)
    feeds: list[Feed] = [{"x": np.roll(np.arange(64), index)} for index in range(4)]
    recipe = f"weights(format=i8/channel, ops=Gather); {RECIPE}; half(format=f16)"
    context = context_of(feeds)
    context.keep_float.update(dict.fromkeys([str(node.name) for node in model.graph][1:2], "a test wants it"))
    quantizer = steps.apply(parse(recipe, steps.KNOWN), model, context).quantizer
    assert quantizer is not None
    plan, draft, _ = quantizer.fused()
    shipped = quantizer.finished(plan, draft)
    assert "a" in written_in(shipped, ir.DataType.FLOAT16)
    sizes = Counter(
        str(value.dtype) for value in shipped.graph.initializers.values() if value.shape == ir.Shape([64, 64])
    )
    assert sizes == {"INT8": 2, "FLOAT16": 1}
    exact, found = run(draft, feeds[0], level="none")["y"], run(rounded(shipped), feeds[0], level="none")["y"]
    assert snr_db(exact, found).min() > 40


def test_a_quantized_model_ships_with_halves_and_is_judged_as_rounded(tmp_path: Path) -> None:
    net, calibration, evaluation = small_net.write(tmp_path)
    report = edgeq.export(
        net, out=tmp_path / "net.edgeq", target="cpu-arm64-a76", calibration=str(calibration),
        evaluation=str(evaluation), recipe="canonicalize; quantize(ranges=minmax, relief=6); half(format=f16)",
        max_drop=0.1,
    )  # fmt: skip
    assert report.passed and report.coverage is not None and report.coverage.integer_nodes
    shipped = io.read(tmp_path / "net.edgeq" / "model.onnx")
    ops = Counter((node.op_type, str(node.outputs[0].dtype)) for node in shipped.graph)
    assert ops["Conv", "FLOAT16"] and ops["Conv", "FLOAT"], ops
    feed = {"image": small_net.images(24, seed=2)}
    exact, found = (run(one, feed, level="none")["logits"] for one in (small_net.model(), rounded(shipped)))
    assert report.check("snr_db").value == pytest.approx(snr_db(exact, found).mean(), abs=0.3)
