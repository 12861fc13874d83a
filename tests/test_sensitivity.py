"""Sensitivity and layer-wise noise, against what they are defined as."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq import quantizer as quantizing
from edgeq import steps
from edgeq.analyse import sensitivity as measuring
from edgeq.analyse.blame import blame
from edgeq.analyse.layers import layers, worst
from edgeq.analyse.place import default_costs
from edgeq.analyse.segments import segments
from edgeq.analyse.sensitivity import (
    Job,
    Probe,
    decibel,
    from_decibel,
    noise_to_signal,
    only,
    sensitivity,
    together,
)
from edgeq.analyse.store import Store
from edgeq.cli import main
from edgeq.context import Context
from edgeq.report import html
from edgeq.report.codec import from_json
from edgeq.report.recorder import Recorder
from edgeq.rewrite.qdq import insert_qdq
from edgeq.source import read_model
from tests import small_net
from tests.bench.sensitivity import measure
from tests.graphs import graph, normal, random_feed
from tests.placed import VNNI, Placed, all_integer, oracle_of, placed, run, samples_of

POINT = "Conv<kernel_shape=[1,1]>"
BLOCK = (
    f"(float[1,8,6,6] x) => (float[1,8,6,6] y) {{ t = {POINT}(x, w, b) r = Relu(t) m = MaxPool<kernel_shape=[1,1]>(r)"
    f" u = {POINT}(m, v, b) s = Add(u, m) y = {POINT}(s, w, b) }}"
)
WEIGHTS = {"w": normal(8, 8, 1, 1) * 0.3, "v": normal(8, 8, 1, 1) * 0.3, "b": normal(8)}


def job_of(made: Placed, count: int | None = 3, **settings: Any) -> Job:
    """What is asked about a placed model, cut into ``count`` segments."""
    work = default_costs(made.plan.atoms, made.shapes).float_ns
    cuts = segments(made.source, made.plan.atoms, made.shapes, work, count)
    samples = samples_of(made.feeds)
    return Job(made.source, made.plan, made.encodings, insert_qdq, cuts, samples, made.target, **settings)


def naive(made: Placed, names: set[str]) -> float:
    """Noise on the outputs of the whole model with the atoms ``names`` quantized."""
    probe = Probe(made.source, made.feeds, made.target)
    return probe.noise(insert_qdq(made.source, only(made.plan, names), made.encodings))


def noise_of(made: Placed) -> dict[str, float]:
    done: list[None] = []
    noise = sensitivity(job_of(made), "alone", lambda: done.append(None))
    assert len(done) == len(noise)
    return {name: one.power for name, one in noise.items()}


def test_each_atom_is_measured_alone() -> None:
    made = placed(BLOCK, WEIGHTS)
    noise = noise_of(made)
    assert list(noise) == [
        a.name for a in made.plan.atoms if a.name in made.plan.integer and a.verdict.kind == "integer"
    ]
    for name, value in noise.items():
        part = only(made.plan, {name})
        model = insert_qdq(made.source, part, made.encodings)
        wanted = [made.exact(feed)["y"].astype(np.float64) for feed in made.feeds]
        found = [run(model, feed)["y"] for feed in made.feeds]
        error = sum(np.square(w - f).sum() for w, f in zip(wanted, found, strict=True))
        assert value == pytest.approx(error / sum(np.square(w).sum() for w in wanted), rel=1e-3)
        assert 0 < value < 1e-2


@pytest.mark.parametrize("count", [1, 2, 3, None])
def test_each_atom_is_restored_alone_however_the_graph_is_cut(count: int | None) -> None:
    """Float kernels of a part may be laid out otherwise than in the whole, so a code may round to its neighbour."""
    made = placed(BLOCK, WEIGHTS)
    job = job_of(made, count)
    every = set(made.plan.integer)
    for name, noise in sensitivity(job, "restored").items():
        assert noise.power == pytest.approx(naive(made, every - {name}), rel=0.02)
    assert together(job).power == pytest.approx(naive(made, every), rel=0.02)


def test_outputs_and_values_that_cross_segments_are_not_lost() -> None:
    """An output in the middle that is read on, a value read far behind, a second input, a second output."""
    made = placed(
        "(float[N,8,6,6] x, float[N,8,6,6] z) => (float[N,8,6,6] u, float[N,8,6,6] y) {"
        f" g = {POINT}(z, v, b) t = {POINT}(x, w, b) u = Relu(t) a = {POINT}(u, v, b) c = {POINT}(a, w, b)"
        f" d = Add(c, g) e = {POINT}(d, v, b) y = Add(e, u) }}",
        WEIGHTS,
        count=2,
    )
    every = set(made.plan.integer)
    alone = {name: naive(made, {name}) for name in every}
    restored = {name: naive(made, every - {name}) for name in every}
    for count in (2, 7):
        job = job_of(made, count)
        assert sum(len(segment.atoms) for segment in job.segments) == len(made.plan.atoms)
        for name, noise in sensitivity(job, "alone").items():
            assert noise.power == pytest.approx(alone[name], rel=1e-2), (count, name)
        for name, noise in sensitivity(job, "restored").items():
            assert noise.power == pytest.approx(restored[name], rel=0.02), (count, name)


def test_few_bytes_mean_more_passes_and_the_same_answer() -> None:
    made = placed(BLOCK, WEIGHTS)
    whole, one_at_a_time = (sensitivity(job_of(made, byte_budget=size), "restored") for size in (1 << 20, 1))
    for name, noise in whole.items():
        assert noise.power == pytest.approx(one_at_a_time[name].power, rel=1e-9)


def test_an_interrupted_measurement_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, store = placed(BLOCK, WEIGHTS), Store(tmp_path)
    expected = sensitivity(job_of(made), "alone")
    seen = 0

    def stop() -> None:
        nonlocal seen
        seen += 1
        if seen == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity(job_of(made, store=store), "alone", stop)
    assert len(list(tmp_path.rglob("*.npz"))) == 2
    opened: list[object] = []
    original = measuring.only
    monkeypatch.setattr(measuring, "only", lambda *given: opened.append(None) or original(*given))
    assert sensitivity(job_of(made, store=store), "alone") == expected
    assert len(opened) == len(expected) - 2
    assert sensitivity(job_of(made, store=store), "alone") == expected
    assert len(opened) == len(expected) - 2, "nothing is measured twice"
    sensitivity(job_of(made, store=store), "restored")
    assert len(opened) > len(expected), "another question has other answers"


def test_other_parameters_are_measured_anew_for_their_atom_alone(tmp_path: Path) -> None:
    made, store = placed(BLOCK, WEIGHTS), Store(tmp_path)
    before = sensitivity(job_of(made, store=store), "alone")
    count = len(list(tmp_path.rglob("*.npz")))
    coarse = replace(made.encodings.activations["u"], scale=made.encodings.activations["u"].scale * np.float32(8))
    encodings = replace(made.encodings, activations={**made.encodings.activations, "u": coarse})
    after = sensitivity(job_of(replace(made, encodings=encodings), store=store), "alone")
    touched = {name for name in before if before[name] != after[name]}
    assert touched == {"Conv_node_2", "Add_node"}, "those that write or read it"
    assert len(list(tmp_path.rglob("*.npz"))) == count + len(touched)


def test_class_scores_diverge_in_nats() -> None:
    made = placed(
        "(float[1,16] x) => (float[1,10] p) { t = MatMul(x, w) p = Softmax<axis=-1>(t) }", {"w": normal(16, 10) * 0.3}
    )
    noise = sensitivity(job_of(made, 1), "alone")["MatMul_node"]
    wanted = [made.exact(feed)["p"].astype(np.float64) for feed in made.feeds]
    model = insert_qdq(made.source, only(made.plan, {"MatMul_node"}), made.encodings)
    found = [run(model, feed)["p"].astype(np.float64) for feed in made.feeds]
    kl = np.mean([(w * np.log(w / f)).sum() for w, f in zip(wanted, found, strict=True)])
    assert noise.kl == pytest.approx(kl, rel=0.02, abs=1e-9)
    assert sensitivity(job_of(placed(BLOCK, WEIGHTS), 1), "alone")["Conv_node"].kl is None


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
    assert [from_decibel(decibel(value)) for value in (0.0, 1e-3, 1.0, float("inf"))] == [0.0, 1e-3, 1.0, float("inf")]


def test_layers_are_the_snr_of_each_quantized_tensor() -> None:
    made = placed(BLOCK, WEIGHTS)
    rows = layers(made.source, made.model, made.plan, made.feeds, made.target, made.stats)
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
    rows = {
        row["name"]: row["snr_db"]
        for row in layers(made.source, made.model, made.plan, made.feeds, made.target, made.stats)
    }
    assert rows["t"] > 30
    assert rows.get("r") is None, "a tensor of zeros has no SNR"
    assert worst([{"snr_db": None}, {"snr_db": 3.0}], 5) == [{"snr_db": 3.0}]


def test_blame_names_the_tensor_that_loses_most() -> None:
    made = placed(BLOCK, WEIGHTS)
    atoms = {atom.name: atom for atom in made.plan.atoms}
    about = {name: blame(atoms[name], made.plan, made.encodings, made.stats) for name in made.plan.integer}
    assert all("keep" in sentence and "dB" in sentence for sentence in about.values())
    spiky = [{"x": normal(1, 8, 6, 6)} for _ in range(4)]
    for feed in spiky:
        feed["x"][:, 3] *= 200
    made = placed(BLOCK, WEIGHTS, feeds=spiky)
    (atom,) = (atom for atom in made.plan.atoms if atom.name == "Conv_node")
    text = blame(atom, made.plan, made.encodings, made.stats)
    assert "channels make it so" in text, text


@pytest.mark.slow
def test_the_command_ranks_explains_and_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path / "cache"))
    model, calibration, _ = small_net.write(tmp_path, samples=8)
    words = ["sensitivity", str(model), "-c", str(calibration), "-t", VNNI]
    assert main([*words, "--json", "-q"]) == 0
    report = from_json(capsys.readouterr().out)
    noise = [row.noise_db for row in report.sensitivity]
    assert noise == sorted(noise) and len(noise) >= 5
    assert all(row.why and row.gain_db is not None and row.kl is not None for row in report.sensitivity)
    assert main(words) == 0
    shown = capsys.readouterr()
    assert report.sensitivity[0].atom in shown.out and "restored +dB" in shown.out
    assert "sensitivity" in shown.err
    assert "Sensitivity (" in html.render(report)
    assert main([*words, "-r", "canonicalize"]) == 2
    assert "quantizes nothing" in capsys.readouterr().err


@pytest.mark.zoo
def test_a_real_model_is_measured_as_in_the_plain_way() -> None:
    """The same kernels and nearly the same sums: the two answers agree."""
    alone, restored = measure("MBV2", 2)
    assert alone.spearman > 0.999
    assert alone.most_apart_db < 0.05
    assert restored.median_apart_db < 0.01
    assert restored.most_apart_db < 0.3


def test_large_models_are_asked_on_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three products of 8 * 8 * 36 take half of 3 * 6912 multiplications a sample; so many samples fit in a budget."""
    model = read_model(graph(BLOCK, WEIGHTS), opset=21)[0]
    feeds = [random_feed(model) for _ in range(40)]
    context = Context(placed(model, feeds=feeds[:2]).target, oracle_of(VNNI), samples_of(feeds), Recorder())
    quantizer = steps.quantize(model, context, ranges="minmax")
    quantizer.costs = all_integer(quantizer.atoms)
    plan = quantizer.plan()
    for budget, count in ((10**13, 32), (10 * len(plan.integer) * 6912 // 2, 10), (1, 4)):
        monkeypatch.setattr(quantizing, "SENSITIVITY_MACS", budget)
        assert len(quantizer.job(plan).samples) == count
