"""Files compiled ahead of time that need no NPU: .ort for minimal builds, .rknn in Rockchip's simulator.

Contexts of Qualcomm's NPUs: tests/test_qnn.py; packages for Core ML: tests/test_coreml.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import edgeq
from edgeq.ahead import compile_for
from edgeq.cli import main
from edgeq.errors import ModelError, OutputError, RuntimeUnavailableError, UsageError
from edgeq.ir import io
from edgeq.packaging import write_directory
from edgeq.run.session import input_specs, open_session, run_session
from edgeq.target.detect import local_name
from edgeq.target.load import load_target
from tests import small_net
from tests.environments import needed
from tests.graphs import graph, normal
from tests.packaged import classifier
from tests.placed import placed

RKNN = "npu-rknn-rk3588"


def small(folder: Path) -> Path:
    """Two products on codes, written to ``folder``."""
    text = """(float[1,8,6,6] x) => (float[1,4,6,6] y) {
        t = Conv(x, w)
        u = Relu(t)
        y = Conv(u, v)
    }"""
    io.write(placed(text, {"w": normal(8, 8, 1, 1), "v": normal(4, 8, 1, 1)}).model, folder / "net.onnx")
    return folder / "net.onnx"


def test_ort_file_computes_the_same_and_lists_its_kernels(tmp_path: Path) -> None:
    source, out = small(tmp_path), tmp_path / "out"
    (made,) = compile_for(source, ["local"], out)
    assert made.path == out / f"{local_name()}.ort"
    assert made.fidelity == {"snr_db": 150.0, "cosine": pytest.approx(1), "max_abs": 0.0}
    feed = {"x": normal(1, 8, 6, 6)}
    ahead, whole = (run_session(open_session(path), feed)["y"] for path in (made.path, source))
    np.testing.assert_array_equal(ahead, whole)
    config = made.path.with_suffix(".config").read_text()
    assert "com.microsoft;1;" in config and "QLinearConv" in config
    assert str(tmp_path) not in config
    with pytest.raises(OutputError, match=r"\.ort exists"):
        compile_for(source, ["local"], out)
    compile_for(source, ["local"], out, force=True)


def test_shapes_of_inputs_are_pinned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A package's golden samples serve where they have that shape, else random ones do."""
    write_directory(classifier(tmp_path / "made"), tmp_path / "net.edgeq")
    for batch in (1, 2):
        arguments = ["compile", str(tmp_path / "net.edgeq"), "-t", "local", "-o", str(tmp_path / "out"), "--force"]
        assert main([*arguments, "--input", f"image={batch},3,32,32"]) == 0
        (spec,) = input_specs(open_session(tmp_path / "out" / f"{local_name()}.ort"))
        assert spec.shape == (batch, 3, 32, 32)
        assert "; beside the CPU: snr_db 1" in capsys.readouterr().out
    with pytest.raises(UsageError, match="input 'image' has size 3 on axis 1, the shape given says 4"):
        compile_for(tmp_path / "net.edgeq", ["local"], tmp_path / "other", inputs=["image=1,4,32,32"])


def test_targets_that_compile_nothing_ahead_say_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="files for CUDAExecutionProvider aren't compiled ahead of time"):
        compile_for(small(tmp_path), ["gpu-cuda"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ort_files_are_made_on_the_machine_they_are_for(tmp_path: Path) -> None:
    other = "cpu-arm64" if local_name().startswith("cpu-x64") else "cpu-x64-vnni"
    with pytest.raises(ModelError, match="holds the kernels of this machine: this CPU lacks"):
        compile_for(small(tmp_path), [other], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_toolkit_is_named_with_what_makes_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEQ_ENVIRONMENTS", str(tmp_path / "none"))
    with pytest.raises(RuntimeUnavailableError, match="rknn-toolkit2 needs a Python environment of its own") as error:
        compile_for(small(tmp_path), [RKNN], tmp_path / "out")
    assert "'setuptools<80' && " in error.value.hint, "a shell takes it as it is"
    assert error.value.hint.endswith("pip install --no-deps rknn-toolkit2==2.5.0")


@pytest.mark.slow
def test_rknn_file_of_a_quantized_model_agrees_with_the_cpu(tmp_path: Path) -> None:
    needed(RKNN)
    small_net.write(tmp_path)
    mine = tmp_path / "mine.toml"
    mine.write_text('extends = "cpu-arm64"\nsummary = "x"\nverified = "documentation"\nopset = 19\nfuse = []\n')
    edgeq.export(
        tmp_path / "net.onnx", target=str(mine), recipe="canonicalize; quantize", inputs=["image=1,3,32,32"],
        calibration=str(tmp_path / "calibration.npz"), evaluation=str(tmp_path / "evaluation.npz"), max_drop=0.1,
        out=tmp_path / "net.edgeq",
    )  # fmt: skip
    (made,) = compile_for(tmp_path / "net.edgeq", [RKNN], tmp_path / "out")
    assert made.path.read_bytes()[:4] == b"RKNN"
    assert made.made_for == {"sdk": "2.5.0", "target_platform": "rk3588"}
    assert made.fidelity["cosine"] > 0.99 and made.fidelity["snr_db"] > 18
    assert made.fidelity["snr_db"] < 60, "a simulator that computes what the CPU does simulates nothing"


@pytest.mark.slow
def test_rknn_refuses_what_the_toolkit_refuses(tmp_path: Path) -> None:
    needed(RKNN)
    io.write(graph("(float[1,4] x) => (float[1,4] y) { y = Relu(x) }"), tmp_path / "net.onnx")
    with pytest.raises(ModelError, match=r"rknn-toolkit2 2.5.0 can't compile .*: ValueError: Unsupport onnx opset"):
        compile_for(tmp_path / "net.onnx", [RKNN], tmp_path / "out")
    assert load_target(RKNN).opset == 19
