"""Rounding the weights of a model: what layers read, how they lie in memory, and that outputs gain."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeq import steps
from edgeq.analyse import rounding
from edgeq.analyse.rounding import round_weights, with_codes
from edgeq.analyse.weights import nearest, storable
from edgeq.context import Context
from edgeq.errors import RecipeError, SampleError
from edgeq.ir import io, verify
from edgeq.num.quant import Coded, QParams, parse_quant
from edgeq.num.rounding import Inputs, output_error
from edgeq.report.recorder import Recorder
from edgeq.rewrite.weights import store_weights
from edgeq.source import read_model
from edgeq.target.load import load_target
from tests.bench.rounding import measure, won_back
from tests.graphs import graph, normal, random_feed
from tests.placed import VNNI, oracle_of, run, samples_of

OPS = ["MatMul", "Gemm", "Conv"]
LAYERS = {
    "MatMul": ("(float[2,9,40] x) => (float[2,9,32] y) { y = MatMul(x, w) }", (40, 32)),
    "Gemm": ("(float[7,40] x) => (float[7,32] y) { y = Gemm(x, w) }", (40, 32)),
    "Gemm turned": ("(float[7,40] x) => (float[7,32] y) { y = Gemm<transB=1>(x, w) }", (32, 40)),
    "Conv": ("(float[1,12,6,6] x) => (float[1,32,6,6] y) { y = Conv<pads=[1,1,1,1]>(x, w) }", (32, 12, 3, 3)),
    "groups": ("(float[1,32,6,6] x) => (float[n,c,h,v] y) { y = Conv<group=4, pads=[0,1,2,1]>(x, w) }", (32, 8, 3, 2)),
    "depthwise": (
        "(float[1,128,8,8] x) => (float[n,c,h,v] y) { y = Conv<group=128, strides=[2,2]>(x, w) }",
        (128, 1, 3, 3),
    ),
    "dilations": (
        "(float[1,12,9,8] x) => (float[n,c,h,v] y) { y = Conv<dilations=[2,1], strides=[1,2]>(x, w) }",
        (32, 12, 3, 3),
    ),
    "same": (
        '(float[1,12,7,8] x) => (float[n,c,h,v] y) { y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w) }',
        (32, 12, 3, 2),
    ),
    "same lower": (
        '(float[1,12,7,8] x) => (float[n,c,h,v] y) { y = Conv<auto_pad="SAME_LOWER">(x, w) }',
        (32, 12, 2, 2),
    ),
    "1 axis": ("(float[1,12,20] x) => (float[n,c,h] y) { y = Conv<strides=[3]>(x, w) }", (32, 12, 5)),
}
FORMATS = ["i4/channel", "i4/tensor", "u4/block8/asym"]
CASES = [(name, text) for name in LAYERS for text in FORMATS if name != "depthwise" or "block" not in text]


def made(name: str) -> ir.Model:
    text, shape = LAYERS[name]
    return read_model(graph(text, {"w": normal(*shape)}), opset=21)[0]


def wanted_of(model: ir.Model, text: str) -> dict[tuple[str, int], QParams]:
    return storable(model, parse_quant(text), OPS)


def noise(model: ir.Model, coded: dict[tuple[str, int], Coded], feeds: list[dict[str, Any]]) -> float:
    """Mean squared error of the output."""
    twin, total, elements = with_codes(model, coded), 0.0, 0
    for feed in feeds:
        wanted, found = run(model, feed)["y"], run(twin, feed)["y"]
        total += float(np.square(wanted.astype(np.float64) - found).sum())
        elements += wanted.size
    return total / elements


@pytest.mark.parametrize(("name", "text"), CASES)
def test_moments_foretell_the_error_of_outputs(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the layout of a weight and however it reads its input: ONNX Runtime's outputs are off by what the
    second moments say, so patches, pads, groups and the order of columns are right."""
    model = made(name)
    feeds = [random_feed(model) for _ in range(3)]
    seen: list[tuple[Any, Coded, Inputs]] = []

    def spy(W: Any, params: QParams, inputs: Inputs | None = None) -> Coded:
        assert inputs is not None
        seen.append((W, rounding.ROUNDERS["nearest"](W, params, None), inputs))
        return seen[-1][1]

    monkeypatch.setitem(rounding.ROUNDERS, "gptq", spy)
    coded = round_weights(model, wanted_of(model, text), samples_of(feeds), rounding="gptq")
    ((W, codes, inputs),) = seen
    outputs = 32 if name != "depthwise" else 128
    assert len(W) == outputs
    assert noise(model, coded, feeds) * outputs == pytest.approx(output_error(W, codes, inputs.H), rel=1e-3)
    plain = nearest(model, wanted_of(model, text))
    for edge, constant in coded.items():
        np.testing.assert_array_equal(constant.codes, plain[edge].codes)
        np.testing.assert_array_equal(constant.params.scale, plain[edge].params.scale)
        np.testing.assert_array_equal(constant.params.zero_point, plain[edge].params.zero_point)
        assert constant.params.axis == plain[edge].params.axis


@pytest.mark.parametrize(("name", "text"), CASES)
@pytest.mark.parametrize("how", ["gptq", "adaround"])
def test_outputs_gain_and_can_be_stored(how: str, name: str, text: str) -> None:
    model = made(name)
    before = io.digest(model)
    mix = normal(*random_feed(model)["x"].shape)
    feeds = [{"x": mix + 0.3 * feed["x"]} for feed in (random_feed(model) for _ in range(10))]
    wanted = wanted_of(model, text)
    coded = round_weights(model, wanted, samples_of(feeds), rounding=how)
    assert noise(model, coded, feeds) <= noise(model, nearest(model, wanted), feeds) * 1.001
    assert io.digest(model) == before
    stored = store_weights(model, coded)
    verify.verify(stored, "storing")
    twin = with_codes(model, coded)
    np.testing.assert_allclose(run(stored, feeds[0], level="none")["y"], run(twin, feeds[0])["y"], rtol=1e-3, atol=1e-3)


