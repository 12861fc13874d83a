"""Joins of unlike ranges in front of the outputs stay float, others don't; so do sums with masks in any form."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgeq import steps
from edgeq.analyse import heads
from edgeq.analyse.encode import unholdable
from edgeq.analyse.place import Plan
from edgeq.analyse.sensitivity import decibel, noise_to_signal
from edgeq.context import Context
from edgeq.quantizer import Quantizer
from edgeq.report.recorder import Recorder
from edgeq.run.record import Feed
from edgeq.source import read_model
from edgeq.target.load import load_target
from tests.graphs import graph, normal, random_feed
from tests.placed import VNNI, all_integer, oracle_of, placed, run, samples_of
from tests.zoo import ZOO
from tests.zoo.packages import data, float_model

POINT = "Conv<kernel_shape=[1,1]>"
# Boxes in pixels beside scores of classes, decoded as YOLO's exporters do: distances to a grid times a stride.
HEAD = (
    f"(float[1,16,8,8] x) => (float[1,12,64] y) {{ f = {POINT}(x, w, b) r = Relu(f)"
    f" d = {POINT}(r, wd, bd) c = {POINT}(r, wc, bc) dr = Reshape(d, four) cr = Reshape(c, eight)"
    " g = Add(dr, grid) p = Mul(g, stride) s = Sigmoid(cr) y = Concat<axis=1>(p, s) }"
)
GRID = np.stack([np.tile(np.arange(8), 8), np.repeat(np.arange(8), 8)] * 2).astype(np.float32)[None]
WEIGHTS = {
    "w": normal(16, 16, 1, 1) * 0.3, "b": normal(16), "wd": normal(4, 16, 1, 1) * 0.1, "bd": normal(4) * 0.1,
    "wc": normal(8, 16, 1, 1) * 0.3, "bc": normal(8), "four": np.array([1, 4, 64]), "eight": np.array([1, 8, 64]),
    "grid": GRID, "stride": np.array(32, np.float32),
}  # fmt: skip


def quantizer_of(model: ir.Model, feeds: list[Feed]) -> Quantizer:
    """Quantizes all that has an integer kernel."""
    context = Context(load_target(VNNI), oracle_of(VNNI), samples_of(feeds), Recorder(), threads=1)
    quantizer = steps.quantize(model, context, ranges="minmax")
    quantizer.costs = all_integer(quantizer.atoms)
    return quantizer


def parts_db(model: ir.Model, quantizer: Quantizer, feeds: list[Feed], axis: int, narrow: slice) -> tuple[float, float]:
    """SNR in dB of the whole output, and of the part of it that lies in ``narrow`` on ``axis``."""
    _, quantized, _ = quantizer.fused()
    target = quantizer.context.target
    wanted, found = ([run(m, feed, config=target.session) for feed in feeds] for m in (model, quantized))
    cut = (slice(None),) * axis + (narrow,)
    (name,) = wanted[0]
    parts = [[{name: outputs[name][cut]} for outputs in runs] for runs in (wanted, found)]
    return decibel(noise_to_signal(wanted, found)), decibel(noise_to_signal(parts[0], parts[1]))


def with_and_without(
    model: ir.Model, feeds: list[Feed], axis: int, narrow: slice, monkeypatch: pytest.MonkeyPatch
) -> tuple[tuple[float, float], tuple[float, float], Quantizer]:
    """``parts_db`` with joins kept float and without, and the first's quantizer."""
    doctor = quantizer_of(model, feeds)
    better = parts_db(model, doctor, feeds, axis, narrow)
    monkeypatch.setattr(heads, "crowded", lambda *_: {})
    return better, parts_db(model, quantizer_of(model, feeds), feeds, axis, narrow), doctor


def test_scores_joined_with_boxes_keep_their_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = read_model(graph(HEAD, WEIGHTS), opset=21)
    feeds = [random_feed(model) for _ in range(8)]
    better, worse, doctor = with_and_without(model, feeds, 1, slice(4, None), monkeypatch)
    assert better[0] > worse[0] + 3
    assert better[1] > worse[1] + 20
    kept = {node.op_type for node in model.graph if str(node.name) in doctor.keep_float}
    assert kept == {"Concat", "Sigmoid", "Reshape", "Add", "Mul"}, "no product is given up"
    assert "which no scale holds both" in next(iter(doctor.keep_float.values()))
    plan = doctor.plan()
    assert sum(kernel == "QLinearConv" for kernel in plan.integer.values()) == 3


