"""Statistics as files, merged as one pass would have made them, and drift of a package's tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import edgeq
from edgeq.analyse.drift import drift
from edgeq.analyse.layers import layers
from edgeq.analyse.observe import observe
from edgeq.analyse.statistics import Statistics, alike, merged, read, taps, unrounded, write
from edgeq.cli import main
from edgeq.context import Context
from edgeq.errors import OutputError, SampleError, UsageError
from edgeq.ir import io
from edgeq.packaging import PACKAGES
from edgeq.report import html
from edgeq.report.codec import from_json
from edgeq.report.recorder import Recorder
from edgeq.source import read_model
from edgeq.target.load import load_target
from tests import packaged, small_net
from tests.graphs import graph, normal
from tests.placed import VNNI, oracle_of, placed, samples_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net.edgeq in integers, calibrated on 24 images, net.onnx, same.npz and bright.npz."""
    folder = tmp_path_factory.mktemp("net")
    small_net.write(folder)
    found = placed(small_net.model(), feeds=[{"image": image[None]} for image in small_net.images(24, 1)])
    io.write(found.model, folder / "int8.onnx")
    rows = layers(found.source, found.model, found.plan, found.feeds[:2], found.target, found.stats)
    package = packaged.classifier(folder / "float")
    golden = replace(package.golden, tolerances={"logits": 1e9})
    report = replace(packaged.REPORT, layers=rows)
    package = replace(package, model=folder / "int8.onnx", report=report, golden=golden, preprocessing={})
    PACKAGES["dir"](package, folder / "net.edgeq")
    np.savez(folder / "same.npz", image=small_net.images(24, 2))
    np.savez(folder / "bright.npz", image=3 * small_net.images(24, 2))
    return folder


def test_data_of_the_same_kind_stays_in_its_ranges(made: Path) -> None:
    report = edgeq.observe(made / "net.edgeq", calibration=str(made / "same.npz"))
    assert report.passed and report.check("drifted_tensors").value == 0
    assert {row["tensor"] for row in report.drift} >= {"image", "a", "d", "s", "e"}
    assert all(0.5 < row["used"] < 1.6 for row in report.drift)


