"""Providers whose builds of the runtime live in Python environments of their own: OpenVINO, and WebGPU on a software
adapter. The CPU's own provider computes what is expected; what ran where is asked of the runtime."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import edgeq
from edgeq import steps
from edgeq.analyse.taken import placed_on
from edgeq.context import Context
from edgeq.errors import RuntimeUnavailableError, UsageError
from edgeq.ir import io
from edgeq.report.record import Report
from edgeq.report.recorder import Recorder
from edgeq.run.record import Feed
from edgeq.run.samples import load_samples
from edgeq.run.session import open_session, run_session
from edgeq.run.timing import TimedConfig, compare
from edgeq.source import read_model
from edgeq.target import isolated, placement
from edgeq.target.detect import elsewhere
from edgeq.target.environment import commands, python_for
from edgeq.target.load import load_target
from edgeq.target.oracle import Oracle
from edgeq.target.patterns import table
from edgeq.target.record import CPU, Target
from tests import small_net
from tests.environments import needed
from tests.graphs import graph, normal, ops
from tests.placed import samples_of
from tests.zoo import ZOO
from tests.zoo.packages import float_model

OPENVINO, WEBGPU = "OpenVINOExecutionProvider", "WebGpuExecutionProvider"
CHROMIUM = Path("/usr/lib/chromium")  # of Debian, which ships a software adapter and a loader of Vulkan for it
OPSET = 20
STEP_TEXT = "(float[1,8,6,6] x) => (float[1,8,6,6] y) { t = Relu(x) u = Hardmax(t) y = Relu(u) }"


@pytest.mark.parametrize("name", ["cpu-openvino", "gpu-webgpu"])
def test_missing_environment_is_named_with_what_makes_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEQ_ENVIRONMENTS", str(tmp_path))
    target = load_target(name)
    with pytest.raises(RuntimeUnavailableError, match=f"'{target.environment}': there is no {tmp_path}") as error:
        Oracle(target, tmp_path)
    assert error.value.hint.endswith(" ".join(commands(target.environment, target.packages)[-1]))
    assert error.value.exit_status == 3


@pytest.fixture
def openvino() -> Target:
    return needed("cpu-openvino")


@pytest.fixture
def webgpu(monkeypatch: pytest.MonkeyPatch) -> Target:
    """The target, on Chromium's software adapter where there is no GPU."""
    target = needed("gpu-webgpu")
    if not any(Path("/dev").glob("dri/renderD*")):
        if not (CHROMIUM / "libvk_swiftshader.so").is_file():
            pytest.skip("neither a GPU nor Chromium's software adapter: make browser")
        monkeypatch.setenv("VK_ICD_FILENAMES", str(CHROMIUM / "vk_swiftshader_icd.json"))
        monkeypatch.setenv("LD_LIBRARY_PATH", str(CHROMIUM))
    return target


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    small_net.write(folder)
    return folder


def export(files: Path, target: str, out: Path, recipe: str) -> Report:
    return edgeq.export(
        files / "net.onnx", target=target, recipe=recipe, max_drop=0.05, out=out,
        calibration=str(files / "calibration.npz"), evaluation=str(files / "evaluation.npz"),
    )  # fmt: skip


def zoo_model(name: str) -> tuple[ir.Model, Feed]:
    """The float model, its shapes pinned to those of the first calibration sample, and that."""
    model, _ = read_model(float_model(name), opset=OPSET)
    feed = load_samples(ZOO[name].calibration, model, limit=1).read(0)
    pinned, _ = read_model(float_model(name), opset=OPSET, pins={key: array.shape for key, array in feed.items()})
    return pinned, feed


def far(name: str, target: Target) -> float:
    """The largest distance of the float zoo model's outputs on ``target`` from those on the CPU, of their peak."""
    model, feed = zoo_model(name)
    expected, found = (run_session(open_session(model, provider=one), feed) for one in (CPU, target.execution))
    return max(float(np.abs(array - found[key]).max() / np.abs(array).max()) for key, array in expected.items())


def placed(name: str, target: Target) -> Counter[str]:
    """Provider -> nodes of the float zoo model it was given, or ran."""
    return Counter(owner.provider for owner in placed_on(zoo_model(name)[0], target).assigned.values())


# --- OpenVINO ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_openvino_answers_from_its_own_environment(openvino: Target, tmp_path: Path) -> None:
    assert python_for(openvino.execution) != sys.executable
    oracle = Oracle(openvino, tmp_path)
    assert isolated.version_of(openvino.execution) == "onnxruntime-openvino-1.24.1"
    assert "onnxruntime-openvino-1.24.1" in oracle.path.name, "answers of another build don't count"
    answers = {row.pattern: row.verdicts[0] for row in table(openvino, oracle)}
    assert answers["Conv"].kind == "integer" and answers["Conv"].reason == f"{OPENVINO} takes it with its Q/DQ"


