"""Encodings: ranges and ties, biases against brute force, the overflow guard, tensors integers can't hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeq.analyse.coverage import read_back
from edgeq.analyse.encode import Ranges, constant_params, encode, observed, unholdable
from edgeq.context import Context
from edgeq.errors import ModelError
from edgeq.num.fit import fit_range
from edgeq.num.quant import Coded, dequantize, quantize
from edgeq.quantizer import Quantizer
from edgeq.report.recorder import Recorder
from edgeq.rewrite.qdq import insert_qdq
from edgeq.source import read_model
from edgeq.target.load import load_target
from tests.graphs import graph, normal, number
from tests.placed import MINMAX, VNNI, Placed, all_integer, oracle_of, placed, run, samples_of

POINT = "Conv<kernel_shape=[1,1]>"
F32 = NDArray[np.float32]


def coarse(*shape: int) -> F32:
    """Weights with one large element a channel, so that rounding the others leaves a shift worth correcting."""
    weights = normal(*shape) * 0.01
    weights.reshape(shape[0], -1)[:, 0] = 3.0
    return weights


def positive(count: int, *shape: int) -> list[dict[str, F32]]:
    """Inputs with a mean far from 0, one a channel, as behind a Relu."""
    offsets = np.linspace(0.5, 4, shape[1], dtype=np.float32).reshape(1, -1, *[1] * (len(shape) - 2))
    return [{"x": np.abs(normal(*shape)) + offsets} for _ in range(count)]


def shift(made: Placed, model: Any = None) -> F32:
    """Mean of float minus quantized outputs by channel (axis 1 of images, last of rows) over all feeds: brute force."""
    gaps = []
    for feed in made.feeds:
        wanted = made.exact(feed)["y"]
        found = made.fused(feed)["y"] if model is None else run(model, feed)["y"]
        gaps.append(wanted.astype(np.float64) - found)
    stacked = np.concatenate(gaps)
    axes = tuple(axis for axis in range(stacked.ndim) if axis != (1 if stacked.ndim == 4 else stacked.ndim - 1))
    return np.asarray(stacked.mean(axis=axes), np.float32)


def uncorrected(made: Placed) -> Any:
    """The same model with biases as they were: channels' means unknown."""
    for stats in made.stats.values():
        stats.channels = None
    return insert_qdq(made.source, made.plan, encode(made.plan, made.stats, made.target, ranges=MINMAX))


BIASED = {
    "Conv": (f"{{ y = {POINT}(x, w, b) }}", coarse(8, 8, 1, 1), (1, 8, 6, 6)),
    "Conv depthwise": ("{ y = Conv<kernel_shape=[3,3], group=8>(x, w, b) }", coarse(8, 1, 3, 3), (1, 8, 6, 6)),
    "Conv grouped": ("{ y = Conv<kernel_shape=[3,3], group=2>(x, w, b) }", coarse(8, 4, 3, 3), (1, 8, 6, 6)),
    "Conv multiplier": ("{ y = Conv<kernel_shape=[3,3], group=4>(x, w, b) }", coarse(8, 1, 3, 3), (1, 4, 6, 6)),
    "Conv behind a shuffle": (
        f"{{ f = Reshape(x, five) t = Transpose<perm=[0,2,1,3,4]>(f) s = Reshape(t, four) y = {POINT}(s, w, b) }}",
        coarse(8, 8, 1, 1), (1, 8, 6, 6),
    ),
    "Conv behind MaxPool": (
        f"{{ p = MaxPool<kernel_shape=[3,3]>(x) y = {POINT}(p, w, b) }}", coarse(8, 8, 1, 1), (1, 8, 6, 6)
    ),
    "Gemm": ("{ y = Gemm(x, w, b) }", coarse(8, 8).T.copy(), (5, 8)),
    "Gemm transB": ("{ y = Gemm<transB=1>(x, w, b) }", coarse(8, 8), (5, 8)),
    "Gemm row": ("{ y = Gemm(x, w, row) }", coarse(8, 8).T.copy(), (5, 8)),
    "MatMul": ("{ t = MatMul(x, w) y = Add(t, b) }", coarse(8, 8).T.copy(), (5, 8)),
    "MatMul rank 3": ("{ t = MatMul(x, w) y = Add(t, b) }", coarse(8, 8).T.copy(), (2, 5, 8)),
}  # fmt: skip
MORE = {"five": np.array([1, 2, 4, 6, 6]), "four": np.array([1, 8, 6, 6]), "row": normal(1, 8)}


