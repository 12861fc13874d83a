"""Shape buckets: a model of changing sizes as files of fixed ones, padded and cut.

Oracles: the float model at any size, and numpy's padding in front of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgeq
from edgeq.ahead import compile_for
from edgeq.analyse.follow import rules
from edgeq.bucketing import at_largest, buckets_of, fitted, opener, suggested
from edgeq.errors import EdgeqError, ModelError, PackageError, SampleError, UsageError
from edgeq.ir import io
from edgeq.lower.pin import pinned
from edgeq.packaging import read_directory
from edgeq.packaging.loader import load
from edgeq.report.record import Report
from edgeq.report.recorder import Recorder
from edgeq.run.buckets import Bucketed, Buckets, cut_size
from edgeq.run.session import open_session, run_session
from edgeq.target.detect import local_name
from tests.graphs import graph
from tests.packaged import reseal
from tests.placed import samples_of

HEIGHT, CLASSES = 8, 6
TEXT = f"""(float[1,1,{HEIGHT},W] x) => (float[1,T,{CLASSES}] y) {{
    a0 = Conv<kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]>(x, w0, b0)
    a = Relu(a0)
    c0 = Conv<kernel_shape=[3,3], pads=[1,1,1,1], strides=[1,2]>(a, w1, b1)
    c = Relu(c0)
    s = Shape<start=3, end=4>(c)
    shape = Concat<axis=0>(one, wide, s)
    r = Reshape(c, shape)
    t = Transpose<perm=[0,2,1]>(r)
    y = MatMul(t, w2)
}}"""
WIDTHS = (20, 31, 32, 33, 47, 64, 5, 60)


def net() -> ir.Model:
    """Lines of any width W -> scores [1, ceil(W / 4), CLASSES], through a Reshape to sizes that are computed."""
    random = np.random.default_rng(0)
    weights: dict[str, Any] = {
        "w0": random.standard_normal((16, 1, 3, 3)) / 3, "b0": random.uniform(0, 0.2, 16),
        "w1": random.standard_normal((32, 16, 3, 3)) / 12, "b1": random.uniform(0, 0.2, 32),
        "w2": random.standard_normal((128, CLASSES)) / 11,
    }  # fmt: skip
    floats = {name: array.astype(np.float32) for name, array in weights.items()}
    return graph(TEXT, {**floats, "one": np.array([1]), "wide": np.array([128])})


def lines(widths: tuple[int, ...] = WIDTHS, seed: int = 0) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [{"x": random.uniform(0, 1, (1, 1, HEIGHT, width)).astype(np.float32)} for width in widths]


def held_out() -> list[dict[str, np.ndarray]]:
    return lines((*WIDTHS, 65), seed=1)


def export(model: ir.Model, folder: Path, **settings: Any) -> Report:
    """An export for a CPU that isn't here, so that nothing is timed."""
    io.write(model, folder / "net.onnx")
    wanted = {
        "target": "cpu-arm64",
        "recipe": "canonicalize; quantize",
        "metric": "cosine",
        "max_drop": 0.2,
        **settings,
    }
    return edgeq.export(
        folder / "net.onnx", out=folder / "net.edgeq", calibration="tests.test_buckets:lines",
        evaluation="tests.test_buckets:held_out", **wanted,
    )  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    folder = tmp_path_factory.mktemp("buckets")
    report = export(net(), folder, buckets=["x=1,1,8,64", "W=32"])
    reseal(folder / "net.edgeq", lambda manifest: manifest["variants"][0]["requires"].update(isa=[]))
    return report, folder / "net.edgeq"


def told(report: Report) -> dict[str, str]:
    return {notice.code: notice.message for notice in report.notices}


