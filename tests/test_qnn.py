"""Qualcomm's NPU on the emulator that the provider's x86-64 library is: sessions, verdicts, whole exports.

What the emulator computes is judged by float on the CPU; what ran where is asked of the runtime, never of edgeq.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import edgeq
from edgeq import steps
from edgeq.ahead import compile_for
from edgeq.bucketing import placement_told
from edgeq.context import Context
from edgeq.errors import ModelError, OutputError, RuntimeUnavailableError, SampleError, TargetError, UsageError
from edgeq.ir import io
from edgeq.packaging import read_directory
from edgeq.report.record import Report
from edgeq.report.recorder import Recorder
from edgeq.run.buckets import Bucketed
from edgeq.run.session import open_session, run_session
from edgeq.source import read_model
from edgeq.target import isolated
from edgeq.target.load import load_target
from edgeq.target.oracle import Oracle
from edgeq.target.patterns import table
from edgeq.target.placement import plain
from edgeq.target.provider import assigned, open_on
from tests import small_net, test_buckets
from tests.bench.forecast import compare
from tests.graphs import graph, normal, ops
from tests.placed import samples_of
from tests.zoo import ZOO
from tests.zoo.packages import data, float_model

pytestmark = pytest.mark.qnn

TARGET = "npu-qnn-v75"
PROVIDER = "QNNExecutionProvider"
WIDE = "canonicalize; quantize(activations=u16/tensor/asym)"
RECIPES = {"a8w8": "canonicalize; quantize", "a16w8": WIDE}
ROUNDED = WIDE.replace(")", ", rounding=gptq)")


@pytest.fixture(autouse=True)
def emulator() -> None:
    """Skip where there is no emulator; in CI, where there must be one, fail."""
    if importlib.util.find_spec("onnxruntime_qnn") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("onnxruntime-qnn is missing: make venv")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    small_net.write(folder)
    return folder


def export(folder: Path, out: Path, **settings: object) -> Report:
    wanted = {"target": TARGET, "recipe": "canonicalize; quantize", "max_drop": 0.05, **settings}
    return edgeq.export(
        folder / "net.onnx", out=out, calibration=str(folder / "calibration.npz"),
        evaluation=str(folder / "evaluation.npz"), **wanted,
    )  # type: ignore[arg-type]  # fmt: skip


def on_cpu(path: Path) -> Counter[str]:
    """Op types that the runtime gives to the CPU when it opens ``path`` for the target, asked here and now."""
    session = open_on(path, load_target(TARGET).execution, {})
    return Counter(owner.op for owner in assigned(session).values() if owner.provider != PROVIDER)


@pytest.fixture(scope="module")
def exported(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Report, Path]]:
    """Formats -> the report of an export and its package."""
    folder = tmp_path_factory.mktemp("exported")
    return {
        name: (export(files, folder / f"{name}.edgeq", recipe=recipe), folder / f"{name}.edgeq")
        for name, recipe in RECIPES.items()
    }


@pytest.mark.parametrize("formats", RECIPES)
def test_export_runs_whole_on_the_npu(exported: dict[str, tuple[Report, Path]], formats: str) -> None:
    report, _ = exported[formats]
    assert report.passed and report.coverage is not None and report.artifact is not None
    assert report.coverage.integer_macs_share == 1.0
    assert (report.coverage.float_nodes, report.coverage.unexplained) == (0, ())
    assert report.coverage.kernels["Conv2d"] >= 3
    assert on_cpu(Path(report.artifact.path)) == {"QuantizeLinear": 1, "DequantizeLinear": 1}
    assert {notice.code for notice in report.notices} >= {"not-a-device"}
    assert report.latency == {}, "an emulator's clock is nobody's latency"
    assert not [check.name for check in report.checks if "latency" in check.name or check.name.endswith("_ms")]
    codes = {row["format"].split("/")[0] for row in report.layers}
    assert codes == ({"u16"} if formats == "a16w8" else {"u8"})


def test_16_bit_floats_are_rounded_as_was_told(files: Path, tmp_path: Path) -> None:
    report = export(files, tmp_path / "half.edgeq", recipe="canonicalize; half")
    assert report.passed and report.artifact is not None
    path = Path(report.artifact.path)
    assert on_cpu(path) == {}  # it casts what enters and leaves itself
    shipped = io.read(path)
    assert [str(value.dtype) for value in shipped.graph.inputs] == ["FLOAT"]
    assert report.check("size_ratio").value < 0.53
    (told,) = [row["checks"]["snr_db"] for row in report.candidates if row["ships"]]
    assert report.check("snr_db").value == pytest.approx(told, abs=1)  # on the NPU, and on the CPU each tensor rounded


FLOATS = {0x0216: "f16", 0x0232: "f32"}  # QnnTypes.h


def real_kernels(path: Path, folder: Path) -> dict[str, set[str]]:
    """Kernels of what QNN compiles ``path`` to that read or write floats -> in which formats."""
    provider = load_target(TARGET).execution
    folder.mkdir()
    options = {**provider.options, "dump_json_qnn_graph": "1", "json_qnn_graph_dir": str(folder)}
    open_on(path, replace(provider, options=options), {})
    found: dict[str, set[str]] = {}
    for file in folder.glob("*.json"):
        graph = json.loads(file.read_text()).get("graph", {"nodes": {}, "tensors": {}})
        types = {name: FLOATS.get(tensor["data_type"]) for name, tensor in graph["tensors"].items()}
        for name, node in graph["nodes"].items():
            formats = {types[edge] for edge in (*node["input_names"], *node["output_names"]) if types.get(edge)}
            found |= {plain(name): formats} if formats else {}
    return found


def test_what_quantize_leaves_float_runs_in_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEQ_ZOO_CALIBRATION", "16")
    monkeypatch.setenv("EDGEQ_ZOO_EVALUATION", "4")
    entry = ZOO["EFL0"]
    report = edgeq.export(
        float_model("EFL0"), target=TARGET, recipe="canonicalize; quantize(ranges=minmax, relief=6); half",
        out=tmp_path / "net.edgeq", max_drop=0.3, calibration=entry.calibration, evaluation=entry.evaluation,
        metric=entry.metric,
    )  # fmt: skip
    assert report.passed and report.coverage is not None and report.artifact is not None
    assert report.coverage.integer_nodes and report.coverage.float_nodes
    path = Path(report.artifact.path)
    kernels = real_kernels(path, tmp_path / "graphs")
    of_type = {
        dtype: {
            str(node.name) for node in io.read(path).graph if node.op_type == "Conv" and node.outputs[0].dtype == dtype
        }
        for dtype in (ir.DataType.FLOAT16, ir.DataType.FLOAT)
    }
    narrow, codes = of_type.values()
    assert narrow and {name: kernels.get(name) for name in narrow} == {key: {"f16"} for key in narrow}
    assert codes and not codes & kernels.keys(), "their kernels read and write codes"


def test_what_the_npu_does_not_take_in_16_bits_stays_float32() -> None:
    text = "(float[4,64] x) => (float[4,64] y) { a = MatMul(x, w) b = Erf(a) y = MatMul(b, w) }"
    target = load_target(TARGET)
    model, _ = read_model(graph(text, {"w": normal(64, 64) / 8}), opset=target.opset)
    context = Context(target, Oracle(target), samples_of([{"x": normal(4, 64)}]), Recorder())
    result = steps.half(model, context)
    assert ops(result) == ["Cast", "MatMul", "Cast", "Erf", "Cast", "MatMul", "Cast"]
    (notice,) = [one.message for one in context.recorder.notices if one.code == "kept-f32"]
    assert f"{PROVIDER} has no f16 Erf: {PROVIDER} doesn't take it: it runs on the CPU" in notice


def test_16_bit_activations_are_more_exact(exported: dict[str, tuple[Report, Path]]) -> None:
    narrow, wide = (report.check("snr_db").value for report, _ in exported.values())
    assert wide > narrow + 6  # of 8 bits more the weights' own rounding leaves some


def test_package_opens_with_its_own_loader_on_the_npu(exported: dict[str, tuple[Report, Path]], tmp_path: Path) -> None:
    _, package = exported["a8w8"]
    code = (
        f"import runpy, numpy; session = runpy.run_path({str(package / 'load.py')!r})['load']()\n"
        "print(session.get_providers()[0], session.run(None, {'image': numpy.zeros((1, 3, 32, 32), 'f4')})[0].shape)"
    )
    done, without = (
        subprocess.run(
            [sys.executable, "-c", before + code],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "EDGEQ_STATE": str(tmp_path / str(len(before)))},
        )
        for before in ("", "import importlib.util; importlib.util.find_spec = lambda name: None\n")
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{PROVIDER} (1, 10)"
    assert "this machine lacks the Python module onnxruntime_qnn" in without.stderr


def test_limit_on_latency_is_refused_on_an_emulator(files: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="limit on 'latency_ms', which isn't measured here") as error:
        export(files, tmp_path / "net.edgeq", max_latency_ms=5.0)
    assert "device" in error.value.hint


def test_shapes_that_differ_are_an_error(tmp_path: Path) -> None:
    edgeq.ir.io.write(graph("(float[1,3,H,8] x) => (float[1,3,H,8] y) { y = Relu(x) }"), tmp_path / "net.onnx")
    np.savez(tmp_path / "one.npz", x=np.zeros((2, 3, 8, 8), np.float32))
    with pytest.raises(UsageError, match="takes fixed shapes only") as error:
        edgeq.export(tmp_path / "net.onnx", target=TARGET, calibration="tests.test_qnn:two_shapes", out=tmp_path / "o")
    assert "--bucket x=1,3,32,8" in error.value.hint


def two_shapes() -> list[dict[str, np.ndarray]]:
    return [{"x": np.ones((1, 3, height, 8), np.float32)} for height in (8, 16)]


@pytest.mark.parametrize("recipe", [*RECIPES.values(), "canonicalize; half"])
def test_buckets_run_whole_on_the_npu(recipe: str, tmp_path: Path) -> None:
    """Each file, opened by the package's own loader, for widths between."""
    edgeq.ir.io.write(test_buckets.net(), tmp_path / "net.onnx")
    report = edgeq.export(
        tmp_path / "net.onnx", out=tmp_path / "net.edgeq", target=TARGET, recipe=recipe, metric="cosine", max_drop=0.05,
        calibration="tests.test_buckets:lines", evaluation="tests.test_buckets:held_out", buckets=["W=32", "W=64"],
    )  # fmt: skip
    assert report.passed and report.artifact is not None
    variant = read_directory(tmp_path / "net.edgeq").variants[0]
    for file in variant.files:
        assert set(on_cpu(file)) <= {"QuantizeLinear", "DequantizeLinear"}
    code = (
        f"import runpy, numpy; session = runpy.run_path({str(tmp_path / 'net.edgeq' / 'load.py')!r})['load']()\n"
        "shapes = [session.run(None, {'x': numpy.ones((1, 1, 8, width), 'f4')})[0].shape for width in (7, 33, 64)]\n"
        "print(session.get_providers()[0], shapes)"
    )
    environment = {**os.environ, "EDGEQ_STATE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.splitlines()[-1:] == [f"{PROVIDER} [(1, 2, 6), (1, 9, 6), (1, 16, 6)]"], done.stderr


def test_bucket_that_leaves_more_to_the_cpu_is_named() -> None:
    target, recorder, shapes = load_target(TARGET), Recorder(), ([4, 64], [8, 64])
    form = "(float{0} x) => (float{0} y) {{ a = MatMul(x, w) b = Relu(a) c = {1}(b) d = MatMul(c, w) y = Relu(d) }}"
    models = [
        read_model(graph(form.format(shape, op), {"w": normal(64, 64)}), opset=target.opset)[0]
        for shape, op in zip(shapes, ("Erf", "Sigmoid"), strict=True)
    ]
    session = Bucketed(
        {"shapes": [{"x": shape} for shape in shapes], "pad": {"x": 0.0}, "open": {"x": ["n", None]}, "cuts": []},
        [open_session(model, provider=target.execution) for model in models],
    )
    placement_told(session, session.how, recorder)
    (notice,) = recorder.notices
    assert notice.message == "bucket x=4,64 leaves {'Erf': 1} to the CPU, the largest {}"


# --- what providers don't check -------------------------------------------------------------------------------------


def extended(folder: Path, soc: str, more: str = "") -> str:
    path = folder / "mine.toml"
    path.write_text(
        f'extends = "{TARGET}"\nsummary = "x"\nverified = "documentation"\n[options]\nsoc_model = "{soc}"\n{more}'
    )
    return str(path)


def test_unknown_soc_is_an_error_that_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"options.soc_model is '9999', which isn't known here") as error:
        load_target(extended(tmp_path, "9999"))
    assert error.value.hint == "known: 57 (SM8650, Snapdragon 8 Gen 3)"