@pytest.mark.parametrize("name", BIASED)
def test_correction_takes_the_mean_error_away(name: str) -> None:
    body, weight, shape = BIASED[name]
    rank_3 = len(shape) == 3
    feeds = positive(16, *shape) if not rank_3 else [{"x": np.abs(normal(*shape)) + 1} for _ in range(16)]
    text = f"(float{list(shape)} x) => (float[{','.join('ABCD'[: len(shape)])}] y) {body}"
    made = placed(text, {"w": weight, "b": normal(8), **MORE}, feeds=feeds)
    assert made.encodings.biases
    corrected = np.abs(shift(made))
    plain = np.abs(shift(made, uncorrected(made)))
    step = float(np.ptp(made.exact()["y"])) / 255
    assert plain.max() > 4 * corrected.max(), "the correction removes most of the shift"
    assert corrected.max() < 0.5 * step, "what is left is below a step: rounding of inputs and outputs"


def test_square_products_of_a_transposed_input_are_not_corrected_with_the_wrong_means() -> None:
    text = "(float[8,8] x) => (float[8,8] y) { y = Gemm<transA=1>(x, w, b) }"
    made = placed(text, {"w": coarse(8, 8).T.copy(), "b": normal(8)}, feeds=positive(4, 8, 8))
    kept = insert_qdq(made.source, made.plan, encode(made.plan, made.stats, made.target, ranges=MINMAX))
    np.testing.assert_array_equal(run(kept, made.feeds[0])["y"], run(uncorrected(made), made.feeds[0])["y"])


def test_channels_last_products_of_images_use_the_last_axis() -> None:
    feeds = [{"x": np.abs(normal(1, 8, 8, 8)) + np.linspace(0.5, 4, 8, dtype=np.float32)} for _ in range(8)]
    text = "(float[1,8,8,8] x) => (float[1,8,8,8] y) { t = MatMul(x, w) y = Add(t, b) }"
    made = placed(text, {"w": coarse(8, 8).T.copy(), "b": normal(8)}, feeds=feeds)
    np.testing.assert_allclose(
        made.stats["x"].channels.mean, np.mean([f["x"].mean((0, 1, 2)) for f in feeds], axis=0), rtol=1e-5
    )