def test_data_of_another_kind_leaves_them(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["observe", str(made / "net.edgeq"), "-c", str(made / "bright.npz"), "-q"]
    assert main([*words, "--json"]) == 1
    report = from_json(capsys.readouterr().out)
    row = next(row for row in report.drift if row["tensor"] == "image")
    images = small_net.images(24, 2)
    calibrated = small_net.images(24, 1)
    assert row["drifted"] and (row["max"], row["now_max"]) == (calibrated.max(), 3 * images.max())
    assert row["outside"] == pytest.approx(float((3 * images > calibrated.max()).mean()), abs=0.01)
    assert row["beyond"] == pytest.approx(2.0, abs=0.1)
    clipped = next(row for row in report.drift if row["tensor"] == "d")
    assert clipped["now_max"] <= 6, "what a Clip bounds can't leave its range upwards"
    main(words)
    text = capsys.readouterr().out
    assert "tensors observed" in text and "image" in text
    assert "Drift (" in html.render(report)


def test_a_quantized_output_is_held_to_what_is_in_front_of_its_codes() -> None:
    text = "(float[1,8] x) => (float[1,8] t, float[1,8] y) { t = MatMul(x, w) y = MatMul(t, v) }"
    found = placed(text, {"w": normal(8, 8), "v": normal(8, 8)})
    rows = layers(found.source, found.model, found.plan, found.feeds, found.target, found.stats)
    feeds = [{"x": 9 * feed["x"]} for feed in found.feeds]
    seen = observe(unrounded(found.model), taps(found.model), samples_of(feeds), threads=1)
    drifted = {row["tensor"]: row["used"] for row in drift(found.model, rows, seen)}
    assert drifted["t"] == pytest.approx(9, rel=0.1)


def test_a_package_without_ranges_is_told(made: Path, tmp_path: Path) -> None:
    PACKAGES["dir"](replace(packaged.classifier(tmp_path / "made"), preprocessing={}), tmp_path / "old.edgeq")
    report = edgeq.observe(tmp_path / "old.edgeq", calibration=str(made / "same.npz"))
    assert report.checks == () and [notice.code for notice in report.notices] == ["no-ranges"]


def test_halves_merged_say_what_the_whole_says(made: Path, tmp_path: Path) -> None:
    images = small_net.images(24, 2)
    for name, part in (("whole", images), ("one", images[:10]), ("two", images[10:])):
        np.savez(tmp_path / f"{name}.npz", image=part)
        edgeq.observe(made / "net.onnx", calibration=str(tmp_path / f"{name}.npz"), out=tmp_path / f"{name}.stats")
    whole, one, two = (read(tmp_path / f"{name}.stats") for name in ("whole", "one", "two"))
    both = merged([one, two])
    assert both.samples == whole.samples == 24 and both.tensors.keys() == whole.tensors.keys()
    assert set(whole.tensors) >= {"image", "a", "p", "s", "logits"}
    for name, stats in whole.tensors.items():
        other = both.tensors[name]
        assert (other.min, other.max, other.count) == (stats.min, stats.max, stats.count)
        assert stats.sample.size == 0, "no single value is in the file"
        np.testing.assert_allclose(other.histogram.edges(), stats.histogram.edges())


@pytest.mark.slow
def test_statistics_from_elsewhere_widen_calibration(made: Path, tmp_path: Path) -> None:
    """Bright images are seen elsewhere alone: the tensors that rewrites leave alone get ranges that hold them."""
    net, bright = str(made / "net.onnx"), tmp_path / "bright.stats"
    edgeq.observe(net, calibration=str(made / "bright.npz"), out=bright)
    data = {"calibration": str(made / "calibration.npz"), "evaluation": str(made / "evaluation.npz"), "threads": [1]}
    wide = edgeq.export(net, out=tmp_path / "wide", statistics=[bright], **data)
    told = next(notice.message for notice in wide.notices if notice.code == "statistics")
    assert "24 samples of" in told and not told.startswith("0 of")
    other = graph("(float[1,4] x) => (float[1,4] z) { z = Relu(x) }")
    io.write(other, tmp_path / "other.onnx")
    with pytest.raises(SampleError, match="are of another model"):
        np.savez(tmp_path / "other.npz", x=normal(4, 4))
        edgeq.export(tmp_path / "other.onnx", out=tmp_path / "o", calibration=str(tmp_path / "other.npz"),
                     statistics=[bright])  # fmt: skip


def test_ranges_are_those_of_both(made: Path, tmp_path: Path) -> None:
    source, info = read_model(made / "net.onnx", opset=21)
    bright = Statistics(observe(source, ["s", "e"], samples_of([{"image": 3 * small_net.images(4, 5)}]), threads=1),
                        info.digest, 1, ("there",))  # fmt: skip
    recorder, target = Recorder(), load_target(VNNI)
    feeds = [{"image": small_net.images(4, 6)}]
    context = Context(target, oracle_of(VNNI), samples_of(feeds), recorder, threads=1, elsewhere=(source, bright))
    joined, alone = context.observe(source, ["a", "s", "e"]), observe(source, ["a", "s"], samples_of(feeds), threads=1)
    assert joined["s"].max == max(bright.tensors["s"].max, alone["s"].max) == bright.tensors["s"].max
    assert joined["s"].count == bright.tensors["s"].count + alone["s"].count
    assert joined["a"].count == alone["a"].count, "of this one nothing is known from elsewhere"
    assert "2 of 3 tensors take in what 1 samples of there said" in recorder.notices[-1].message


def test_tensors_that_rewrites_moved_are_told_apart() -> None:
    text = "(float[1,8] x) => (float[1,8] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, v) }"
    w, v, x = normal(8, 8), normal(8, 8), normal(1, 8)
    model, scaled = graph(text, {"w": w, "v": v}), graph(text, {"w": w / 2, "v": v * 2})
    assert alike(model, scaled, ["x", "a", "b", "y", "none"], {"x": x}) == ["x", "y"]
    assert alike(model, model, ["a", "b", "y"], {"x": x}) == ["a", "b", "y"]


def same(one: Statistics, other: Statistics) -> None:
    assert one.tensors.keys() == other.tensors.keys() and one.samples == other.samples
    for name, stats in one.tensors.items():
        theirs = other.tensors[name]
        counted = ("count", "samples", "settled", "shape")
        assert [getattr(stats, key) for key in counted] == [getattr(theirs, key) for key in counted], name
        np.testing.assert_allclose([stats.min, stats.max, stats.sum], [theirs.min, theirs.max, theirs.sum], rtol=1e-4)
        assert (stats.channels is None) == (theirs.channels is None)
        if stats.channels is not None and theirs.channels is not None:
            np.testing.assert_allclose(stats.channels.high, theirs.channels.high, rtol=1e-4, atol=1e-5)
        assert stats.histogram.counts.sum() == theirs.histogram.counts.sum()


@pytest.mark.slow
def test_a_device_counts_what_this_machine_would(made: Path, tmp_path: Path) -> None:
    """Over its own files, of which no value comes back."""
    (tmp_path / "own").mkdir()
    images = small_net.images(24, 2)
    np.savez(tmp_path / "own/1.npz", image=images[:9], label=np.zeros(9))
    np.savez(tmp_path / "own/2.npz", image=images[9:])
    here, there = tmp_path / "here.npz", tmp_path / "there.npz"
    edgeq.observe(made / "net.edgeq", calibration=str(made / "same.npz"), out=here)
    report = edgeq.observe(made / "net.edgeq", on="local", data=str(tmp_path / "own"), out=there)
    same(read(here), read(there))
    assert report.passed and report.check("drifted_tensors").samples == 24
    assert report.samples["evaluation"]["origin"] == f"local:{tmp_path / 'own'}"
    assert report.environment["device"]["address"] == "local"
    with np.load(there) as file:
        assert not any(key.endswith((".sample", ".keys")) for key in file.files)
    few = edgeq.observe(made / "net.onnx", on="local", data=str(tmp_path / "own/1.npz"), limit=4)
    assert few.samples["evaluation"]["count"] == 4


@pytest.mark.slow
def test_padding_is_left_out_on_a_device_too(tmp_path: Path) -> None:
    text = """(float[N,S,4] x, int64[N,S] attention_mask) => (float[N,S,4] y) {
        m = Cast<to=1>(attention_mask) u = Unsqueeze(m, two) h = MatMul(x, w) y = Mul(h, u)
    }"""
    model = graph(text, {"w": normal(4, 4), "two": np.array([2])})
    io.write(model, tmp_path / "net.onnx")
    masks = (np.arange(6)[None] < np.array([6, 3, 5])[:, None]).astype(np.int64)
    np.savez(tmp_path / "data.npz", x=normal(3, 6, 4), attention_mask=masks)
    edgeq.observe(tmp_path / "net.onnx", calibration=str(tmp_path / "data.npz"), out=tmp_path / "here")
    edgeq.observe(tmp_path / "net.onnx", on="local", data=str(tmp_path / "data.npz"), out=tmp_path / "there")
    same(read(tmp_path / "here"), read(tmp_path / "there"))
    assert read(tmp_path / "there").tensors["h"].count == 4 * masks.sum()


@pytest.mark.slow
def test_data_a_device_has_not_is_told(made: Path, tmp_path: Path) -> None:
    net = made / "net.onnx"
    with pytest.raises(SampleError, match=r"no \.npz file at /nowhere\n.*an array an input under its name"):
        edgeq.observe(net, on="local", data="/nowhere")
    np.savez(tmp_path / "other.npz", picture=np.zeros(3))
    with pytest.raises(SampleError, match="can't be read as samples: 'image is not a file"):
        edgeq.observe(net, on="local", data=str(tmp_path))
    for given in ({"on": "local"}, {"data": "x"}, {"on": "local", "data": "x", "calibration": "y"}):
        with pytest.raises(UsageError, match="data on a device with --on and --data"):
            edgeq.observe(net, **given)


def test_files_that_are_none_are_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="can't read statistics"):
        read(made / "same.npz")
    with pytest.raises(SampleError, match="can't read statistics"):
        read(made / "net.onnx")
    found = {}
    for name in ("x", "y"):
        model = graph(f"(float[1,4] {name}) => (float[1,4] z) {{ z = Relu({name}) }}")
        io.write(model, tmp_path / f"{name}.onnx")
        np.savez(tmp_path / f"{name}.npz", **{name: normal(3, 4)})
        edgeq.observe(tmp_path / f"{name}.onnx", calibration=str(tmp_path / f"{name}.npz"), out=tmp_path / name)
        found[name] = read(tmp_path / name)
    with pytest.raises(SampleError, match="are of different models"):
        merged(found.values())
    write(Statistics({}, "m", 0), tmp_path / "old")
    with np.load(tmp_path / "old") as file:
        facts = json.loads(str(file["facts"]))
    np.savez(tmp_path / "old.npz", facts=np.array(json.dumps(facts | {"version": 0})))
    with pytest.raises(SampleError, match="of version 0"):
        read(tmp_path / "old.npz")
    with pytest.raises(OutputError, match="exists"):
        edgeq.observe(tmp_path / "x.onnx", calibration=str(tmp_path / "x.npz"), out=tmp_path / "x")
