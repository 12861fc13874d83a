"""Equalization: exact in float, up to where a Clip cuts; kept only where the quantized outputs gain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeq import steps
from edgeq.analyse.equalizing import MARGIN, MOST, Equalization, by_weights, pairs, search
from edgeq.analyse.observe import observe
from edgeq.context import Context
from edgeq.report.recorder import Recorder
from edgeq.rewrite.equalize import equalize
from edgeq.run.samples import split
from edgeq.source import read_model
from edgeq.target.load import load_target
from edgeq.target.oracle import Oracle
from tests.graphs import graph, normal, number
from tests.placed import VNNI, oracle_of, run, samples_of

POINT, DEPTH = "Conv<kernel_shape=[1,1]>", "Conv<kernel_shape=[3,3], pads=[1,1,1,1], group=8>"
HEAD = "(float[1,3,12,12] x) => (float[1,4,12,12] y) {"
UNEVEN = np.array([1, 0.01, 0.1, 1, 0.3, 0.02, 1, 0.5], np.float32)
FORMS = {
    "dense": f"{HEAD} a = {POINT}(x, w, b) y = {POINT}(a, v) }}",
    "relu": f"{HEAD} a = {POINT}(x, w, b) r = Relu(a) y = {POINT}(r, v) }}",
    "depthwise": f"{HEAD} a = {POINT}(x, w, b) r = Relu(a) d = {DEPTH}(r, k) s = Relu(d) y = {POINT}(s, v) }}",
    "multiplier": f"{HEAD} a = {POINT}(x, w) d = {DEPTH}(a, m) y = {POINT}(d, u) }}",
    "clip": f"{HEAD} a = {POINT}(x, w, b) c = Clip(a, zero, six) y = {POINT}(c, v) }}",
    "shared weight": f"{HEAD} a = {POINT}(x, w, b) r = Relu(a) e = {POINT}(x, w, b) t = Add(r, e) y = {POINT}(t, v) }}",
}
LEFT_ALONE = {
    "read twice": f"{HEAD} a = {POINT}(x, w) r = Relu(a) p = {POINT}(r, v) q = {POINT}(r, v) y = Add(p, q) }}",
    "shown": (
        "(float[1,3,12,12] x) => (float[1,4,12,12] y, float[1,8,12,12] a) {"
        f" a = {POINT}(x, w) r = Relu(a) y = {POINT}(r, v) }}"
    ),
    "sigmoid": f"{HEAD} a = {POINT}(x, w) s = Sigmoid(a) y = {POINT}(s, v) }}",
    "clip from below 0": f"{HEAD} a = {POINT}(x, w) c = Clip(a, minus, six) y = {POINT}(c, v) }}",
}


def made(text: str) -> Any:
    weights = {
        "w": normal(8, 3, 1, 1) * UNEVEN[:, None, None, None], "b": normal(8) * UNEVEN, "v": normal(4, 8, 1, 1),
        "k": normal(8, 1, 3, 3), "m": normal(16, 1, 3, 3), "u": normal(4, 16, 1, 1),
        "zero": number(0), "six": number(6), "minus": number(-1),
    }  # fmt: skip
    return read_model(graph(text, {name: array for name, array in weights.items() if name in text}), opset=21)[0]


def found(model: Any, feeds: list[dict[str, np.ndarray]]) -> list[Equalization]:
    some = pairs(model)
    return search(some, observe(model, [pair.tensor for pair in some], samples_of(feeds), threads=1))


def feeds(count: int) -> list[dict[str, np.ndarray]]:
    return [{"x": normal(1, 3, 12, 12)} for _ in range(count)]


@pytest.mark.parametrize("name", FORMS)
def test_results_stay(name: str) -> None:
    model, data = made(FORMS[name]), feeds(3)
    chosen = found(model, data)
    assert bool(chosen) != (name == "shared weight"), "a sum between two convolutions is no pair"
    even = equalize(model, chosen)
    for feed in data:
        exact = run(model, feed)["y"]
        np.testing.assert_allclose(run(even, feed)["y"], exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("name", FORMS)
def test_weights_with_one_scale_are_evened_out_and_results_stay(name: str) -> None:
    """Nagel et al. 2019, equation 11: both of a pair have ``sqrt(r1 r2)`` as largest weight of a channel, in chains."""
    model, data = made(FORMS[name]), feeds(3)
    chosen = by_weights(model, pairs(model))
    assert bool(chosen) == (name not in ("clip", "shared weight")), "a Clip pins channels"
    even = equalize(model, chosen)
    for feed in data:
        exact = run(model, feed)["y"]
        np.testing.assert_allclose(run(even, feed)["y"], exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())
    weights = {str(node.name): node.inputs[1].const_value.numpy() for node in even.graph if node.op_type == "Conv"}
    for one in chosen:
        first, second = weights[one.pair.first], weights[one.pair.second]
        grouped = second.reshape(8, -1) if one.pair.depthwise else np.moveaxis(second, 1, 0).reshape(8, -1)
        r1, r2 = np.abs(first).reshape(8, -1).max(1), np.abs(grouped).max(1)
        np.testing.assert_allclose(r1, r2, rtol=0.01)


def test_a_pair_alone_gets_the_root_of_both() -> None:
    model = made(FORMS["relu"])
    (one,) = by_weights(model, pairs(model))
    w, v = (node.inputs[1].const_value.numpy() for node in model.graph if node.op_type == "Conv")
    r1, r2 = np.abs(w).max((1, 2, 3)), np.abs(v).max((0, 2, 3))
    np.testing.assert_allclose(one.scale, np.sqrt(r2 / r1), rtol=1e-5)


def test_channels_of_zeros_and_even_ones_stay() -> None:
    model = made(FORMS["relu"])
    value = next(node for node in model.graph if node.op_type == "Conv").inputs[1]
    w = value.const_value.numpy().copy()
    w[3] = 0
    value.const_value = ir.tensor(w)
    (one,) = by_weights(model, pairs(model))
    assert one.scale[3] == 1
    even = equalize(model, [one])
    assert by_weights(even, pairs(even)) == []


def test_a_target_that_gives_a_weight_one_scale_gains(tmp_path: Path) -> None:
    path = tmp_path / "tensor.toml"
    path.write_text(
        f'extends = "{VNNI}"\nsummary = "one scale a weight"\nverified = "documentation"\nweights = "i8/tensor"\n'
        '[sources]\nweights = "a test"\n'
    )
    target, recorder = load_target(str(path)), Recorder()
    net = "a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) y = Conv(r, v)"
    weights = {
        "w": normal(8, 16, 3, 3) * UNEVEN[:, None, None, None], "b": normal(8) * UNEVEN,
        "v": normal(4, 8, 1, 1) / UNEVEN[:, None, None],
    }  # fmt: skip
    text = f"(float[1,16,32,32] x) => (float[1,4,32,32] y) {{ {net} }}"
    model = read_model(graph(text, weights), opset=21)[0]
    data = [{"x": normal(1, 16, 32, 32)} for _ in range(16)]
    context = Context(target, Oracle(target, tmp_path), samples_of(data), recorder, threads=1)
    result = steps.equalize(model, context)
    before, after = next(step.facts["snr_db"] for step in recorder.steps if step.name == "equalize")
    assert result is not model
    assert after > before + 1


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_does_not_commute_or_is_read_elsewhere_is_no_pair(name: str) -> None:
    assert pairs(made(LEFT_ALONE[name])) == []


def test_channels_come_closer_and_never_farther_than_a_clip_allows() -> None:
    for name in ("depthwise", "clip"):
        model, data = made(FORMS[name]), feeds(4)
        chosen = found(model, data)
        for one in chosen:
            assert one.scale.min() >= 1
            assert one.scale.max() <= MOST
            before, after = (
                observe(m, [one.pair.tensor], samples_of(data), threads=1)[one.pair.tensor].channels.absmax
                for m in (model, equalize(model, chosen))
            )
            live = before > 0
            assert np.ptp(np.log(after[live])) < np.ptp(np.log(before[live]))
            if np.isfinite(one.pair.top):
                raised = one.scale > 1
                assert (after[raised & live] <= one.pair.top / MARGIN * 1.001).all()


def test_a_clip_that_would_cut_new_samples_keeps_its_channels() -> None:
    """What is learnt from is a hundredth of what judges: the Clip pair is given up."""
    model, data = made(FORMS["clip"]), feeds(16)
    context = Context(load_target(VNNI), oracle_of(VNNI), samples_of(data), Recorder(), threads=1)
    learnt, _ = split(context.calibration, fraction=steps.HELD, seed=context.seed)
    small = [feed["x"] for feed in learnt]
    for feed in data:
        feed["x"] *= 0.02 if any(feed["x"] is x for x in small) else 2.0
    assert found(model, [feed for feed in data if any(feed["x"] is x for x in small)])
    result = steps.equalize(model, context)
    assert result is model
    for feed in data:
        np.testing.assert_allclose(run(result, feed)["y"], run(model, feed)["y"], rtol=1e-4, atol=1e-3)


def test_the_step_is_kept_only_if_quantized_outputs_gain() -> None:
    model, data = made(FORMS["depthwise"]), feeds(24)
    context = Context(load_target(VNNI), oracle_of(VNNI), samples_of(data), Recorder(), threads=1)
    result = steps.equalize(model, context)
    facts = next(step.facts for step in context.recorder.steps if step.name == "equalize")
    before, after = facts["snr_db"]
    assert facts["kept"] == (result is not model)
    assert facts["kept"] == (after > before + 0.4)
    plain = made("(float[1,3,12,12] x) => (float[1,3,12,12] y) { y = Tanh(x) }")
    assert steps.equalize(plain, context) is plain