def test_one_quantization_in_files_that_share_weights(exported: tuple[Report, Path]) -> None:
    report, package = exported
    assert report.passed and report.coverage is not None and report.coverage.integer_macs_share == 1.0
    small, large = (io.read(file) for file in read_directory(package).variants[0].files)
    assert [list(model.graph.inputs[0].shape or ()) for model in (small, large)] == [[1, 1, 8, 32], [1, 1, 8, 64]]
    assert not [node.op_type for node in small.graph if node.op_type in ("Shape", "Concat")], "sizes are constants"
    for name, value in small.graph.initializers.items():
        other = large.graph.initializers[name].const_value
        assert value.const_value is not None and other is not None
        if value.const_value.dtype != ir.DataType.INT64:
            np.testing.assert_array_equal(value.const_value.numpy(), other.numpy(), err_msg=name)
    assert (package / "tensors.bin").stat().st_size == 32 * 16 * 3 * 3, "w1 in a byte each, once"
    found = [(package / name).stat().st_size for name in ("tensors.bin", "model.onnx", "model.bucket0.onnx")]
    assert report.check("size_bytes").value == pytest.approx(sum(found), rel=0.01)


def test_manifest_says_what_a_loader_must_know(exported: tuple[Report, Path]) -> None:
    manifest = json.loads((exported[1] / "manifest.json").read_text())
    assert [manifest[kind][0]["shape"] for kind in ("inputs", "outputs")] == [[1, 1, 8, "W"], [1, None, CLASSES]]
    (row,) = manifest["variants"]
    assert row["model"] == "model.onnx"
    assert row["buckets"] == {
        "models": ["model.bucket0.onnx", "model.onnx"], "shapes": [{"x": [1, 1, 8, 32]}, {"x": [1, 1, 8, 64]}],
        "pad": {"x": 0.0}, "open": {"x": [None, None, None, "W"]},
        "cuts": [{"output": "y", "axis": 1, "times": 1, "plus": 3, "per": 4, "offset": 0, "input": "x", "of": 3}],
    }  # fmt: skip
    assert {len(run["inputs"]["x"]["shape"]) for run in row["golden"]["runs"]} == {4}
    assert len(row["golden"]["runs"]) == 2, "one in each bucket"
    assert all(manifest["files"][name]["needed"] for name in row["buckets"]["models"])


def test_loader_takes_any_width_up_to_the_largest(exported: tuple[Report, Path]) -> None:
    _, package = exported
    session, exact = load(package, fresh=True), open_session(package.parent / "net.onnx")
    for width in (1, 31, 32, 33, 63, 64):
        feed = lines((width,), seed=width)[0]
        (found,), expected = session.run(None, feed), run_session(exact, feed)["y"]
        assert found.shape == expected.shape
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.95
    with pytest.raises(
        ValueError, match=r"input 'x' is \[1, 1, 8, 65\].*: \[1, 1, 8, 32\], \[1, 1, 8, 64\]; give less"
    ):
        session.run(None, lines((65,))[0])


def test_nothing_of_padding_is_silent(exported: tuple[Report, Path]) -> None:
    notices = told(exported[0])
    assert "axis 1 of 'y' is cut to (s + 3) // 4, s being axis 3 of 'x'" in notices["padding"]
    assert "x=1,1,8,32: 4; x=1,1,8,64: 4" in notices["buckets"]
    assert notices["beyond-buckets"].startswith("1 of 9 evaluation samples are left out: input 'x' is [1, 1, 8, 65]")
    assert "snr_db" in notices["padding-alone"]
    assert exported[0].check("cosine").samples == 8
    assert "worst in bucket x=1,1,8," in exported[0].check("cosine").note
    assert "'cpu-arm64' takes any shape" in notices["padded-latency"]


