"""Quantization against ONNX Runtime's own kernels, and the properties every mapping has."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from edgeq.errors import RecipeError
from edgeq.num.fit import fit_weight
from edgeq.num.formats import BF16, F16, F32, Float, Int, parse_format
from edgeq.num.quant import Coded, QParams, Quant, code_range, dequantize, fake_quant, parse_quant, quantize

ONNX_TYPES = {
    "u8": TensorProto.UINT8,
    "i8": TensorProto.INT8,
    "u16": TensorProto.UINT16,
    "i16": TensorProto.INT16,
    "u4": TensorProto.UINT4,
    "i4": TensorProto.INT4,
}
WIDE = {name: TensorProto.INT32 if "16" in name else TensorProto.INT8 for name in ONNX_TYPES} | {
    "u8": TensorProto.UINT8,
    "u4": TensorProto.UINT8,
}
GRAINS = {"tensor": (), "channel": (7,), "block16": (3, 7)}


def run_kernels(x: np.ndarray, params: QParams, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and reals that ONNX Runtime's QuantizeLinear and DequantizeLinear make of ``x`` f32."""
    attributes = {} if params.axis is None else {"axis": params.axis}
    if params.quant.block > 0:
        attributes["block_size"] = params.quant.block
    kind, shape = ONNX_TYPES[name], params.scale.shape
    zero = helper.make_tensor("zero", kind, shape, params.zero_point.reshape(-1).tolist())
    scale = helper.make_tensor("scale", TensorProto.FLOAT, shape, params.scale.reshape(-1).tolist())
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], **attributes),
        helper.make_node("Cast", ["q"], ["codes"], to=WIDE[name]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["real"], **attributes),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)]
    outputs = [helper.make_tensor_value_info("codes", WIDE[name], x.shape)]
    outputs.append(helper.make_tensor_value_info("real", TensorProto.FLOAT, x.shape))
    graph = helper.make_graph(nodes, "g", inputs, outputs, [scale, zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    codes, real = session.run(None, {"x": x})
    return codes, real


def mapping_of(name: str, grain: str, rng: np.random.Generator) -> QParams:
    """A random full-range mapping of a [45, 7] tensor: per channel along axis 1, per block along axis 0."""
    quant = parse_quant(f"{name}/{grain}/asym")
    lo, hi = code_range(quant)
    scale = np.asarray(rng.uniform(0.5, 2, GRAINS[grain]) * 8 / (hi - lo), np.float32)
    zero = np.asarray(rng.integers(lo, hi + 1, GRAINS[grain]), np.int32)
    return QParams(quant, scale, zero, {"tensor": None, "channel": 1, "block16": 0}[grain])


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("name", ONNX_TYPES)
def test_quantize_and_dequantize_equal_the_kernels(name: str, grain: str) -> None:
    rng = np.random.default_rng(len(name) + len(grain))
    params = mapping_of(name, grain, rng)
    x = (rng.normal(size=(45, 7)) * 6).astype(np.float32)
    # Whole half steps show the rounding of ties.
    x[:8] = (rng.integers(-40, 40, (8, 7)) + 0.5) * (params.scale if params.scale.ndim < 2 else params.scale[0])
    codes, real = run_kernels(x, params, name)
    np.testing.assert_array_equal(quantize(x, params), codes.astype(np.int32))
    np.testing.assert_array_equal(fake_quant(x, params), real)


def test_a_negative_scale_dequantizes_as_the_kernel_does() -> None:
    params = QParams(parse_quant("i4/channel/asym"), np.array([-0.5, 0.25], np.float32), np.zeros(2, np.int32), 1)
    codes = np.array([[-8, 7], [7, -8], [3, -1]], np.int32)
    stored = helper.make_tensor("codes", TensorProto.INT4, codes.shape, codes.reshape(-1).tolist())
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [2], params.scale.tolist())
    node = helper.make_node("DequantizeLinear", ["codes", "scale"], ["real"], axis=1)
    real = helper.make_tensor_value_info("real", TensorProto.FLOAT, codes.shape)
    model = helper.make_model(
        helper.make_graph([node], "g", [], [real], [stored, scale]),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(dequantize(codes, params), session.run(None, {})[0])


def test_a_negative_axis_counts_from_the_end() -> None:
    scale, zero = np.array([1, 2, 4], np.float32), np.zeros(3, np.int32)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    forward, backward = (QParams(parse_quant("i8/channel"), scale, zero, axis) for axis in (1, -1))
    np.testing.assert_array_equal(quantize(x, forward), quantize(x, backward))


def test_32_bit_codes_reach_their_ends() -> None:
    params = QParams(Quant(Int(32, True)), np.array(1e-3, np.float32), np.array(0, np.int32))
    np.testing.assert_array_equal(quantize(np.array([-1e9, 0, 1e9]), params), [-(2**31) + 1, 0, 2**31 - 1])


def test_codes_can_be_fewer_or_more_than_the_mappings() -> None:
    x, one, zero = np.array([-500, 500], np.float32), np.array(1, np.float32), np.array(0, np.int32)
    assert quantize(x, QParams(parse_quant("i8/channel"), one, zero)).tolist() == [-127, 127]
    assert quantize(x, QParams(parse_quant("i8/channel"), one, zero, codes=(-64, 64))).tolist() == [-64, 64]
    assert quantize(x, QParams(parse_quant("i4/channel"), one, zero, codes=(-8, 7))).tolist() == [-8, 7]


@given(
    hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-1e4, 1e4, width=32)),
    st.sampled_from(sorted(ONNX_TYPES)),
    st.booleans(),
    st.floats(2.0**-10, 2.0**10, width=32),
)
def test_representable_values_stay_and_others_move_half_a_step(
    x: np.ndarray, name: str, symmetric: bool, scale: float
) -> None:
    quant = Quant(parse_format(name), 0, symmetric)
    lo, hi = code_range(quant)
    middle = (lo + hi) // 2
    params = QParams(quant, np.array(scale, np.float32), np.array(middle, np.int32))
    real = fake_quant(x, params)
    np.testing.assert_array_equal(fake_quant(real, params), real)
    inside = (x >= (lo - middle) * scale) & (x <= (hi - middle) * scale)
    # x / scale rounds once, relative 2**-24, before it is rounded to a code.
    assert (np.abs(real - x)[inside] <= scale / 2 + np.abs(x[inside]) * 2.0**-23).all()
    order = np.argsort(x)
    assert (np.diff(real[order]) >= 0).all()


