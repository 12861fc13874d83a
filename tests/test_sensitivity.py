"""Sensitivity and layer-wise noise, against what they are defined as."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgeq.analyse.encode import encode
from edgeq.analyse.layers import layers, worst
from edgeq.analyse.place import Plan
from edgeq.analyse.sensitivity import Probe, decibel, noise_to_signal, only, sensitivity
from edgeq.rewrite.qdq import insert_qdq
from tests.graphs import normal
from tests.placed import MINMAX, Placed, placed, run

POINT = "Conv<kernel_shape=[1,1]>"
BLOCK = (
    f"(float[1,8,6,6] x) => (float[1,8,6,6] y) {{ t = {POINT}(x, w, b) r = Relu(t) m = MaxPool<kernel_shape=[1,1]>(r)"
    f" u = {POINT}(m, v, b) s = Add(u, m) y = {POINT}(s, w, b) }}"
)
WEIGHTS = {"w": normal(8, 8, 1, 1) * 0.3, "v": normal(8, 8, 1, 1) * 0.3, "b": normal(8)}


def noise_of(made: Placed) -> dict[str, float]:
    def build(plan: Plan) -> ir.Model:
        return insert_qdq(made.source, plan, encode(plan, made.stats, made.target, ranges=MINMAX))

    done: list[None] = []
    noise = sensitivity(Probe(made.source, made.feeds, made.target), made.plan, build, lambda: done.append(None))
    assert len(done) == len(noise)
    return noise


def test_each_atom_is_measured_alone() -> None:
    made = placed(BLOCK, WEIGHTS)
    noise = noise_of(made)
    assert list(noise) == [name for name in made.plan.integer if made.plan.integer[name] != ""]
    for name, value in noise.items():
        part = only(made.plan, {name})
        model = insert_qdq(made.source, part, encode(part, made.stats, made.target, ranges=MINMAX))
        wanted = [made.exact(feed)["y"].astype(np.float64) for feed in made.feeds]
        found = [run(model, feed)["y"] for feed in made.feeds]
        error = sum(np.square(w - f).sum() for w, f in zip(wanted, found, strict=True))
        assert value == pytest.approx(error / sum(np.square(w).sum() for w in wanted), rel=1e-6)
        assert 0 < value < 1e-2


def test_the_layer_with_an_outlier_is_the_loudest() -> None:
    loud = {**WEIGHTS, "v": WEIGHTS["v"].copy()}
    loud["b"] = np.array([400, 0, 0, 0, 0, 0, 0, 0], np.float32)  # Add's range is set by one channel
    noise = noise_of(placed(BLOCK.replace("(m, v, b)", "(m, v, l)"), {**WEIGHTS, "l": loud["b"]}))
    assert max(noise, key=noise.__getitem__) in ("Conv_node_2", "Add_node", "Conv_node_3")
    assert max(noise.values()) > 10 * min(noise.values())


def test_plans_of_parts_hold_only_their_edges() -> None:
    plan = placed(BLOCK, WEIGHTS).plan
    part = only(plan, {"Conv_node_2"})
    assert part.integer == {"Conv_node_2": "QLinearConv"}
    assert set(part.tensors) == {"m", "u"}
    assert only(plan, set()).tensors == {}
    assert only(plan, set(plan.integer)) == plan


def test_noise_to_signal_is_the_mean_over_float_outputs() -> None:
    wanted = [{"a": np.array([3.0, 4.0], np.float32), "i": np.array([1]), "z": np.zeros(2, np.float32)}]
    same = noise_to_signal(wanted, wanted)
    assert same == 0
    found = [{"a": np.array([3.0, 4.5], np.float32), "i": np.array([7]), "z": np.zeros(2, np.float32)}]
    assert noise_to_signal(wanted, found) == pytest.approx(0.25 / 25 / 2)
    found[0]["z"] = np.ones(2, np.float32)
    assert noise_to_signal(wanted, found) == pytest.approx((0.25 / 25 + 1) / 2), "noise on silence counts as 1"
    for bad in (np.array([np.nan, 1], np.float32), np.array([np.inf, 1], np.float32), np.zeros(3, np.float32)):
        assert noise_to_signal(wanted, [{**wanted[0], "a": bad}]) == float("inf")


def test_decibel() -> None:
    assert [decibel(value) for value in (0.0, 1e-3, 1.0, 10.0, float("inf"))] == [
        150.0,
        30.0,
        0.0,
        -10.0,
        -float("inf"),
    ]


def test_layers_are_the_snr_of_each_quantized_tensor() -> None:
    made = placed(BLOCK, WEIGHTS)
    rows = layers(made.source, made.model, made.plan, made.feeds, made.target)
    assert [(row["name"], row["op"]) for row in rows] == [
        ("x", "input"), ("r", "Relu"), ("u", "Conv"), ("s", "Add"), ("y", "Conv")
    ]  # fmt: skip
    wanted = np.stack([made.exact(feed)["y"] for feed in made.feeds]).astype(np.float64)
    found = np.stack([made.fused(feed)["y"] for feed in made.feeds])
    snr = 10 * np.log10(np.square(wanted).sum() / np.square(wanted - found).sum())
    assert rows[-1]["snr_db"] == pytest.approx(snr, abs=0.2)
    assert rows[0]["format"] == "u8/tensor/asym"
    assert all(25 < row["snr_db"] < 60 for row in rows)
    assert worst(rows, 2) == sorted(rows, key=lambda row: row["snr_db"])[:2]


def test_layers_of_a_tensor_shown_and_read_and_of_a_silent_one() -> None:
    made = placed(
        "(float[1,8,6,6] x) => (float[1,8,6,6] t, float[1,8,6,6] y) "
        f"{{ t = {POINT}(x, w, n) r = Relu(t) y = {POINT}(r, w, b) }}",
        {**WEIGHTS, "n": np.full(8, -1e3, np.float32)},
    )
    rows = {row["name"]: row["snr_db"] for row in layers(made.source, made.model, made.plan, made.feeds, made.target)}
    assert rows["t"] > 30
    assert rows.get("r") is None, "a tensor of zeros has no SNR"
    assert worst([{"snr_db": None}, {"snr_db": 3.0}], 5) == [{"snr_db": 3.0}]
