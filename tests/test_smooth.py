"""Smoothing: chosen where outlier channels hurt, exact in float, and a gain once quantized."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq import steps
from edgeq.analyse.smoothing import LEAST_GAIN_DB, Smoothing, groups, search
from edgeq.context import Context
from edgeq.ir import io, verify
from edgeq.report.recorder import Recorder
from edgeq.rewrite.smooth import smooth
from edgeq.source import read_model
from edgeq.target.load import load_target
from tests.graphs import graph, normal, ops, random_feed
from tests.placed import VNNI, all_integer, oracle_of, placed, run, samples_of

TARGET = load_target(VNNI)
OUTLIER = np.array([80, *[1] * 15], np.float32)  # one channel 80 times the others, as behind a LayerNormalization
WEIGHTS = {"g": OUTLIER, "o": normal(16) * OUTLIER, "q": normal(16, 8), "k": normal(16, 8), "v": normal(8, 8)}
NORM = "(float[1,6,16] x) => (float[1,6,8] y) { n = LayerNormalization(x, g, o)"
BLOCKS = {
    "folded": f"{NORM} a = MatMul(n, q) b = MatMul(n, k) y = Add(a, b) }}",
    "also read": NORM.replace("=> (", "=> (float[1,6,16] z, ") + " a = MatMul(n, q) y = Relu(a) z = Tanh(n) }",
    "shown": NORM.replace("=> (", "=> (float[1,6,16] n, ") + " a = MatMul(n, q) y = Relu(a) }",
    "no norm": "(float[1,6,16] x) => (float[1,6,8] y) { n = Mul(x, g) a = MatMul(n, q) y = Relu(a) }",
    "no bias": "(float[1,6,16] x) => (float[1,6,8] y) { n = LayerNormalization(x, g) a = MatMul(n, q) y = Relu(a) }",
    "shared weight": f"{NORM} m = Tanh(n) a = MatMul(n, q) b = MatMul(m, q) y = Add(a, b) }}",
    "shared norm": (f"{NORM} e = LayerNormalization(n, g, o) a = MatMul(n, q) b = MatMul(e, k) y = Add(a, b) }}"),
}


def made(name: str) -> Any:
    return read_model(graph(BLOCKS[name], WEIGHTS), opset=21)[0]


def feeds_of(model: Any) -> list[dict[str, Any]]:
    return [random_feed(model) for _ in range(4)]


@pytest.mark.parametrize("name", BLOCKS)
def test_results_stay_and_quantization_gains(name: str) -> None:
    model = made(name)
    feeds = feeds_of(model)
    before = io.digest(model)
    found = search(model, samples_of(feeds), TARGET)
    assert "n" in {smoothing.tensor for smoothing in found}
    result = smooth(model, found)
    verify.verify(result, "smoothing")
    assert io.digest(model) == before
    for output, wanted in run(model, feeds[0]).items():
        np.testing.assert_allclose(run(result, feeds[0])[output], wanted, rtol=2e-4, atol=2e-4 * np.abs(wanted).max())
    errors = []
    added = {node.name for node in result.graph} - {node.name for node in model.graph}
    for version in (model, result):
        quantized = placed(
            version, feeds=feeds, keep_float=dict.fromkeys(map(str, added), "before rounding, not after")
        )
        errors.append(sum(np.square(quantized.exact(f)["y"] - quantized.fused(f)["y"]).mean() for f in feeds))
    assert errors[1] < errors[0]
    for smoothing in found:
        assert smoothing.after_db >= smoothing.before_db + LEAST_GAIN_DB
        assert smoothing.scale.shape == (16,)


def test_where_the_division_goes() -> None:
    for name, multiplied in {"folded": 0, "no bias": 0, "also read": 1, "shown": 1, "no norm": 1}.items():
        model = made(name)
        result = smooth(model, search(model, samples_of(feeds_of(model)), TARGET))
        assert ops(result).count("Mul") == multiplied, name


def test_even_channels_and_inputs_are_left_alone() -> None:
    signs = "(float[5,16] x) => (float[5,8] y) { n = Sign(x) y = MatMul(n, q) }"
    even = read_model(graph(signs, {"q": np.sign(normal(16, 8))}), opset=21)[0]
    assert list(groups(even)) == ["n"]
    assert search(even, samples_of(feeds_of(even)), TARGET) == [], "nothing is rounded, nothing to gain"
    direct = read_model(graph("(float[5,16] x) => (float[5,8] y) { y = MatMul(x, q) }", WEIGHTS), opset=21)[0]
    assert list(groups(direct)) == ["x"]
    assert search(direct, samples_of(feeds_of(direct)), TARGET) == []


def test_the_step_keeps_its_multiplications_float() -> None:
    """In 8 bits they would round the outliers' neighbours away before evening them out."""
    model = made("also read")
    context = Context(TARGET, oracle_of(VNNI), samples_of(feeds_of(model)), Recorder())
    result = steps.smooth(model, context)
    assert set(context.keep_float) == {"n_smoothed_Mul"} <= {node.name for node in result.graph}
    made_quantizer = steps.quantize(result, context, ranges="minmax")
    made_quantizer.costs = all_integer(made_quantizer.atoms)
    plan, _, _ = made_quantizer.fused()
    assert plan.left_float["n_smoothed_Mul"] == "it evens out channels before they are rounded, not after"
    assert "MatMul_node" in plan.integer