def test_soc_the_library_refuses_is_no_silent_run_on_the_cpu(files: Path, tmp_path: Path) -> None:
    target = load_target(extended(tmp_path, "9999", '[choices]\nsoc_model = {9999 = "made up"}\n'))
    silent = open_on(files / "net.onnx", target.execution, {"log_severity_level": 4})
    assert PROVIDER in silent.get_providers(), "the runtime says it is there"
    assert {owner.provider for owner in assigned(silent).values()} == {"CPUExecutionProvider"}
    with pytest.raises(RuntimeUnavailableError, match="took no node: all of the model would run on the CPU") as error:
        open_session(files / "net.onnx", provider=target.execution)
    assert "soc_model=9999" in error.value.message
    assert "QNN_DEVICE_ERROR_INVALID_CONFIG" in error.value.hint, "what the provider itself said"


# --- the process of its own -----------------------------------------------------------------------------------------


def test_process_that_dies_is_an_error_and_the_next_call_starts_another() -> None:
    provider = load_target(TARGET).execution
    network = graph("(float[1,4] x) => (float[1,4] y) { y = Relu(x) }")
    session = open_session(network, provider=provider)
    feed = {"x": np.array([[-1, 0, 1, 2]], np.float32)}
    expected = run_session(session, feed)["y"]
    np.testing.assert_allclose(expected, [[0, 0, 1, 2]], atol=1e-3)  # f16 inside
    os.kill(isolated._RUNNING[sys.executable].child.pid, signal.SIGKILL)
    with pytest.raises(RuntimeUnavailableError, match="the process of the provider ended with signal 9"):
        run_session(session, feed)
    np.testing.assert_array_equal(run_session(open_session(network, provider=provider), feed)["y"], expected)


