"""Functions computed on codes: every code compared, and what doesn't fit is left."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgeq.analyse.aligned import GATE_STEPS, aligned
from edgeq.analyse.coverage import optimised
from edgeq.analyse.place import find_atoms, free_costs, place
from edgeq.context import Context
from edgeq.lower.fuse import fuse
from edgeq.num.quant import QParams, parse_quant
from edgeq.quantizer import Quantizer
from edgeq.report.recorder import Recorder
from edgeq.run.session import open_session, run_session
from edgeq.source import read_model
from edgeq.target.load import load_target
from tests.graphs import Arrays, graph, normal, number, ops
from tests.placed import VNNI, all_integer, oracle_of, samples_of

TARGET = load_target("cpu-x64-vnni")
U8 = parse_quant("u8/tensor/asym")
BETWEEN = """(uint8[1,2,8,16] c) => (uint8[1,2,H,W] o) {{
    d = DequantizeLinear(c, s, z) {} o = QuantizeLinear(h, t, y) }}"""
OUT = {"t": number(0.04), "y": np.array(12, np.uint8)}


def between(function: str, scale: float, zero: int, **weights: np.ndarray) -> tuple[Arrays, Arrays]:
    """(codes as written, codes as fused) of ``Q(function(DQ(c)))`` for all 256 codes c, by the float kernels and as the
    runtime runs it."""
    text = BETWEEN.format(function)
    model = graph(text, {"s": number(scale), "z": np.array(zero, np.uint8), **OUT, **weights})
    result, changes = fuse(model, TARGET)
    assert changes and not changes[0].rolled_back, "nothing was fused"
    feed = {"c": np.arange(256, dtype=np.uint8).reshape(1, 2, 8, 16)}
    assert not {"HardSwish", "HardSigmoid", "DequantizeLinear", "Relu"} & set(ops(optimised(result, TARGET)))
    return run_session(open_session(model, level="none"), feed), run_session(open_session(result), feed)


@pytest.mark.parametrize("alpha", [1 / 6, 0.2])
def test_hard_sigmoid_is_a_clip_of_all_codes(alpha: float) -> None:
    gate = {"t": number(1 / GATE_STEPS), "y": np.array(0, np.uint8)}
    written, found = between(f"h = HardSigmoid<alpha={alpha:.9f},beta=0.5>(d)", 1 / (alpha * GATE_STEPS), 127, **gate)
    np.testing.assert_array_equal(found["o"], written["o"])
    np.testing.assert_array_equal(found["o"].ravel(), np.minimum(np.arange(256), GATE_STEPS))


@pytest.mark.parametrize(("function", "weights"), [
    ("h = Relu(d)", {}), ("h = Clip(d, low, high)", {"low": number(-0.4), "high": number(1.2)})
])  # fmt: skip
def test_bounds_are_a_clip_of_all_codes(function: str, weights: Arrays) -> None:
    written, found = between(function, 0.04, 12, **weights)
    np.testing.assert_array_equal(found["o"], written["o"])


@given(st.integers(1, 120), st.integers(0, 255))
@example(30, 30)
@settings(max_examples=40)
def test_hard_swish_is_a_product_of_codes(steps: int, zero: int) -> None:
    """Every code is right, but for ties that float32 breaks either way."""
    if zero < steps:
        return
    written, found = between("h = HardSwish(d)", 3 / steps, zero)
    assert np.abs(found["o"].astype(int) - written["o"]).max() <= 1
    x = (np.arange(256) - zero) * (3 / steps)
    code = x * np.clip(x / 6 + 0.5, 0, 1) / 0.04 + 12
    tie = np.abs(code - np.floor(code) - 0.5) < 1e-3
    assert not np.any((found["o"] != written["o"]).ravel() & ~tie)


def test_padding_takes_the_zero_point() -> None:
    written, found = between("h = Pad(d, p)", 0.04, 12, p=np.array([0, 0, 1, 2, 0, 1, 0, 3]))
    np.testing.assert_array_equal(found["o"], written["o"])


LEFT = [
    ("h = HardSwish(d)", 0.0777, 120),  # 38.6 steps to the corner
    ("h = HardSwish(d)", 0.05, 20),  # the lower corner is below the range
    ("h = HardSigmoid<alpha=0.2,beta=0.5>(d)", 0.05, 120),  # a slope in codes
    ("h = Relu(d)", 0.05, 120),  # another scale behind it
    ("h = Pad(d, p)", 0.05, 120),
    ("h = Pad<mode=\"edge\">(d, p)", 0.04, 12),
    ("h = Pad(d, p, one)", 0.04, 12),
]  # fmt: skip


@pytest.mark.parametrize(("function", "scale", "zero"), LEFT)
def test_what_is_no_clip_of_codes_stays(function: str, scale: float, zero: int) -> None:
    text = BETWEEN.format(function)
    weights = {"s": number(scale), "z": np.array(zero, np.uint8), **OUT, "p": np.array([0, 0, 1, 2, 0, 1, 0, 3])}
    model = graph(text, {**weights, "one": number(1)})
    assert fuse(model, TARGET)[0] is model


@given(st.floats(0.01, 2.0), st.integers(0, 255))
def test_aligned_scales_grow_by_less_than_a_step(scale: float, zero: int) -> None:
    """3 is a whole number of steps, -3 in range, and no value of the old range is lost by more than rounding."""
    model = graph("(float[1,2,4,4] x) => (float[1,2,4,4] y) { y = HardSwish(x) }")
    atoms = find_atoms(model, TARGET, oracle_of(VNNI))
    plan = place(atoms, TARGET, free_costs(atoms))
    assert not plan.integer, "alone it multiplies nothing by weights"
    plan = replace(plan, integer={atom.name: "QLinearMul" for atom in atoms})
    before = QParams(U8, np.array(scale, np.float32), np.array(zero, np.int32))
    (after,) = aligned(plan, {"x": before, "y": before}).values()
    steps = 3 / float(after.scale)
    assert abs(steps - round(steps)) < 1e-4 and int(after.zero_point) >= round(steps)
    low, high = ((code - zero) * scale for code in (0, 255))
    assert (0 - int(after.zero_point)) * after.scale <= low + after.scale
    assert (255 - int(after.zero_point)) * after.scale >= high - 1.01 * after.scale - max(0.0, 3 + low)


def test_a_squeeze_and_excitation_block_runs_on_codes_alone() -> None:
    """Conv, HardSwish, pooled gate: what MobileNetV3 is made of has no float node between its products."""
    model = graph("""(float[1,8,12,12] x) => (float[1,8,12,12] y) {
        c = Conv(x, w) h = HardSwish(c) p = GlobalAveragePool(h) a = Conv(p, v) r = Relu(a) b = Conv(r, u)
        g = HardSigmoid<alpha=0.2,beta=0.5>(b) m = Mul(h, g) y = Conv(m, w) }""",
        {"w": normal(8, 8, 1, 1), "v": normal(4, 8, 1, 1), "u": normal(8, 4, 1, 1)})  # fmt: skip
    model, _ = read_model(model, opset=21)  # gives names
    feeds = [{"x": normal(1, 8, 12, 12)} for _ in range(8)]
    quantizer = Quantizer(model, Context(TARGET, oracle_of(VNNI), samples_of(feeds), Recorder(), threads=1), "minmax")
    quantizer.costs = all_integer(quantizer.atoms)
    _, quantized, seen = quantizer.fused()
    assert seen.float_nodes == 0 and seen.kernels["Clip"] == 2
    exact = run_session(open_session(model), feeds[0])["y"]
    found = run_session(open_session(fuse(quantized, TARGET, feeds=feeds[:2])[0]), feeds[0])["y"]
    assert np.square(found - exact).mean() < 1e-2 * np.square(exact).mean()
