"""Packages for Core ML. There is none of it here, so a package is read back as an ONNX file (tests/mil_worker.py) and
that one is computed beside the file it was made of."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgeq.ahead import compile_for
from edgeq.errors import ModelError, RuntimeUnavailableError, TargetError
from edgeq.ir import io
from edgeq.num.metrics import snr_db
from edgeq.run.session import open_session, run_session
from edgeq.target.context import Compiled
from edgeq.target.environment import python_in
from edgeq.target.load import load_target
from tests import small_net
from tests.environments import needed
from tests.graphs import Arrays, graph, normal
from tests.placed import placed
from tests.zoo.packages import float_model

TARGET = "npu-coreml"
READER = Path(__file__).with_name("mil_worker.py")
PIN = ["image=1,3,32,32"]
RELU = "(float[1,4] x) => (float[1,4] y) { y = Relu(x) }"


def mine(folder: Path, key: str) -> str:
    """A target of one's own that differs in ``key``."""
    path = folder / "mine.toml"
    path.write_text(f'extends = "{TARGET}"\nsummary = "x"\nverified = "documentation"\n{key}\n')
    return str(path)


def refused(text: str, folder: Path, weights: Arrays | None = None, opset: int = 20) -> ModelError:
    io.write(graph(text, weights, opset=opset), folder / "net.onnx")
    with pytest.raises(ModelError) as error:
        compile_for(folder / "net.onnx", [TARGET], folder / "out")
    return error.value


def test_missing_tools_are_named_with_what_makes_their_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEQ_ENVIRONMENTS", str(tmp_path / "none"))
    io.write(graph(RELU), tmp_path / "net.onnx")
    with pytest.raises(RuntimeUnavailableError, match="onnx2coreml needs a Python environment of its own") as error:
        compile_for(tmp_path / "net.onnx", [TARGET], tmp_path / "out")
    assert "pip install onnx2coreml==1.1.0 coremltools==9.0" in error.value.hint


def test_environment_of_tools_holds_no_provider(tmp_path: Path) -> None:
    provider = load_target(TARGET).execution
    assert not provider.environment and not provider.packages
    if provider.name not in _providers():
        with pytest.raises(RuntimeUnavailableError, match=provider.name) as error:
            open_session(graph(RELU), provider=provider)
        assert "on macOS: the onnxruntime wheel holds it" in error.value.hint


def _providers() -> list[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ("float[N,4] x", "input 'x' of .* has no fixed shape", "--input x=1,3,224,224"),
        ("float x", "input 'x' of .* is a scalar", "fixes a scalar"),
        ("uint8[1,4] x", "input 'x' of .* is UINT8", "tensors of f32, f16, i32 or bool"),
    ],
)
def test_inputs_that_core_ml_lacks(given: str, message: str, hint: str, tmp_path: Path) -> None:
    error = refused(f"({given}) => (float[N,4] y) {{ t = Cast<to=1>(x) y = Add(t, w) }}", tmp_path, {"w": normal(1, 4)})
    assert hint in error.hint
    with pytest.raises(ModelError, match=message):
        raise error


def test_floats_that_ml_programs_lack(tmp_path: Path) -> None:
    io.write(graph(RELU), tmp_path / "net.onnx")
    with pytest.raises(TargetError, match="target 'mine' computes floats in bf16, ML programs in f16 or f32"):
        compile_for(tmp_path / "net.onnx", [mine(tmp_path, 'float_format = "bf16"')], tmp_path / "out")


def compiled(model: ir.Model, folder: Path, target: str = TARGET) -> tuple[Compiled, ir.Model]:
    """A package, and the same read back."""
    environment = needed(TARGET).environment
    io.write(model, folder / "net.onnx")
    (made,) = compile_for(folder / "net.onnx", [target], folder / "out", inputs=PIN, force=True)
    return made, read_back(made.path, environment, folder)


def read_back(package: Path, environment: str, folder: Path) -> ir.Model:
    command = [python_in(environment), "-P", READER, str(package), str(folder / "back.onnx")]
    subprocess.run(command, check=True, capture_output=True)
    return io.read(folder / "back.onnx")


def snr(model: ir.Model, back: ir.Model, name: str = "image") -> float:
    """How near the second model's only output is to the first one's, each node as ONNX defines it."""
    feed = {name: small_net.images(1, seed=9)}
    (expected,), (found,) = (run_session(open_session(one, level="none"), feed).values() for one in (model, back))
    return float(snr_db(expected, found).min())


@pytest.mark.slow
def test_float_model_has_its_weights_in_16_bits(tmp_path: Path) -> None:
    model = small_net.model()
    made, back = compiled(model, tmp_path)
    assert made.path == tmp_path / "out" / "npu-coreml.mlpackage" and (made.path / "Manifest.json").is_file()
    assert made.fidelity is None, "nobody ran it"
    assert made.made_for == {
        "sdk": "onnx2coreml 1.1.0, coremltools 9.0", "system": "iOS17", "floats": "f16", "inputs": "image",
        "outputs": "logits",
    }  # fmt: skip
    assert made.nodes == {
        "conv": 4, "relu": 2, "cast": 2, "clip": 1, "add": 1, "max_pool": 1, "reduce_mean": 1, "reshape": 1,
        "linear": 1,
    }  # fmt: skip
    exact, stored = ([value.const_value for value in weights(one)] for one in (model, back))
    assert len(exact) == len(stored) == 5
    for one, other in zip(exact, stored, strict=True):
        assert one is not None and other is not None
        wide, narrow = one.numpy(), other.numpy()
        np.testing.assert_array_equal(narrow, wide.astype(np.float16).astype(np.float32))
    assert (
        snr(model, back) > 50
    )  # 5 layers, each off by 2^-12 or so, are 67 dB; the last bias takes most of it away again