def test_session_refuses_as_one_on_the_cpu_does() -> None:
    provider = load_target(TARGET).execution
    session = open_session(graph("(float[1,4] x) => (float[1,4] y) { y = Relu(x) }"), provider=provider)
    for feed in ({}, {"x": np.zeros((1, 5), np.float32)}):
        with pytest.raises(SampleError) as error:
            run_session(session, feed)
        assert error.value.hint == "the inputs are: x float32[1, 4]"
    with pytest.raises(ModelError, match="No Op registered for Foo"):
        open_session(graph("(float[1,4] x) => (float[1,4] y) { y = Foo(x) }"), provider=provider)


# --- the oracle -----------------------------------------------------------------------------------------------------


def test_verdicts_come_from_what_the_npu_compiled(tmp_path: Path) -> None:
    """Kernels, data movers, float kernels of the NPU and nodes it leaves to the CPU are told apart."""
    target = load_target(TARGET)
    oracle = Oracle(target, tmp_path)
    answers = {row.pattern: row.verdicts for row in table(target, oracle)}
    kinds = {pattern: (verdicts[0].kind, verdicts[0].kernel) for pattern, verdicts in answers.items()}
    assert kinds["Conv"] == ("integer", "Conv2d")
    assert kinds["Conv depthwise"] == ("integer", "DepthWiseConv2d")
    assert kinds["Gemm"] == ("integer", "FullyConnected")
    assert kinds["HardSwish"] == ("integer", "ElementWiseNeuron")
    assert kinds["Reshape"] == ("mover", "Reshape")
    assert kinds["Conv, float out"] == ("float", "Conv2d")
    assert answers["Erf"][0].reason == f"{PROVIDER} doesn't take Erf: it runs on the CPU"
    assert {verdict.kind for verdict in answers["Conv+Clip"]} == {"integer"}
    assert "onnxruntime-qnn" in oracle.path.name, "answers are kept by the plug-in's version too"
    again = Oracle(target, tmp_path)
    assert [row.verdicts for row in table(target, again)] == list(answers.values())
    assert again.sessions == 0