def test_products_of_activations_and_constants_first_are_no_group() -> None:
    text = "(float[6,16] x, float[16,4] z) => (float[6,4] y, float[8,4] u) { y = MatMul(x, z) u = MatMul(w, z) }"
    assert groups(read_model(graph(text, {"w": normal(8, 16)}), opset=21)[0]) == {}


def test_padding_is_not_what_decides() -> None:
    """Rows the attention mask calls padding hold anything; their outliers must not set a channel's peak."""
    text = "(float[1,6,16] x, int64[1,6] attention_mask) => (float[1,6,8] y) { s = Mul(x, g) y = MatMul(s, q) }"
    model = read_model(graph(text, {"q": normal(16, 8), "g": OUTLIER}), opset=21)[0]
    mask = np.array([[1, 1, 1, 0, 0, 0]])
    quiet = [{"x": normal(1, 6, 16), "attention_mask": mask} for _ in range(4)]
    loud = [{**feed, "x": np.where(mask[..., None] == 1, feed["x"], 1e4).astype(np.float32)} for feed in quiet]
    (one,), (other,) = (search(model, samples_of(feeds), TARGET) for feeds in (quiet, loud))
    np.testing.assert_array_equal(one.scale, other.scale)


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3), st.booleans())
@settings(max_examples=15)
def test_any_positive_scale_is_exact(seed: int, spread: float, shown: bool) -> None:
    model = made("shown" if shown else "folded")
    scale = np.exp(np.random.default_rng(seed).uniform(-1, 1, 16) * abs(np.log(spread))).astype(np.float32)
    readers = tuple(str(node.name) for node in groups(model)["n"])
    result = smooth(model, [Smoothing("n", readers, scale, 0.5, 0.0, 0.0)])
    feed = random_feed(model)
    wanted = run(model, feed)["y"]
    np.testing.assert_allclose(run(result, feed)["y"], wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


def test_halves_stay_halves() -> None:
    """float16 models: what is multiplied in must be float16 too."""
    text = "(float16[1,6,16] x) => (float16[1,6,8] y) { n = Tanh(x) y = MatMul(n, q) }"
    model = read_model(graph(text, {"q": normal(16, 8).astype(np.float16)}), opset=21)[0]
    scale = np.linspace(0.5, 2, 16, dtype=np.float32)
    result = smooth(model, [Smoothing("n", ("MatMul_node",), scale, 0.5, 0.0, 0.0)])
    feed = random_feed(model)
    np.testing.assert_allclose(run(result, feed)["y"], run(model, feed)["y"], rtol=2e-2, atol=2e-2)


LARGE = {"w": normal(256, 256)}  # large enough that passes over the rows pay
ROWS = "(float[1,32,256] x) => (float[1,32,256] y) { n = Tanh(x) m = Mul(n, e) y = MatMul(m, w) }"


def massive(rows: slice) -> Any:
    """Rows of ``rows`` are 1000 times the others, as the first token's often are behind a gated product."""
    even = np.ones((1, 32, 1), np.float32)
    even[:, rows] = 1000.0
    return read_model(graph(ROWS, {**LARGE, "e": even}), opset=21)[0]


def test_rows_of_massive_activations_get_a_range_each() -> None:
    model = massive(slice(0, 1))
    feeds = feeds_of(model)
    (found,) = search(model, samples_of(feeds), TARGET)
    assert found.rows and found.after_db > found.before_db + 20
    result = smooth(model, [found])
    verify.verify(result, "smoothing")
    wanted = run(model, feeds[0])["y"]
    np.testing.assert_allclose(run(result, feeds[0])["y"], wanted, rtol=1e-3, atol=1e-3)
    added = {str(node.name) for node in result.graph} - {str(node.name) for node in model.graph}
    quantized = placed(result, feeds=feeds, keep_float=dict.fromkeys(added, "before rounding, not after"))
    assert "MatMul_node" in quantized.plan.integer
    error = np.square(quantized.fused(feeds[0])["y"] - wanted).sum(-1) / np.square(wanted).sum(-1)
    assert -10 * np.log10(error.max()) > 30, "ordinary rows too"


def test_rows_stay_where_the_noise_is_not_heard() -> None:
    """One product of even rows leaves 40 dB; passes over its rows would buy nothing that shows."""
    model = massive(slice(0, 0))
    assert not any(one.rows for one in search(model, samples_of(feeds_of(model)), TARGET))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_empty_rows_stay_empty(dtype: type[np.generic]) -> None:
    word = np.dtype(dtype).name.replace("float32", "float")
    text = f"({word}[1,6,16] x) => ({word}[1,6,8] y) {{ n = Relu(x) y = MatMul(n, q) }}"
    model = read_model(graph(text, {"q": normal(16, 8).astype(dtype)}), opset=21)[0]
    result = smooth(model, [Smoothing("n", ("MatMul_node",), np.ones(16, np.float32), 0.0, 0.0, 0.0, rows=True)])
    x = normal(1, 6, 16).astype(dtype)
    x[:, 2] = -1
    found, wanted = run(result, {"x": x})["y"], run(model, {"x": x})["y"]
    assert (found[:, 2] == 0).all()
    np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=2e-2 if dtype == np.float16 else 1e-5)