@pytest.mark.parametrize("target", ["cpu-x64-vnni", "cpu-x64-avx2", "cpu-arm64"])
def test_a_bias_that_would_overflow_raises_its_channels_scale(target: str) -> None:
    feeds = [{"x": np.full((1, 8, 6, 6), 1e-7 * i, np.float32)} for i in (1, 2, 3)]
    weights = {"w": normal(8, 8, 1, 1) * 1e-4, "b": np.array([0, 1, 5, 9, 1e3, 2, 2, -9], np.float32)}
    made = placed(
        f"(float[1,8,6,6] x) => (float[1,8,6,6] y) {{ y = {POINT}(x, w, b) }}", weights, feeds=feeds, target=target
    )
    assert made.encodings.notes == ("Conv_node: weight scale raised on 7 channels so that the int32 bias fits",)
    np.testing.assert_allclose(made.fused()["y"], made.exact()["y"], atol=1e3 / 255)
    ((codes, scales),) = made.encodings.biases.values()
    np.testing.assert_allclose(codes * scales.astype(np.float64), weights["b"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_dead_weights_and_dead_inputs_keep_the_bias(weight: float, level: float) -> None:
    feeds = [{"x": np.full((1, 8, 6, 6), level, np.float32)}]
    bias = np.array([0, 1, 5, 9, 100, 2, 2, -9], np.float32)
    made = placed(
        f"(float[1,8,6,6] x) => (float[1,8,6,6] y) {{ y = {POINT}(x, w, b) }}",
        {"w": normal(8, 8, 1, 1) * weight, "b": bias}, feeds=feeds,
    )  # fmt: skip
    np.testing.assert_allclose(made.fused()["y"], made.exact()["y"], atol=0.75 * 120 / 255)


# --- ranges ----------------------------------------------------------------------------------------------------------

CHAIN = "(float[5,8] x) => (float[5,8] y) { t = MatMul(x, w) r = Reshape(t, s) m = MatMul(r, w) y = Softmax(m) }"
WEIGHTS = {"w": normal(8, 8), "s": np.array([5, 8])}


def test_one_tensor_a_tie_is_observed_and_all_of_it_share_its_parameters() -> None:
    made = placed(CHAIN, WEIGHTS)
    assert observed(made.plan) == ["x", "t", "m", "y"]
    assert made.encodings.activations["r"] is made.encodings.activations["t"]


def test_ranges_go_by_tensor_then_by_product_then_by_default() -> None:
    made = placed(CHAIN, WEIGHTS)
    for stats in made.stats.values():  # rare outliers: every method has its own idea of them
        stats.add(np.linspace(20, 100, 9, dtype=np.float32).reshape(1, -1), 99)
        stats.add(normal(1, 4000), 100)
    fitted = encode(made.plan, made.stats, made.target, ranges=Ranges("mse", "minmax", {"t": "percentile"}))
    for name, method in {"x": "minmax", "t": "percentile", "m": "mse", "y": "mse"}.items():
        stats, params = made.stats[name], fitted.activations[name]
        lo, hi = fit_range(method, stats.histogram, stats.min, stats.max, params.quant)
        assert float(params.scale) == pytest.approx((hi - lo) / 255, rel=1e-5)


def test_codes_reproduce_what_was_observed() -> None:
    made = placed(CHAIN, WEIGHTS)
    for name in ("x", "t"):
        params, stats = made.encodings.activations[name], made.stats[name]
        ends = np.array([min(stats.min, 0), 0, max(stats.max, 0)], np.float32)
        np.testing.assert_allclose(dequantize(quantize(ends, params), params), ends, atol=0.51 * float(params.scale))


def test_a_tensor_calibration_never_saw_is_named() -> None:
    made = placed(CHAIN, WEIGHTS)
    with pytest.raises(ModelError, match="calibration saw no value of tensor 't'") as caught:
        encode(made.plan, {name: stats for name, stats in made.stats.items() if name != "t"}, made.target)
    assert caught.value.hint == "use samples that reach this part of the model"


# --- masks -----------------------------------------------------------------------------------------------------------


def quantizer(text: str, weights: dict[str, Any], feeds: list[dict[str, Any]]) -> Quantizer:
    model, _ = read_model(graph(text, weights), opset=21)
    context = Context(load_target(VNNI), oracle_of(VNNI), samples_of(feeds), Recorder())
    made = Quantizer(model, context, "minmax")
    made.costs = all_integer(made.atoms)
    return made


HEAD = "(float[5,16] x, float[5,8] m) => (float[5,8] y) { t = MatMul(x, w)"
KEPT = np.arange(40).reshape(5, 8) % 3 != 0


@pytest.mark.parametrize("lowest", [-np.inf, -3.4e38, -1e9])
@pytest.mark.parametrize(
    "body",
    [
        "c = Cast<to=9>(m) u = Where(c, t, k)",  # chosen
        "n = Sub(one, m) i = Mul(n, k) u = Add(t, i)",  # summed, made while running
        "z = Where(f, t, t) u = Add(z, r)",  # summed, a constant of the mask's shape
    ],
)
def test_masks_are_never_quantized(body: str, lowest: float) -> None:
    if "Mul" in body and np.isinf(lowest):
        lowest = -1e30  # 0 * -inf is NaN in float too
    feeds = [{"x": normal(5, 16), "m": KEPT.astype(np.float32)} for _ in range(4)]
    weights = {
        "w": normal(16, 8), "k": number(lowest), "one": number(1), "f": np.array(True),
        "r": np.where(KEPT, 0, lowest).astype(np.float32),
    }  # fmt: skip
    made = quantizer(f"{HEAD} {body} y = Softmax(u) }}", weights, feeds)
    plan, model, seen = made.fused()
    assert "MatMul_node" in plan.integer, "what multiplies stays integer"
    assert "Softmax_node" in plan.left_float
    assert not seen.unexplained
    found, wanted = run(model, feeds[0])["y"], run(made.model, feeds[0])["y"]
    assert found[~KEPT].max() == 0, "nothing leaks from where attention must not look"
    np.testing.assert_allclose(found, wanted, atol=0.05)


def test_a_mask_that_never_masked_in_calibration_still_masks() -> None:
    """Texts without padding: the mask was 0 everywhere, and its range would be a lie."""
    feeds = [{"x": normal(5, 16), "m": np.zeros((5, 8), np.float32)} for _ in range(4)]
    made = quantizer(f"{HEAD} u = Add(t, m) y = Softmax(u) }}", {"w": normal(16, 8)}, feeds)
    plan, model, _ = made.fused()
    assert plan.left_float["Add_node"] == "'m' was 0 throughout calibration: its range is unknown"
    padded = {"x": normal(5, 16), "m": np.where(KEPT, 0, -1e9).astype(np.float32)}
    assert run(model, padded)["y"][~KEPT].max() == 0


def test_ordinary_tensors_can_be_held() -> None:
    made = placed(CHAIN, WEIGHTS)
    assert unholdable(made.plan, made.stats) == {}


# --- clips -----------------------------------------------------------------------------------------------------------


@given(st.floats(0.01, 30), st.floats(0.01, 30), st.sampled_from(["cpu-x64-vnni", "cpu-arm64"]))
@settings(max_examples=12)
def test_a_clip_behind_a_convolution_always_folds(below: float, above: float, target: str) -> None:
    """A code half a step beyond a bound would keep the Clip, and the convolution float with it."""
    text = f"(float[1,8,6,6] x) => (float[1,8,6,6] y) {{ t = {POINT}(x, w, b) y = Clip(t, lo, hi) }}"
    weights = {"w": normal(8, 8, 1, 1) * 8, "b": normal(8), "lo": number(-below), "hi": number(above)}
    made = placed(text, weights, target=target)
    seen, lost = read_back(made.model, made.plan, made.shapes, made.target)
    assert (lost, seen.kernels, seen.float_nodes) == ({}, {"QLinearConv": 1}, 0)
    np.testing.assert_allclose(made.fused()["y"], made.unfused()["y"], atol=1.01 * (below + above) / 255)
    assert -below <= made.fused()["y"].min() * (1 - 1e-6)
    assert made.fused()["y"].max() * (1 - 1e-6) <= above


def test_codes_found_elsewhere_are_stored_and_their_shift_is_corrected() -> None:
    """Codes rounded down instead of to nearest: the file holds just these, and the bias takes their mean error."""
    text = f"(float[1,8,6,6] x) => (float[1,8,6,6] y) {{ y = {POINT}(x, w, b) }}"
    made = placed(text, {"w": coarse(8, 8, 1, 1), "b": normal(8)}, feeds=positive(8, 1, 8, 6, 6))
    ((edge, plain),) = made.encodings.constants.items()
    down = np.maximum(plain.codes - 1, -127)
    rounded = {edge: Coded(plain.params, down.astype(np.int32))}
    encodings = encode(made.plan, made.stats, made.target, ranges=MINMAX, rounded=rounded)
    model = insert_qdq(made.source, made.plan, encodings)
    stored = [v.const_value.numpy() for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT8]
    assert any(np.array_equal(array, down) for array in stored if array.shape == down.shape)
    np.testing.assert_allclose(shift(made, model), 0, atol=2 * float(made.encodings.activations["y"].scale))


def test_a_raised_scale_leaves_the_codes_of_other_channels_as_they_were_found() -> None:
    """And the bias makes up for the codes that are stored, not for those from before the scale was raised."""
    feeds = [{"x": np.full((1, 8, 6, 6), 1e-7 * i, np.float32)} for i in (1, 2, 3)]
    weights = {"w": normal(8, 8, 1, 1) * 1e-4, "b": np.array([0, 1, 5, 9, 1e3, 2, 2, -9], np.float32)}
    made = placed(f"(float[1,8,6,6] x) => (float[1,8,6,6] y) {{ y = {POINT}(x, w, b) }}", weights, feeds=feeds)
    ((edge, raised),) = made.encodings.constants.items()
    plain = constant_params(made.plan.atoms[0], 1, made.target)
    other = raised.params.scale != plain.scale
    assert 0 < other.sum() < 8
    nearest = quantize(weights["w"], plain)
    down = Coded(plain, np.maximum(nearest - 1, -127))
    encodings = encode(made.plan, made.stats, made.target, ranges=MINMAX, rounded={edge: down})
    found = encodings.constants[edge]
    np.testing.assert_array_equal(found.codes[~other], down.codes[~other])
    np.testing.assert_array_equal(found.codes[other], quantize(weights["w"], found.params)[other])
    ((codes, scales),) = encodings.biases.values()
    error = (dequantize(found.codes, found.params) - weights["w"])[:, :, 0, 0] @ made.stats["x"].channels.mean
    np.testing.assert_allclose(codes * scales.astype(np.float64), weights["b"] - error, rtol=1e-6, atol=1e-9)