@pytest.mark.parametrize(
    ("join", "why"),
    [
        ("s = Relu(c) p = Mul(d, two) y = Concat<axis=1>(p, s)", "ranges are alike"),
        ("p = Mul(d, many) j = Concat<axis=1>(p, c) y = Conv<kernel_shape=[1,1]>(j, wj, bj)", "a product reads it"),
    ],
)
def test_other_joins_are_left_alone(join: str, why: str) -> None:
    text = f"(float[1,16,8,8] x) => (float[1,8,8,8] y) {{ c = {POINT}(x, wc, bc) d = {POINT}(x, wd, bd) {join} }}"
    weights = {
        **WEIGHTS, "wd": normal(8, 16, 1, 1) * 0.3, "bd": normal(8), "two": np.array(2, np.float32),
        "many": np.array(500, np.float32), "wj": normal(8, 16, 1, 1), "bj": normal(8),
    }  # fmt: skip
    text = text.replace("[1,8,8,8] y", "[1,16,8,8] y") if "two" in join else text
    model, _ = read_model(graph(text, weights), opset=21)
    quantizer = quantizer_of(model, [random_feed(model) for _ in range(4)])
    quantizer.fused()
    assert not any("joins" in reason for reason in quantizer.keep_float.values()), why


SCORES = "(float[1,4,8,16] q, float[1,4,16,8] k, {type} m) => (float[1,4,8,8] y) {{ s = MatMul(q, k) {mask} }}"
LATE = {"m": np.array([[[[1, 1, 1, 1, 1, 0, 0, 0]]]], np.float32)}


@pytest.mark.parametrize(
    ("kind", "mask"),
    [
        ("float[1,1,1,8]", "i = Sub(one, m) h = Mul(i, hide) t = Add(s, h) y = Softmax<axis=-1>(t)"),
        ("float[1,1,1,8]", "i = Sub(m, one) h = Mul(i, bound) t = Add(s, h) y = Softmax<axis=-1>(t)"),
        ("bool[1,1,1,8]", "t = Where(m, s, hide) y = Softmax<axis=-1>(t)"),
        ("bool[1,1,1,8]", "t = Where(m, s, below) y = Softmax<axis=-1>(t)"),
        ("bool[1,1,1,8]", "t = Where(m, s, infinite) r = Reshape(t, rows) z = Softmax<axis=-1>(r) y = Reshape(z, all)"),
    ],
)
def test_masks_in_every_form_leave_scores_their_resolution(kind: str, mask: str) -> None:
    constants = {
        "one": 1.0, "hide": -1e4, "bound": 65504.0, "below": -1e9, "infinite": -np.inf,
    }  # fmt: skip
    weights = {name: np.array(value, np.float32) for name, value in constants.items()}
    weights |= {"rows": np.array([4, 8, 8]), "all": np.array([1, 4, 8, 8])}
    source = graph(SCORES.format(type=kind, mask=mask), weights)
    feeds = []
    for _ in range(4):
        hidden = LATE["m"].astype(np.bool_ if kind.startswith("bool") else np.float32)
        feeds.append({"q": normal(1, 4, 8, 16), "k": normal(1, 4, 16, 8), "m": hidden})
    model, _ = read_model(source, opset=21)
    _, quantized, _ = quantizer_of(model, feeds).fused()
    noise = noise_to_signal([run(model, feed) for feed in feeds], [run(quantized, feed) for feed in feeds])
    assert decibel(noise) > 25


def test_products_of_large_numbers_without_a_softmax_are_no_masks() -> None:
    made = placed(
        f"(float[1,8,6,6] x) => (float[1,8,6,6] y) {{ t = {POINT}(x, w, b) u = {POINT}(x, w, b) y = Add(t, u) }}",
        {"w": normal(8, 8, 1, 1) * 3e3, "b": normal(8)},
    )
    assert unholdable(made.plan, made.stats) == {}


def _joined_faces() -> ir.Model:
    """BlazeFace with the scores and boxes of its finer grid in one output, as detectors are often exported."""
    model, _ = read_model(float_model("BFf"), opset=21)
    values = {str(value.name): value for value in model.graph.outputs}
    scores, boxes = values["Identity:0"], values["Identity_2:0"]
    join = ir.node("Concat", [scores, boxes], {"axis": 2}, name="join")
    join.outputs[0].name, join.outputs[0].type = "joined", scores.type
    model.graph.append(join)
    model.graph.outputs[:] = [join.outputs[0]]
    return model


@pytest.mark.zoo
def test_blazeface_with_joined_outputs_keeps_both(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _joined_faces()
    feeds = [{"input:0": sample["input:0"]} for sample in data(ZOO["BFf"].calibration, 12)]
    better, worse, _ = with_and_without(model, feeds, 2, slice(0, 1), monkeypatch)
    assert better[0] > worse[0]
    assert better[1] > worse[1]


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["MBV2", "EFL0", "OCRcls", "MAGIKA", "BFf"])
def test_models_without_such_joins_are_left_alone(name: str) -> None:
    model, _ = read_model(float_model(name), opset=21)
    samples = [{k: v for k, v in sample.items() if k != "label"} for sample in data(ZOO[name].calibration, 4)]
    quantizer = quantizer_of(model, samples)
    plan: Plan = quantizer.plan()
    quantizer._observe(plan)
    assert heads.crowded(plan, quantizer.stats) == {}