@pytest.mark.parametrize("name", ["npu-qnn-v73", "npu-qnn-v81"])  # v75's are asked above, v79 lies between
def test_listed_ops_have_kernels(name: str) -> None:
    """``quantized`` and ``through`` are what the emulator takes, 16-bit codes included."""
    target = load_target(name)
    kinds: dict[str, set[str]] = {}
    for row in table(target):
        for op, verdict in zip(row.ops, row.verdicts, strict=True):
            kinds.setdefault(op, set()).add(verdict.kind)
    assert [op for op in target.quantized if "integer" not in kinds.get(op, set())] == []
    assert [op for op in target.through if "mover" not in kinds.get(op, set())] == []


# --- real models ----------------------------------------------------------------------------------------------------

SAMPLES = 20  # that accuracy is judged on; in 8 bits fewer, which is about where it runs
SIDE = 128  # of the detector's crops: a whole page takes the emulator 20 s in 16 bits


def _crops(pages: str, count: int) -> list[dict[str, np.ndarray]]:
    """Crops of drawn pages, one a page, all of one shape."""
    return [{"x": np.ascontiguousarray(page["x"][:, :, 40 : 40 + SIDE, 40 : 40 + SIDE])} for page in data(pages, count)]


def calibration_crops() -> list[dict[str, np.ndarray]]:
    return _crops(ZOO["OCR4d"].calibration, 16)