def weights(model: ir.Model) -> list[ir.Value]:
    products = [node.inputs[1] for node in model.graph if node.op_type in ("Conv", "Gemm", "MatMul")]
    return [value for value in products if value is not None]


@pytest.mark.slow
@pytest.mark.parametrize(("floats", "least"), [("f32", 120), ("f16", 25)])
def test_quantized_model_keeps_its_codes(floats: str, least: float, tmp_path: Path) -> None:
    """In f32 a package computes what the file does, so no Q/DQ is lost or moved. In f16 scales are off by up to 2^-11,
    and a tensor whose value lies near the border of two codes gets the other one."""
    made = placed(small_net.model(), feeds=[{"image": small_net.images(1, seed)} for seed in range(8)])
    constants = [node for node in made.model.graph if node.op_type == "DequantizeLinear" and stored_codes(node)]
    package, back = compiled(made.model, tmp_path, mine(tmp_path, f'float_format = "{floats}"'))
    assert len(constants) == 5 and package.nodes["constexpr_affine_dequantize"] == 5
    quantized = sum(node.op_type == "QuantizeLinear" for node in made.model.graph)
    assert package.nodes["quantize"] == quantized - 1, "coremltools lets the Reshape move codes"
    assert least < snr(made.model, back) < 150, "the same bits would mean that scales weren't rounded"


def stored_codes(node: ir.Node) -> bool:
    codes = node.inputs[0]
    return codes is not None and codes.const_value is not None and codes.const_value.dtype == ir.DataType.INT8


@pytest.mark.slow
def test_what_the_tools_refuse_is_named(tmp_path: Path) -> None:
    needed(TARGET)
    texts = {
        "(float[1,4] x) => (float[1,4] y) { y = CumSum(x, axis) }": "node '.*': it has no CumSum",
        "(float[1,4] x) => (float[1,4] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }":
            r"node '.*' \(QuantizeLinear\): codes are uint16, Core ML's uint8 or int8",
        "(float[1,4] x) => (float[1,4] y) { q = QuantizeLinear(x, tiny) y = DequantizeLinear(q, tiny) }":
            r"node '.*' \(QuantizeLinear\): no scale of a program in 16-bit floats is 1e-06",
    }  # fmt: skip
    constants = {
        "axis": np.array(1, np.int64), "s": np.array(0.1, np.float32), "z": np.array(300, np.uint16),
        "tiny": np.array(1e-6, np.float32),
    }  # fmt: skip
    for text, message in texts.items():
        used = {name: array for name, array in constants.items() if f" {name})" in text or f" {name}," in text}
        with pytest.raises(ModelError, match=f"onnx2coreml 1.1.0, coremltools 9.0 can't compile .*: {message}"):
            raise refused(text, tmp_path, used, opset=21)


@pytest.mark.slow
def test_weights_whose_scales_no_f16_holds_are_stored_as_numbers(tmp_path: Path) -> None:
    environment = needed(TARGET).environment
    text = "(float[1,4,6,6] x) => (float[1,2,6,6] y) { w = DequantizeLinear<axis=0>(codes, s) y = Conv(x, w) }"
    codes = np.arange(-4, 4, dtype=np.int8).reshape(2, 4, 1, 1)
    for scale, stored in ((1e-6, None), (1e-3, 1)):  # f16 has 1e-6 to within 5 %, and the second channel's 0
        given = {"codes": codes, "s": np.array([scale, 1e-9], np.float32)}
        io.write(graph(text, given, opset=20), tmp_path / "net.onnx")
        (made,) = compile_for(tmp_path / "net.onnx", [TARGET], tmp_path / "out", force=True)
        assert made.nodes.get("constexpr_affine_dequantize") == stored
        (weight,) = weights(read_back(made.path, environment, tmp_path))
        assert weight.const_value is not None
        exact = codes[0].astype(np.float32) * np.float32(scale)
        np.testing.assert_allclose(weight.const_value.numpy()[0], exact, rtol=2**-10, atol=2**-25)


@pytest.mark.slow
@pytest.mark.zoo
def test_zoo_model_read_back_computes_the_same(tmp_path: Path) -> None:
    environment = needed(TARGET).environment
    source = float_model("OCRcls")
    (made,) = compile_for(source, [TARGET], tmp_path, inputs=["x=1,3,48,192"])
    assert made.nodes["conv"] == 53 and made.nodes["sigmoid_hard"] == 9
    feed = {"x": normal(1, 3, 48, 192)}
    back = read_back(made.path, environment, tmp_path)
    (expected,), (found,) = (run_session(open_session(one), feed).values() for one in (io.read(source), back))
    assert snr_db(expected, found).min() > 45  # 53 layers in 16-bit floats