@pytest.mark.parametrize("text", ["u8", "i8", "i4", "u2", "i16", "f32", "f16", "bf16", "f8e4m3", "f8e5m2", "f4e2m1"])
def test_formats_have_one_text_form(text: str) -> None:
    assert str(parse_format(text)) == text


@pytest.mark.parametrize("text", ["u8/tensor/asym", "i8/channel", "u4/block32/asym", "i16/tensor", "f16/tensor"])
def test_mappings_have_one_text_form(text: str) -> None:
    assert str(parse_quant(text)) == text


def test_formats_know_their_ends() -> None:
    assert (Int(4, True).lo, Int(4, True).hi, Int(8, False).lo, Int(8, False).hi) == (-8, 7, 0, 255)
    assert (F32.bits, F16.bits, BF16.bits, Float(4, 3).bits) == (32, 16, 16, 8)
    assert code_range(parse_quant("u8")) == (1, 255)


@pytest.mark.parametrize("text", ["i9", "float", "u8/row", "u8/block0", ""])
def test_what_no_format_is_called_is_told(text: str) -> None:
    with pytest.raises(RecipeError, match="unknown") as caught:
        parse_quant(text)
    assert "use" in caught.value.hint


def test_a_float_format_has_no_codes() -> None:
    with pytest.raises(TypeError, match="f16/tensor has no integer codes"):
        code_range(parse_quant("f16"))


@pytest.mark.parametrize(
    ("text", "dtype"),
    {
        "i2/channel": "int8", "i8/channel": "int8", "u4/block16/asym": "uint8", "u8/tensor/asym": "uint8",
        "i16/channel": "int16", "u16/tensor/asym": "uint16", "f4e2m1/block16": "uint8", "f8e4m3/channel": "uint8",
        "bf16/tensor": "uint16",
    }.items(),
)  # fmt: skip
def test_codes_are_kept_in_the_narrowest_type(text: str, dtype: str) -> None:
    """The outermost codes come back, so nothing wraps around."""
    quant = parse_quant(text)
    x = np.random.default_rng(5).normal(size=(8, 64)).astype(np.float32)
    params = fit_weight(x, quant, None if quant.block == 0 else 1 if quant.block > 0 else 0)
    wide = quantize(x, params)
    coded = Coded(params, wide)
    assert coded.codes.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(coded.codes, wide)
    np.testing.assert_array_equal(dequantize(coded.codes, params), dequantize(wide, params))