TWO = "(float[6,40] x) => (float[6,40] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, w) }"


def test_a_weight_read_twice_gets_one_set_of_codes() -> None:
    model = read_model(graph(TWO, {"w": normal(40, 40)}), opset=21)[0]
    samples = samples_of([random_feed(model) for _ in range(6)])
    coded = round_weights(model, wanted_of(model, "i4/channel"), samples)
    first, second = coded.values()
    assert first is second
    assert (first.codes != next(iter(nearest(model, wanted_of(model, "i4/channel")).values())).codes).any()


def test_later_stages_see_the_earlier_ones_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    text = TWO.replace("MatMul(b, w)", "MatMul(b, v)")
    model = read_model(graph(text, {"w": normal(40, 40), "v": normal(40, 40)}), opset=21)[0]
    samples = samples_of([random_feed(model) for _ in range(4)])
    moments: list[Inputs] = []
    monkeypatch.setitem(
        rounding.ROUNDERS,
        "gptq",
        lambda W, p, known: (moments.append(known), rounding.ROUNDERS["nearest"](W, p, None))[1],
    )
    wanted = wanted_of(model, "i2/channel")
    for stages in (1, 2):
        round_weights(model, wanted, samples, stages=stages)
    at_once, in_turn = moments[:2], moments[2:]
    np.testing.assert_allclose(in_turn[0].H, at_once[0].H, rtol=1e-5)
    assert np.abs(in_turn[1].H - at_once[1].H).max() > 0.05 * at_once[1].H.max()


def test_padding_is_not_learnt_from() -> None:
    text = "(float[1,6,40] x, int64[1,6] attention_mask) => (float[1,6,32] y) { y = MatMul(x, w) }"
    model = read_model(graph(text, {"w": normal(40, 32)}), opset=21)[0]
    mask = np.array([[1, 1, 1, 0, 0, 0]])
    quiet = [{"x": normal(1, 6, 40), "attention_mask": mask} for _ in range(12)]
    loud = [{**feed, "x": np.where(mask[..., None] == 1, feed["x"], 1e4).astype(np.float32)} for feed in quiet]
    wanted = wanted_of(model, "i4/channel")
    (one,), (other,) = (round_weights(model, wanted, samples_of(feeds)).values() for feeds in (quiet, loud))
    np.testing.assert_array_equal(one.codes, other.codes)


def test_what_is_no_layer_is_rounded_to_nearest() -> None:
    text = """(int64[5] i, float[5,40] z) => (float[5,32] y, float[40,40] u)
        { t = Gather(w, i) y = Add(t, c) u = MatMul(v, z) }"""
    model = read_model(graph(text, {"w": normal(64, 32), "v": normal(40, 5), "c": normal(32)}), opset=21)[0]
    wanted = storable(model, parse_quant("i4/channel"), ["Gather"])
    feeds = [{"i": np.arange(5), "z": normal(5, 40)}]
    coded = round_weights(model, wanted, samples_of(feeds))
    plain = nearest(model, wanted)
    assert [edge[1] for edge in coded] == [0]
    for edge in wanted:
        np.testing.assert_array_equal(coded[edge].codes, plain[edge].codes)


@pytest.mark.parametrize("clip", ["octav", "oscar"])
def test_clips_fit_the_scales_anew(clip: str) -> None:
    model = made("MatMul")
    wanted = wanted_of(model, "i4/channel")
    coded = round_weights(model, wanted, samples_of([random_feed(model)]), rounding="nearest", clip=clip)
    for edge, constant in coded.items():
        assert constant.params.scale.shape == wanted[edge].scale.shape
        assert (constant.params.scale != wanted[edge].scale).any()


def test_what_cannot_be_rounded_so_is_said() -> None:
    model = made("MatMul")
    samples = samples_of([random_feed(model)])
    wanted = wanted_of(model, "i4/channel")
    with pytest.raises(RecipeError, match="rounding=gtpq is not known") as caught:
        round_weights(model, wanted, samples, rounding="gtpq")
    assert "gptq" in str(caught.value.hint)
    with pytest.raises(RecipeError, match="clip=oskar is not known"):
        round_weights(model, wanted, samples, clip="oskar")
    with pytest.raises(RecipeError, match="gptq knows integers, not f4e2m1/block32/e8m0"):
        round_weights(model, wanted_of(model, "mxfp4"), samples)
    with pytest.raises(SampleError, match="rounding=adaround needs calibration samples"):
        round_weights(model, wanted, None, rounding="adaround")
    assert round_weights(model, wanted, None, rounding="hqq")


@pytest.mark.parametrize("how", ["nearest", "gptq", "adaround", "hqq"])
def test_the_step_takes_a_rounding(how: str) -> None:
    model = made("MatMul")
    feeds = [random_feed(model) for _ in range(6)]
    context = Context(load_target(VNNI), oracle_of(VNNI), samples_of(feeds), Recorder())
    result = steps.weights(model, context, format="u4/block16/asym", rounding=how)
    verify.verify(result, "storing weights")
    assert context.recorder.steps[-1].facts["rounding"] == how


@pytest.mark.zoo
def test_a_real_model_gets_more_than_half_of_its_loss_back() -> None:
    rows = measure("EFL0", ["i4/channel"], ["nearest", "gptq"], "", 4, 32, 100)
    assert min(won_back(rows, rows[-1])) > 0.5, rows