def test_figures_hold_what_padding_costs(tmp_path: Path) -> None:
    """Float in its buckets, judged: what it differs by is what numpy's padding in front of the model makes."""
    report = export(net(), tmp_path, recipe="float", buckets=["W=64"], pad=["x=3"], max_drop=1e-4)
    exact, worst = open_session(tmp_path / "net.onnx"), 0.0
    for feed in held_out()[:-1]:
        whole = np.pad(feed["x"], [(0, 0)] * 3 + [(0, 64 - feed["x"].shape[3])], constant_values=3)
        expected, found = (run_session(exact, {"x": x})["y"] for x in (feed["x"], whole))
        worst = max(worst, float(np.abs(found[:, : expected.shape[1]] - expected).max()))
    assert worst > 0.1
    assert report.check("max_abs").value == pytest.approx(worst, rel=1e-4)
    assert not report.passed
    assert told(report)["padding-differs"].startswith("padding alone misses the limits (cosine_drop is ")


@pytest.mark.slow
def test_validate_measures_through_the_buckets(exported: tuple[Report, Path]) -> None:
    report, package = exported
    again = edgeq.validate(package, evaluation="tests.test_buckets:held_out", metric="cosine", threads=[1])
    assert again.check("cosine").value == pytest.approx(report.check("cosine").value, abs=1e-6)
    assert again.check("latency_ms").value > 0
    assert told(again)["beyond-buckets"].startswith("1 of 9")


def test_sizes_shared_by_inputs_change_together() -> None:
    model = graph("""(float[B,S,4] x, float[B,S] m) => (float[B,S,4] y, float[B,4] pooled) {
        wide = Unsqueeze(m, last)
        y = Mul(x, wide)
        pooled = ReduceSum<keepdims=0>(y, second)
    }""", {"last": np.array([2]), "second": np.array([1])})  # fmt: skip
    feeds = [{"x": np.ones((1, size, 4), np.float32), "m": np.ones((1, size), np.float32)} for size in (3, 5, 7)]
    how = buckets_of(model, ["S=8", "S=4", "m=1,6"], [], [samples_of(feeds)])
    assert how["shapes"] == [{"x": [1, size, 4], "m": [1, size]} for size in (4, 6, 8)]
    assert [(row["output"], row["axis"], row["per"]) for row in how["cuts"]] == [("y", 1, 1)]
    bucketed = Bucketed(how, [open_session(pinned(model, shapes)) for shapes in how["shapes"]])
    for feed in feeds:
        expected = run_session(open_session(model), feed)
        found = dict(zip(("pooled", "y"), bucketed.run(["pooled", "y"], feed), strict=True))
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
    with pytest.raises(ValueError, match="inputs 'x' and 'm' differ in dimension 'S': 3 and 5"):
        bucketed.run(None, {"x": feeds[0]["x"], "m": feeds[1]["m"]})


def test_no_bucket_needs_to_hold_all_others() -> None:
    model = graph("(float[1,H,W] x) => (float[1,P,Q] y) { y = MaxPool<kernel_shape=[2], strides=[2]>(x) }")
    feeds = [{"x": np.ones((1, height, width), np.float32)} for height, width in ((30, 9), (5, 40))]
    how = buckets_of(model, ["H=32 W=10", "H=8 W=41"], [], [samples_of(feeds)])
    assert [shapes["x"] for shapes in how["shapes"]] == [[1, 32, 10], [1, 8, 41]]
    bucketed = Bucketed(how, [open_session(pinned(model, shapes)) for shapes in how["shapes"]])
    assert [bucketed.run(None, feed)[0].shape for feed in feeds] == [(1, 30, 4), (1, 5, 20)]
    assert [at_largest(feed, how)["x"].shape for feed in feeds] == [(1, 8, 41)] * 2
    with pytest.raises(ValueError, match=r"input 'x' is \[1, 30, 40\], and no bucket holds that"):
        bucketed.run(None, {"x": np.ones((1, 30, 40), np.float32)})