def evaluation_crops() -> list[dict[str, np.ndarray]]:
    return _crops(ZOO["OCR4d"].evaluation, int(os.environ["EDGEQ_ZOO_EVALUATION"]))


def ink(values: dict[str, np.ndarray], _: object) -> float:
    """Share of a crop that is ink, which DBNet's boxes are made of."""
    return float((next(array for name, array in values.items() if name != "x") > 0.3).mean())


@pytest.mark.parametrize("formats", RECIPES)
@pytest.mark.parametrize("name", ["EFL0", "BFf", "OCR4d"])
def test_zoo_model_runs_whole_on_the_npu_and_keeps_its_accuracy(
    name: str, formats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = formats == "a16w8"
    monkeypatch.setenv("EDGEQ_ZOO_CALIBRATION", "16")
    monkeypatch.setenv("EDGEQ_ZOO_EVALUATION", str(SAMPLES if wide else 4))
    entry, crops = ZOO[name], name == "OCR4d"
    recipe = ROUNDED if wide else RECIPES[formats]  # with 16-bit activations the weights' rounding is what is left
    report = edgeq.export(
        float_model(name), target=TARGET, recipe=recipe, out=tmp_path / "model.edgeq", max_drop=0.01,
        calibration="tests.test_qnn:calibration_crops" if crops else entry.calibration,
        evaluation="tests.test_qnn:evaluation_crops" if crops else entry.evaluation,
        metric="tests.test_qnn:ink" if crops else entry.metric,
    )  # fmt: skip
    assert report.artifact is not None and report.coverage is not None
    assert report.coverage.integer_macs_share == 1.0
    left = on_cpu(Path(report.artifact.path))
    assert set(left) <= {"QuantizeLinear", "DequantizeLinear"}
    assert left.total() <= len(report.artifact.inputs) + len(report.artifact.outputs)
    if wide:
        drop = next(check for check in report.checks if check.name.endswith("_drop"))
        assert drop.samples == SAMPLES
        assert not crops or report.check("ink_reference").value > 0.02, "there is text on them"
        assert drop.value <= 0.01


def test_zoo_lines_of_any_width_run_in_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEQ_ZOO_CALIBRATION", "16")
    monkeypatch.setenv("EDGEQ_ZOO_EVALUATION", "6")
    entry = ZOO["OCR4r"]
    report = edgeq.export(
        float_model("OCR4r"), target=TARGET, recipe=RECIPES["a8w8"], out=tmp_path / "model.edgeq", max_drop=0.02,
        calibration=entry.calibration, evaluation=entry.evaluation, metric=entry.metric,
        buckets=["x=1,3,48,320", "x=1,3,48,640"],
    )  # fmt: skip
    assert report.passed and report.coverage is not None and report.coverage.integer_macs_share == 1.0
    for file in read_directory(tmp_path / "model.edgeq").variants[0].files:
        assert on_cpu(file) == {"QuantizeLinear": 1, "DequantizeLinear": 1}
    codes = {notice.code for notice in report.notices}
    assert "padding-alone" in codes and "bucket-placement" not in codes
    assert report.check("size_ratio").value < 0.35, "weights once"


# --- ahead of time --------------------------------------------------------------------------------------------------

ARCHES = {"npu-qnn-v73": "43", "npu-qnn-v75": "57", "npu-qnn-v79": "69", "npu-qnn-v81": "87"}


def test_contexts_of_several_devices_say_what_they_are_for(
    exported: dict[str, tuple[Report, Path]], tmp_path: Path
) -> None:
    report, package = exported["a8w8"]
    made = compile_for(package, list(ARCHES), tmp_path)
    assert [one.made_for["htp_arch"] for one in made] == [name[-2:] for name in ARCHES]
    assert [one.made_for["soc_model"] for one in made] == list(ARCHES.values())
    assert {one.nodes["EPContext"] for one in made} == {1}
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin"] * 4 + [".onnx"] * 4
    feed = {"image": small_net.images(1, seed=5)}
    assert report.artifact is not None
    whole = open_session(Path(report.artifact.path), provider=load_target(TARGET).execution)
    ahead = open_session(tmp_path / f"{TARGET}.onnx", provider=load_target(TARGET).execution)
    np.testing.assert_array_equal(run_session(ahead, feed)["logits"], run_session(whole, feed)["logits"])
    with pytest.raises(ModelError, match="is compiled for htp_arch 79, QNNExecutionProvider is to run it on 75"):
        open_session(tmp_path / "npu-qnn-v79.onnx", provider=load_target(TARGET).execution)
    with pytest.raises(OutputError, match=r"npu-qnn-v75.onnx exists"):
        compile_for(package, [TARGET], tmp_path)


def test_model_that_would_leave_nodes_to_the_cpu_is_not_compiled(tmp_path: Path) -> None:
    edgeq.ir.io.write(
        graph("(float[1,8,6,6] x) => (float[1,8,6,6] y) { t = Relu(x) u = Erf(t) y = Relu(u) }"), tmp_path / "net.onnx"
    )
    with pytest.raises(ModelError, match=r"leaves Erf of .* to the CPU"):
        compile_for(tmp_path / "net.onnx", [TARGET], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


# --- the forecast ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["EFL0", "BFf", "OCRcls"])
def test_forecast_is_what_the_provider_does(name: str) -> None:
    agreed, count, wrong = compare(name, TARGET)
    assert count > 50
    assert agreed >= 0.98 * count, wrong
