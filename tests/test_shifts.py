"""Biases corrected layer by layer: what a shift is, that layers get theirs in turn, that new samples gain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq import steps
from edgeq.analyse.encode import Encodings
from edgeq.analyse.shifts import corrected, layers_of
from edgeq.context import Context
from edgeq.num.shifts import TRIM, shift
from edgeq.report.recorder import Recorder
from edgeq.rewrite.qdq import insert_qdq
from edgeq.source import read_model
from edgeq.target.load import load_target
from tests.graphs import graph, normal, number
from tests.placed import VNNI, Placed, all_integer, oracle_of, placed, run, samples_of
from tests.test_sensitivity import job_of

F32 = np.float32


def plain(errors: list[np.ndarray]) -> np.ndarray:
    """``shift``, a channel after the other, as its docstring says it."""
    found = []
    for channel in range(errors[0].shape[1]):
        columns = [one[:, channel][~np.isnan(one[:, channel])].astype(np.float64) for one in errors]
        every = np.sort(np.concatenate(columns))
        out = int(TRIM * len(every))
        low, high = every[out], every[len(every) - 1 - out]
        kept = [column[(column >= low) & (column <= high)] for column in columns]
        mean = np.concatenate(kept).mean()
        means = np.array([column.mean() for column in kept if len(column)])
        variance = np.square(means - mean).sum() / (len(means) - 1) / len(means)
        found.append(mean * max(0.0, 1 - variance / mean**2))
    return np.array(found)


@given(st.integers(0, 2**31))
@settings(max_examples=25)
def test_a_shift_is_the_trimmed_mean_shrunk_by_its_standard_error(seed: int) -> None:
    draw = np.random.default_rng(seed)
    level = draw.normal(0, 1, 5)
    errors = [(level + draw.normal(0, 1, (int(draw.integers(5, 40)), 5))).astype(F32) for _ in range(6)]
    for one in errors:
        one[draw.random(one.shape) < 0.2] = np.nan
    np.testing.assert_allclose(shift(errors), plain(errors), rtol=1e-3, atol=1e-5)


def test_rare_large_errors_and_what_samples_disagree_on_shift_nothing() -> None:
    draw = np.random.default_rng(0)
    errors = [draw.normal(0.5, 0.01, (50, 4)).astype(F32) for _ in range(20)]
    for index, one in enumerate(errors):
        one[:2, 1] = 100  # a few positions of each sample
        one[:, 2] = (-1) ** index * 0.5  # as often one way as the other
        one[1:, 3] = np.nan  # hardly ever counted ...
        if index:
            one[:, 3] = np.nan  # ... and by one sample alone
    found = shift(errors)
    np.testing.assert_allclose(found[:2], 0.5, rtol=0.01)
    np.testing.assert_array_equal(found[2:], 0)


POINT, DEPTH = "Conv<kernel_shape=[1,1]>", "Conv<kernel_shape=[3,3], pads=[1,1,1,1], group=8>"
NETS = {
    "Conv": (
        f"(float[1,8,6,6] x) => (float[1,8,6,6] y) {{ t = {POINT}(x, w, b) r = Relu(t) d = {DEPTH}(r, k, b)"
        f" c = Clip(d, zero, two) u = {POINT}(c, v, b) s = Add(u, r) y = {POINT}(s, w, b) }}"
    ),
    "Gemm": "(float[9,8] x) => (float[9,8] y) { t = Gemm(x, m, b) r = Relu(t) y = Gemm<transB=1>(r, n, b) }",
}
WEIGHTS = {
    "w": normal(8, 8, 1, 1) * 0.5, "v": normal(8, 8, 1, 1) * 0.5, "k": normal(8, 1, 3, 3) * 0.5, "b": normal(8),
    "m": normal(8, 8), "n": normal(8, 8), "zero": number(0), "two": number(2),
}  # fmt: skip


def made(name: str, count: int = 8) -> Placed:
    text = NETS[name]
    shape = (1, 8, 6, 6) if name == "Conv" else (9, 8)
    weights = {key: array for key, array in WEIGHTS.items() if f" {key}" in text}
    return placed(text, weights, feeds=[{"x": normal(*shape)} for _ in range(count)])


def spoilt(encodings: Encodings, amount: float) -> Encodings:
    """Every bias off by ``amount``."""
    biases = {
        edge: ((codes + np.rint(amount / scales)).astype(np.int32), scales)
        for edge, (codes, scales) in encodings.biases.items()
    }
    return replace(encodings, biases=biases)


def tapped(model: Any, names: list[str]) -> Any:
    clone = model.clone()
    values = {str(value.name): value for node in clone.graph for value in node.outputs}
    clone.graph.outputs[:] = [values[name] for name in names]
    return clone


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("name", NETS)
def test_layers_get_back_their_level_in_turn(name: str, count: int) -> None:
    """Biases spoilt by a known amount: in the whole Q/DQ model, each node run as ONNX defines it, no layer is off by
    more than a tenth of that any more, where its activation passes values on, and nearly all noise is gone."""
    net = made(name, 24)
    bad = spoilt(net.encodings, 0.3)
    job = replace(job_of(net, count), encodings=bad)
    layers, done = layers_of(job), list[None]()
    found = corrected(job, lambda: done.append(None))
    assert len(done) == len(layers) == len(net.encodings.biases) > 1
    taps = [layer.tap for layer in layers]
    models = [insert_qdq(net.source, net.plan, encodings) for encodings in (net.encodings, bad, found)]
    exact = [run(tapped(net.source, taps), feed) for feed in net.feeds]
    for layer in layers:
        offs = []
        for model in models:
            runs = [run(tapped(model, taps), feed, level="none")[layer.tap] for feed in net.feeds]
            passed = [(one > layer.low) & (one < layer.high) for one in runs]
            errors = [
                (np.clip(want[layer.tap], layer.low, layer.high) - one)[here]
                for want, one, here in zip(exact, runs, passed, strict=True)
            ]
            offs.append(abs(np.concatenate(errors).mean()))
        assert offs[2] < 0.03 < 0.15 < offs[1], (layer.tap, offs)
    noise = [sum(np.square(run(model, f)["y"] - net.exact(f)["y"]).mean() for f in net.feeds) for model in models]
    assert noise[2] < 2 * noise[0] < noise[1]


def test_a_bias_that_would_leave_its_codes_stays() -> None:
    net = made("Gemm")
    edge, (codes, scales) = next(iter(net.encodings.biases.items()))
    full = replace(
        net.encodings,
        biases={**net.encodings.biases, edge: (np.full_like(codes, 2**31 - 2**19), scales)},
    )
    found = corrected(replace(job_of(net), encodings=full)).biases[edge][0]
    assert np.abs(found.astype(np.int64)).max() <= 2**31 - 2**19
    assert (found != full.biases[edge][0]).any(), "what is far too large comes down"


def quantizer_of(net: Placed, **options: str) -> tuple[Any, Recorder]:
    recorder = Recorder()
    context = Context(load_target(VNNI), oracle_of(VNNI), samples_of(net.feeds), recorder, threads=1)
    quantizer = steps.quantize(net.source, context, ranges="minmax", **options)
    quantizer.costs = all_integer(quantizer.atoms)
    return quantizer, recorder


def test_corrections_are_kept_only_if_samples_not_learnt_from_gain() -> None:
    net = made("Conv", 24)
    plain_model = quantizer_of(net)[0].fused()[1]
    quantizer, recorder = quantizer_of(net, bias="sequential")
    model = quantizer.fused()[1]
    facts = next(step.facts for step in recorder.steps if step.name == "correct biases")
    before, after = facts["snr_db"]
    assert facts["biases"] == 4
    same = all(np.array_equal(run(model, feed)["y"], run(plain_model, feed)["y"]) for feed in net.feeds)
    assert facts["kept"] == (not same)
    assert after > before + 0.1 or not facts["kept"]
    quantizer.stats.clear()
    quantizer.context.calibration = samples_of(net.feeds[:1])
    assert quantizer.fused()[0].integer, "one sample teaches nothing, and nothing breaks"


def test_means_shifted_by_clipping_are_brought_back() -> None:
    """Ranges that cut a quarter of a tensor's values shift what is made of it; the step takes that off the outputs."""
    text = f"(float[1,8,6,6] x) => (float[1,8,6,6] y) {{ e = Exp(x) t = {POINT}(e, w, b) y = {POINT}(t, v, b) }}"
    weights = {"w": abs(WEIGHTS["w"]), "v": abs(WEIGHTS["v"]), "b": WEIGHTS["b"]}
    model = read_model(graph(text, weights), opset=21)[0]
    net = placed(model, feeds=[{"x": normal(1, 8, 6, 6)} for _ in range(32)])
    quantizer, recorder = quantizer_of(net, bias="sequential")
    quantizer.fused()
    quantizer.stats["e"].max = 2.0
    quantizer.fused()
    facts = [step.facts for step in recorder.steps if step.name == "correct biases"][-1]
    assert facts["kept"]
    assert facts["snr_db"][1] > facts["snr_db"][0] + 0.5
