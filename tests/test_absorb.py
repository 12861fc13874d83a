"""Absorption: exact in float, but for what a Relu cuts; kept only where the quantized outputs gain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq import steps
from edgeq.analyse.absorbing import movable, search, unbounded
from edgeq.analyse.observe import observe
from edgeq.context import Context
from edgeq.report.recorder import Recorder
from edgeq.rewrite.absorb import absorb
from edgeq.source import read_model
from edgeq.target.load import load_target
from edgeq.target.oracle import Oracle
from tests.graphs import graph, normal
from tests.placed import VNNI, run, samples_of

POINT = "Conv<kernel_shape=[1,1]>"
HEAD = "(float[1,3,9,9] x) => (float[1,4,9,9] y) {"
OFFSETS = np.array([9, -7, 0, 4, -3, 8, -9, 2], np.float32)
FORMS = {
    "straight": f"{HEAD} a = {POINT}(x, w, b) y = {POINT}(a, v) }}",
    "no bias behind": f"{HEAD} a = {POINT}(x, w, b) y = {POINT}(a, v, c) }}",
    "relu": f"{HEAD} a = {POINT}(x, w, high) r = Relu(a) y = {POINT}(r, v) }}",
    "groups behind": f"{HEAD} a = {POINT}(x, w, b) y = Conv<kernel_shape=[1,1], group=2>(a, g) }}",
    "smaller behind": (
        f"(float[1,3,9,9] x) => (float[1,4,7,7] y) {{ a = {POINT}(x, w, b) y = Conv<kernel_shape=[3,3]>(a, k) }}"
    ),
    "stream": (
        f"{HEAD} a = {POINT}(x, w, b) p = {POINT}(a, s) q = {POINT}(p, s, b) t = Add(a, q) u = {POINT}(t, s, b)"
        f" z = Add(t, u) y = {POINT}(z, v) }}"
    ),
}
LEFT_ALONE = {
    "padded": f"{HEAD} a = {POINT}(x, w, b) y = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(a, k) }}",
    "shown": f"(float[1,3,9,9] x) => (float[1,4,9,9] y, float[1,8,9,9] a) {{ a = {POINT}(x, w, b) y = {POINT}(a, v) }}",
    "sigmoid": f"{HEAD} a = {POINT}(x, w, b) r = Sigmoid(a) y = {POINT}(r, v) }}",
    "sum with what can't move": (
        f"{HEAD} a = {POINT}(x, w, b) q = {POINT}(x, w) h = Sigmoid(q) t = Add(a, h) y = {POINT}(t, v) }}"
    ),
    "depthwise": (
        f"{HEAD} a = {POINT}(x, w) r = Tanh(a) d = Conv<kernel_shape=[1,1], group=8>(r, m) y = {POINT}(d, v) }}"
    ),
}


def made(text: str) -> Any:
    weights = {
        "w": normal(8, 3, 1, 1) * np.float32(0.3), "b": OFFSETS, "high": np.abs(OFFSETS) + np.float32(3),
        "v": normal(4, 8, 1, 1), "c": normal(4), "g": normal(4, 4, 1, 1), "k": normal(4, 8, 3, 3),
        "s": normal(8, 8, 1, 1) * np.float32(0.2), "m": normal(8, 1, 1, 1),
    }  # fmt: skip
    used = {name: array for name, array in weights.items() if any(f"{name}{end}" in text for end in (",", ")"))}
    return read_model(graph(text, used), opset=21)[0]


def feeds(count: int) -> list[dict[str, np.ndarray]]:
    return [{"x": normal(1, 3, 9, 9)} for _ in range(count)]


def found(model: Any, data: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    some = movable(model)
    return search(model, some, observe(model, list(some), samples_of(data), threads=1))


@pytest.mark.parametrize("name", FORMS)
def test_results_stay(name: str) -> None:
    model, data = made(FORMS[name]), feeds(4)
    shifts = found(model, data)
    assert shifts
    moved = absorb(model, shifts)
    for feed in data:
        exact = run(model, feed)["y"]
        np.testing.assert_allclose(run(moved, feed)["y"], exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_cannot_take_it_up_is_left_alone(name: str) -> None:
    assert movable(made(LEFT_ALONE[name])) == {}


def test_ranges_shrink_everywhere() -> None:
    model, data = made(FORMS["stream"]), feeds(6)
    shifts = found(model, data)
    assert set(shifts) == {"a", "p", "q", "t", "u", "z"}
    before, after = (observe(m, list(shifts), samples_of(data), threads=1) for m in (model, absorb(model, shifts)))
    for name in ("a", "q", "t", "u", "z"):
        assert after[name].max - after[name].min < before[name].max - before[name].min
        np.testing.assert_allclose(after[name].channels.mean, 0, atol=1e-4)


def test_a_relu_moves_by_what_was_always_there() -> None:
    model, data = made(FORMS["relu"]), feeds(6)
    shifts = found(model, data)
    low = observe(model, ["r"], samples_of(data), threads=1)["r"].channels.low
    assert (shifts["r"] >= 0).all()
    assert (shifts["r"] <= low).all()
    assert shifts["r"].max() > 1
    assert unbounded(movable(model)) == {}
    reaching = found(made(FORMS["relu"].replace("high", "b")), data)["r"]
    assert (reaching[OFFSETS <= 0] == 0).all()


@pytest.mark.parametrize(
    ("behind", "bias"), [("y = Conv(a, v)", OFFSETS), ("r = Relu(a) y = Conv(r, v)", 4 + np.abs(OFFSETS))]
)
def test_step_gains_where_channels_lie_apart(behind: str, bias: np.ndarray, tmp_path: Path) -> None:
    net = f"a = Conv<pads=[1,1,1,1]>(x, w, b) {behind}"
    weights = {"w": normal(8, 16, 3, 3) / np.float32(24), "b": np.float32(bias), "v": normal(4, 8, 1, 1)}
    model = read_model(graph(f"(float[1,16,32,32] x) => (float[1,4,32,32] y) {{ {net} }}", weights), opset=21)[0]
    data = [{"x": normal(1, 16, 32, 32)} for _ in range(16)]
    target, recorder = load_target(VNNI), Recorder()
    context = Context(target, Oracle(target, tmp_path), samples_of(data), recorder, threads=1)
    result = steps.absorb(model, context)
    facts = next(step.facts for step in recorder.steps if step.name == "absorb")
    assert facts["kept"]
    assert result is not model
    assert facts["snr_db"][1] > facts["snr_db"][0] + 1


def test_step_leaves_a_model_with_nothing_to_move(tmp_path: Path) -> None:
    target = load_target(VNNI)
    model = made(LEFT_ALONE["padded"])
    context = Context(target, Oracle(target, tmp_path), samples_of(feeds(4)), Recorder())
    assert steps.absorb(model, context) is model