@pytest.mark.slow
def test_export_is_judged_and_timed_on_openvino(openvino: Target, files: Path, tmp_path: Path) -> None:
    report = export(files, "cpu-openvino", tmp_path / "net.edgeq", "canonicalize; quantize")
    assert report.passed and report.artifact is not None
    assert set(report.latency["artifact"]) == {"1", "2"}, "measured, at both thread counts"
    if report.coverage is not None:  # the integer file won the race, which on another CPU it may not
        assert report.coverage.integer_macs_share == 1.0
        assert set(report.coverage.providers) == {OPENVINO}


@pytest.mark.slow
def test_providers_of_different_environments_are_not_timed_together(openvino: Target, files: Path) -> None:
    configs = [TimedConfig("a", files / "net.onnx"), TimedConfig("b", files / "net.onnx", provider=openvino.execution)]
    with pytest.raises(UsageError, match="can't time providers of different Python environments side by side"):
        compare(configs, [{"image": small_net.images(1, seed=5)}])


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["BFf", "OCRcls", "MAGIKA"])
def test_zoo_model_computes_the_same_on_openvino(openvino: Target, name: str) -> None:
    assert far(name, openvino) < 1e-4
    assert set(placed(name, openvino)) == {OPENVINO}


# --- WebGPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_webgpu_is_believed_by_what_ran(webgpu: Target, tmp_path: Path) -> None:
    """The runtime names none of the nodes it gives to WebGPU."""
    model, provider = graph(STEP_TEXT), webgpu.execution
    io.write(model, tmp_path / "net.onnx")
    told = isolated.call(provider, placement._ask, tmp_path / "net.onnx", provider, {}, None, tmp_path)
    owners = {owner.provider for owner in told.assigned.values()}
    assert WEBGPU not in owners, "if it does now, take it off provider.SILENT"
    found = {name: owner.provider for name, owner in placed_on(model, webgpu).assigned.items() if "Memcpy" not in name}
    assert list(found.values()) == [WEBGPU, CPU.name, WEBGPU]


@pytest.mark.slow
def test_model_that_webgpu_runs_nothing_of_is_an_error_at_its_first_run(webgpu: Target) -> None:
    session = open_session(graph("(float[1,4] x) => (float[1,4] y) { y = Hardmax(x) }"), provider=webgpu.execution)
    with pytest.raises(RuntimeUnavailableError, match=f"{WEBGPU} took no node"):
        run_session(session, {"x": np.zeros((1, 4), np.float32)})


@pytest.mark.slow
def test_16_bit_floats_are_asked_of_the_adapter(webgpu: Target) -> None:
    """Software adapters have none, whatever the provider's kernels could do; a GPU has."""
    weights = {"w": normal(64, 64) / 8}
    model, _ = read_model(
        graph("(float[4,64] x) => (float[4,64] y) { a = MatMul(x, w) y = Relu(a) }", weights), opset=webgpu.opset
    )
    context = Context(webgpu, Oracle(webgpu), samples_of([{"x": normal(4, 64)}]), Recorder())
    result = steps.half(model, context, format="f16")
    if not elsewhere(webgpu):
        assert ops(result) == ["Cast", "MatMul", "Relu", "Cast"]
        return
    assert ops(result) == ["MatMul", "Relu"]
    told = [one.message for one in context.recorder.notices if one.code == "kept-f32"]
    assert len(told) == 2 and all("requires f16 but the device does not support it" in one for one in told)


@pytest.mark.slow
def test_quantized_nodes_are_float_on_webgpu(webgpu: Target, tmp_path: Path) -> None:
    row = next(row for row in table(webgpu, Oracle(webgpu, tmp_path)) if row.pattern == "Conv")
    assert (row.verdicts[0].kind, row.verdicts[0].reason) == ("float", f"{WEBGPU} computes Conv in float")


@pytest.mark.slow
def test_export_on_a_software_adapter_times_nothing(webgpu: Target, files: Path, tmp_path: Path) -> None:
    if any(Path("/dev").glob("dri/renderD*")):
        pytest.skip("this machine has a GPU")
    report = export(files, "gpu-webgpu", tmp_path / "net.edgeq", "canonicalize")
    assert report.passed and report.check("snr_db").value > 80
    assert report.latency == {}
    assert next(notice for notice in report.notices if notice.code == "not-a-device").message.startswith(
        "this machine has none of /dev/dri/renderD*"
    )


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["BFf", "OCRcls"])
def test_zoo_model_computes_the_same_on_webgpu(webgpu: Target, name: str) -> None:
    assert far(name, webgpu) < 1e-4
    assert set(placed(name, webgpu)) == {WEBGPU}


@pytest.mark.slow
def test_webgpu_without_an_adapter_says_so(webgpu: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    if any(Path("/dev").glob("dri/renderD*")):
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(isolated, "_RUNNING", {})  # a process that knows no adapter
    monkeypatch.setenv("VK_ICD_FILENAMES", "/nowhere")
    with pytest.raises(RuntimeUnavailableError, match=f"{WEBGPU} can't start here: Failed to get a WebGPU adapter"):
        open_session(graph("(float[1,4] x) => (float[1,4] y) { y = Relu(x) }"), provider=webgpu.execution)
    isolated._end()