@given(
    steps=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2)), max_size=3), up=st.integers(1, 3)
)
def test_rules_are_those_of_strided_windows(steps: list[tuple[int, int, int]], up: int) -> None:
    """Any chain of windows (kernel, stride, padding), then a resize by ``up``."""

    def length(size: int) -> int:
        for kernel, stride, pad in steps:
            size = (size + 2 * pad - kernel) // stride + 1
        return size * up

    def run(sizes: Any) -> dict[str, tuple[int, ...]] | None:
        return {"y": (2, length(sizes["w"]))} if length(sizes["w"]) > 0 else None

    (row,) = rules(run, {"w": 150}, [{"w": 90}])
    assert (row["output"], row["axis"], row["dim"]) == ("y", 1, "w")
    for size in range(1, 151):
        if run({"w": size}) is not None:
            assert cut_size(row, size) == length(size)


def test_sizes_a_model_refuses_are_passed_over() -> None:
    (row,) = rules(lambda sizes: {"y": (sizes["h"] // 4,)} if sizes["h"] % 32 == 0 else None, {"h": 320}, [{"h": 160}])
    assert [cut_size(row, size) for size in (32, 160, 320)] == [8, 40, 80]


def test_outputs_that_no_padding_can_be_cut_from_are_an_error() -> None:
    with pytest.raises(ModelError, match="axis 0 of output 'y' follows dimension 'w' and also 'h'"):
        rules(lambda sizes: {"y": (sizes["h"] * sizes["w"],)}, {"h": 8, "w": 8}, [])
    with pytest.raises(ModelError, match="axis 0 of output 'y' follows dimension 'w' in no way that can be told"):
        rules(lambda sizes: {"y": (sizes["w"] ** 2,)}, {"w": 20}, [])


def how_of(*texts: str, pads: tuple[str, ...] = ()) -> Buckets:
    return buckets_of(net(), texts, pads, [samples_of(lines())])


@pytest.mark.parametrize(
    ("texts", "pads", "message", "hint"),
    [
        (("x=1,1,8",), (), r"bucket 'x=1,1,8' doesn't fit input x float32\[1, 1, 8, W\]", "fixed sizes stay"),
        (("x=1,1,9,64",), (), "doesn't fit input", "fixed sizes stay"),
        (("x=1,1,8,?",), (), "can't read bucket", "NAME=1,3,48,320"),
        (("W=0",), (), "can't read bucket", "DIMENSION=320"),
        (("w=64",), (), "no input or open dimension 'w'", "W"),
        (("W=64 x=1,1,8,32",), (), "gives dimension 'W' two sizes, 64 and 32", ""),
        (("W=64", "x=1,1,8,64"), (), "two buckets are the same: x=1,1,8,64", "once"),
        (("W=64",), ("y=1",), "no input 'y'", "x"),
        (("W=64",), ("x=white",), "can't read padding 'x=white'", "NAME=0"),
    ],
)
def test_words_that_make_no_sense(texts: tuple[str, ...], pads: tuple[str, ...], message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        how_of(*texts, pads=pads)
    assert hint in error.value.hint


def test_a_bucket_must_say_all_that_changes() -> None:
    model = graph("(float[1,H,W] x) => (float[1,H,W] y) { y = Relu(x) }")
    feeds = [{"x": np.ones((1, height, 4), np.float32)} for height in (2, 3)]
    with pytest.raises(UsageError, match="bucket 'W=8' leaves axis 1 of input 'x' open, and samples differ") as error:
        buckets_of(model, ["W=8"], [], [samples_of(feeds)])
    assert error.value.hint == "add H=SIZE to it, or the shape of 'x'"
    with pytest.raises(UsageError, match="all of this model's are fixed"):
        buckets_of(graph("(float[1,4] x) => (float[1,4] y) { y = Relu(x) }"), ["x=1,4"], [], [])


def test_a_bucket_must_run() -> None:
    model = graph("(float[1,W] x) => (float[4,Q] y) { y = Reshape(x, s) }", {"s": np.array([4, -1])})
    with pytest.raises(ModelError, match="the float model doesn't run in the bucket x=1,6") as error:
        buckets_of(model, ["W=6", "W=8"], [], [samples_of([{"x": np.ones((1, 4), np.float32)}])])
    assert "multiples" in error.value.hint


def test_samples_that_no_bucket_holds() -> None:
    recorder = Recorder()
    with pytest.raises(SampleError, match="no evaluation sample fits a bucket: input 'x' is"):
        fitted(samples_of(lines((65, 70))), how_of("W=64"), "evaluation", recorder)
    fitted(samples_of(lines((40,))), how_of("W=64", "W=32"), "evaluation", recorder)
    assert [one.message for one in recorder.notices if one.code == "unproven-bucket"] == [
        "no evaluation sample is run in the bucket x=1,1,8,32"
    ]


def test_buckets_are_suggested_that_hold_all_samples() -> None:
    samples = samples_of(lines((20, 33, 40, 100, 90, 7)))
    assert suggested(net(), samples) == ["x=1,1,8,32", "x=1,1,8,64", "x=1,1,8,128"]
    how = buckets_of(net(), suggested(net(), samples), [], [samples])
    assert len(fitted(samples, how, "calibration", Recorder())) == 6
    model = graph("(float[B,S] x, float[B,S] m) => (float[B,S] y) { y = Mul(x, m) }")
    rows = [{"x": np.ones((1, size), np.float32), "m": np.ones((1, size), np.float32)} for size in (3, 70)]
    assert suggested(model, samples_of(rows)) == ["S=32", "S=96"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pad": ["x=1"]}, "padding is given without buckets"),
        ({"buckets": ["W=64"], "form": "cpp"}, "the loader of the form 'cpp' knows no buckets"),
        ({"buckets": ["W=64"], "pixels": True}, "--pixels takes pictures of one size"),
    ],
)
def test_what_has_no_buckets_says_so_at_once(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        export(net(), tmp_path, **settings)


def test_what_takes_one_model_names_the_files(exported: tuple[Report, Path], tmp_path: Path) -> None:
    _, package = exported

    def refused(run: Any, *arguments: Any, **settings: Any) -> EdgeqError:
        with pytest.raises(PackageError) as error:
            run(*arguments, **settings)
        return error.value

    for error in (
        refused(edgeq.bench, [package]),
        refused(edgeq.observe, package, calibration="tests.test_buckets:lines"),
    ):
        assert "a model for each of 2 shapes" in error.message
        assert error.hint == "name one of them, in that folder: model.bucket0.onnx, model.onnx"
    error = refused(edgeq.package, [package], out=tmp_path / "web", form="web")
    assert "the package has shape buckets, the loader of the form 'web'" in error.message


def test_every_bucket_is_compiled(exported: tuple[Report, Path], tmp_path: Path) -> None:
    made = compile_for(exported[1], ["local"], tmp_path / "compiled")
    assert [one.path.name for one in made] == [f"{local_name()}.bucket0.ort", f"{local_name()}.ort"]
    assert all(one.fidelity["cosine"] > 0.999 for one in made)
    for one, width in zip(made, (32, 64), strict=True):
        assert open_session(one.path).get_inputs()[0].shape == [1, 1, 8, width]


def test_package_written_again_keeps_its_buckets(exported: tuple[Report, Path], tmp_path: Path) -> None:
    _, package = exported
    edgeq.package([package, package], out=tmp_path / "both.edgeq")
    session = opener(read_directory(tmp_path / "both.edgeq").variants[1].buckets)
    variants = read_directory(tmp_path / "both.edgeq").variants
    assert [file.name for file in variants[1].files] == ["cpu-arm64-2.bucket0.onnx", "cpu-arm64-2.onnx"]
    feed = lines((40,))[0]
    found = [run_session(session(variant.model), feed)["y"] for variant in variants]
    np.testing.assert_array_equal(*found)
    assert found[0].shape == (1, 10, CLASSES)
