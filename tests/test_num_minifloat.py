"""Floating formats against ONNX Runtime, onnx's reference evaluator and a search through all numbers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from edgeq.errors import RecipeError
from edgeq.num.fit import fit_weight
from edgeq.num.formats import BF16, E2M1, E2M3, E3M2, E4M3, E5M2, E8M0, F16, F32, Float, Int
from edgeq.num.minifloat import decode, encode, largest
from edgeq.num.packing import group, pack
from edgeq.num.quant import (
    ALIASES,
    QParams,
    Quant,
    dequantize,
    fake_quant,
    parse_quant,
    quantize,
    scale_codes,
    scale_reals,
    snap,
)

SMALL = [E2M1, E2M3, E3M2, E4M3, E5M2]
LARGEST = {E2M1: 6, E2M3: 7.5, E3M2: 28, E4M3: 448, E5M2: 57344, F16: 65504}
ONNX_TYPES = {
    F16: TensorProto.FLOAT16, BF16: TensorProto.BFLOAT16, E4M3: TensorProto.FLOAT8E4M3FN, E5M2: TensorProto.FLOAT8E5M2,
    E2M1: TensorProto.FLOAT4E2M1, E2M3: TensorProto.FLOAT6E2M3, E3M2: TensorProto.FLOAT6E3M2,
}  # fmt: skip
REALS = st.floats(-100, 100, width=32)
RNG = np.random.default_rng(11)
WEIGHT = (RNG.normal(size=(70, 24)) * np.exp(RNG.normal(size=(1, 24)))).astype(np.float32)
ALL = [*ALIASES, "f8e4m3/tensor", "f8e5m2/channel", "f8e4m3/block16", "f6e3m2/block32", "f4e2m1/channel", "f16", "bf16",
       "u4/block32/asym/f16", "i4/block16/f8e4m3", "i8/channel/e8m0", "i2/block16/bf16", "u2/block16/asym"]  # fmt: skip


def numbers(form: Float) -> np.ndarray:
    """The finite numbers of a format, ascending."""
    real = decode(np.arange(1 << form.bits, dtype=np.int32), form)
    return np.unique(real[np.isfinite(real)])


def run(nodes: list[Any], inputs: dict[str, np.ndarray], initializers: list[Any], output: Any, opset: int) -> Any:
    """The output of a few nodes by ONNX Runtime up to opset 27, by onnx's reference evaluator behind it."""
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in inputs.items()]
    graph = helper.make_graph(nodes, "g", made, [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    if opset < 23:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, inputs)[0]
    return onnx.reference.ReferenceEvaluator(model).run(None, inputs)[0]


@pytest.mark.parametrize("form", SMALL, ids=str)
def test_the_largest_numbers_are_those_of_the_specification(form: Float) -> None:
    assert largest(form) == LARGEST[form] == numbers(form).max()
    assert (
        encode(np.array([1e9, -1e9, np.inf]), form).tolist()
        == encode(np.array([1, -1, 1]) * largest(form), form).tolist()
    )


@pytest.mark.parametrize("form", [*SMALL, F16, BF16], ids=str)
@given(hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(-(2.0**17), 2.0**17, width=32)))
def test_a_code_is_the_nearest_number_and_stays(form: Float, x: np.ndarray) -> None:
    near = decode(encode(x, form), form)
    np.testing.assert_array_equal(decode(encode(near, form), form), near)
    assert (np.diff(near[np.argsort(x)]) >= 0).all()
    real = numbers(form)
    distance = np.abs(x[:, None].astype(np.float64) - real)
    np.testing.assert_array_equal(np.abs(near.astype(np.float64) - x), distance.min(1))
    two = (distance == distance.min(1, keepdims=True)).sum(1) == 2
    assert (encode(x[two], form) % 2 == 0).all(), "half way between two numbers the even code is taken"


@pytest.mark.parametrize("form", ONNX_TYPES, ids=str)
def test_casts_equal_the_runtimes_and_the_reference_evaluators(form: Float) -> None:
    real = numbers(form)
    halves = real[1:] / 2 + real[:-1] / 2
    x = np.concatenate([real[::7], halves[:: max(1, len(real) // 500)], RNG.normal(size=300) * 10]).astype(np.float32)
    x = x[np.abs(x) <= largest(form)]
    opset = 21 if form not in (E2M1, E2M3, E3M2) else 28
    kind = ONNX_TYPES[form]
    nodes = [helper.make_node("Cast", ["x"], ["q"], to=kind), helper.make_node("Cast", ["q"], ["y"], to=1)]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)
    np.testing.assert_array_equal(run(nodes, {"x": x}, [], y, opset), decode(encode(x, form), form))


@pytest.mark.parametrize("grain", ["tensor", "channel", "block16"])
@pytest.mark.parametrize("form", [*SMALL], ids=str)
def test_quantize_and_dequantize_equal_the_operators(form: Float, grain: str) -> None:
    """Block scales by the reference evaluator alone: the runtime's QuantizeLinear has none for f8."""
    quant = parse_quant(f"{form}/{grain}")
    x = WEIGHT[:64]
    params = fit_weight(x * 2, quant, {"tensor": None, "channel": 1, "block16": 0}[grain])
    params = QParams(quant, params.scale / 3, params.zero_point, params.axis)  # some values lie beyond the largest
    attributes = {} if params.axis is None else {"axis": params.axis}
    if quant.block > 0:
        attributes["block_size"] = quant.block
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=ONNX_TYPES[form], **attributes),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"], **attributes),
    ]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)
    opset = 21 if form in (E4M3, E5M2) and quant.block <= 0 else 28
    scale = numpy_helper.from_array(params.scale, "s")
    np.testing.assert_array_equal(run(nodes, {"x": x}, [scale], y, opset), fake_quant(x, params))


def test_mx_blocks_dequantize_as_the_reference_evaluator_does() -> None:
    """Opset 24 has scales in e8m0: the bytes we store are what it takes."""
    x = WEIGHT[:64]
    params = fit_weight(x, parse_quant("mxfp4"), 0)
    codes = quantize(x, params)
    stored = helper.make_tensor("q", TensorProto.FLOAT4E2M1, x.shape, pack(codes.reshape(-1), 4).tobytes(), raw=True)
    scale = helper.make_tensor(
        "s", TensorProto.FLOAT8E8M0, params.scale.shape, scale_codes(params).astype(np.uint8).tobytes(), raw=True
    )
    node = helper.make_node("DequantizeLinear", ["q", "s"], ["y"], axis=0, block_size=32, output_dtype=1)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)
    np.testing.assert_array_equal(run([node], {}, [stored, scale], y, 24), dequantize(codes, params))


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_codes_are_packed_as_onnx_packs_them(bits: int) -> None:
    kinds = {2: (TensorProto.UINT2, TensorProto.INT2), 4: (TensorProto.UINT4, TensorProto.INT4),
             6: (TensorProto.FLOAT6E2M3, TensorProto.FLOAT6E3M2)}[bits]  # fmt: skip
    for kind, count in itertools.product(kinds, (12, 13, 14, 15)):
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        codes = RNG.integers(0, 1 << bits, count).astype(np.uint8)
        signed = codes.astype(np.int8)
        if kind in (TensorProto.INT2, TensorProto.INT4):
            signed = np.where(codes >> (bits - 1), codes.astype(np.int16) - (1 << bits), codes).astype(np.int8)
        array = codes.view(dtype) if bits == 6 else signed.astype(dtype)
        packed = pack(signed, bits).reshape(-1)
        expected = np.frombuffer(numpy_helper.from_array(array).raw_data, np.uint8)
        np.testing.assert_array_equal(packed[: len(expected)], expected)
        assert not packed[len(expected) :].any()
        assert len(packed) * 8 % bits == 0 and group(bits)[0] * bits == group(bits)[1] * 8


@given(
    st.sampled_from(
        [*SMALL, F16, BF16, F32, *(Int(bits, signed) for bits in (2, 4, 8, 16) for signed in (True, False))]
    ),
    st.sampled_from([0, -1, 16, 32, 77]),
    st.booleans(),
    st.sampled_from([F32, F16, BF16, E4M3, E8M0]),
)
def test_every_mapping_has_one_text_form(form: Any, block: int, symmetric: bool, scale: Float) -> None:
    quant = Quant(form, block, symmetric, scale)
    if symmetric or (isinstance(form, Int) and scale not in (E4M3, E8M0)):
        assert parse_quant(str(quant)) == quant
    else:
        with pytest.raises(RecipeError, match="can't be asym"):
            parse_quant(str(quant))


@pytest.mark.parametrize(("name", "bits"), [("mxfp4", 4.25), ("mxfp6", 6.25), ("mxfp8", 8.25), ("mxint8", 8.25),
                                            ("nvfp4", 4.5), ("u4/block32/asym", 5.125), ("i8/channel", 8)])  # fmt: skip
def test_names_stand_for_text_forms_and_bits_count_scales(name: str, bits: float) -> None:
    assert str(parse_quant(name)) == ALIASES.get(name, name)
    assert parse_quant(name).bits == bits


@pytest.mark.parametrize("text", ["e8m0/tensor", "f8e4m3/tensor/i8", "f4e2m1/block32/f32e8m0", "f8e3m4"])
def test_what_is_no_mapping_is_told(text: str) -> None:
    with pytest.raises(RecipeError, match="unknown"):
        parse_quant(text)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("text", ALL)
def test_any_weight_is_mapped_on_any_format(text: str, axis: int) -> None:
    """Scales can be stored as they are, what is representable stays, and a block of zeros stays 0."""
    quant = parse_quant(text)
    w = WEIGHT.copy()
    w[:, 3] = 0
    w[5] = 0
    params = fit_weight(w, quant, axis)
    assert params.scale.dtype == np.float32 and np.isfinite(params.scale).all() and (params.scale != 0).all()
    np.testing.assert_array_equal(scale_reals(scale_codes(params), quant.scale, params.tensor_scale), params.scale)
    real = fake_quant(w, params)
    assert not real[w == 0].any()
    np.testing.assert_array_equal(fake_quant(real, params), real)
    bits = quant.format.bits if isinstance(quant.format, Int) else min(quant.format.man + 2, 7)
    snr_db = 10 * np.log10((w.astype(np.float64) ** 2).sum() / ((real - w.astype(np.float64)) ** 2).sum())
    assert snr_db > 6 * bits - 9


@pytest.mark.parametrize("text", ["mxfp4", "nvfp4", "f8e4m3/block16"])
def test_a_tensor_of_zeros_is_mapped(text: str) -> None:
    params = fit_weight(np.zeros((32, 2), np.float32), parse_quant(text), 0)
    assert (params.scale > 0).all()
    assert not fake_quant(np.zeros((32, 2), np.float32), params).any()


# dB on 2**18 normal and Laplace numbers; the seed moves them by less than 0.1.
SNR_DB = {"mxfp4": (19.05, 18.2), "mxfp6": (31.0, 30.3), "mxfp8": (31.55, 31.5), "nvfp4": (21.65, 21.55),
          "f8e4m3/tensor": (31.55, 31.65), "u4/block32/asym": (22.15, 20.75)}  # fmt: skip


@pytest.mark.parametrize("text", SNR_DB)
def test_snr_of_normal_and_laplace_weights(text: str) -> None:
    rng = np.random.default_rng(0)
    for w, expected in zip((rng.normal(size=(512, 512)), rng.laplace(size=(512, 512))), SNR_DB[text], strict=True):
        real = fake_quant(w, fit_weight(w, parse_quant(text), 1))
        assert 10 * np.log10((w**2).sum() / ((real - w) ** 2).sum()) == pytest.approx(expected, abs=0.15)


def test_scales_of_mx_blocks_are_the_better_power_of_two() -> None:
    """6.1 is nearer 6 * 1 than anything on the grid of 2; 7.9 among small numbers isn't."""
    quant = parse_quant("mxfp4")
    for block, scale in (([6.1, 0.5, 1.5, -3.0], 1.0), ([7.9, 7.9, 7.9, 7.9], 2.0), ([3.0, -1.5, 0.25, 0.25], 0.5)):
        params = fit_weight(np.array([block * 8], np.float32), quant, 1)
        assert params.scale.tolist() == [[scale]]


def test_four_over_six() -> None:
    """5 lies between 4 and 6: a scale that puts it on 4 is exact."""
    block = np.array([[5.0, 2.5, 1.25, *[0.0] * 13]], np.float32)
    params = fit_weight(np.concatenate([block, block * 2], 1), parse_quant("nvfp4"), 1)
    np.testing.assert_allclose(fake_quant(block, params_of(params, 0)), block, rtol=1e-6)


def params_of(params: QParams, block: int) -> QParams:
    """The mapping of one block."""
    part = np.s_[:, block : block + 1]
    return QParams(params.quant, params.scale[part], params.zero_point[part], 1, tensor_scale=params.tensor_scale)


@given(hnp.arrays(np.float64, 5, elements=st.floats(1e-6, 1e4)), st.sampled_from([F16, BF16, E8M0, E4M3]))
def test_stored_scales_are_the_nearest_or_of_e8m0_the_next_above(wanted: np.ndarray, form: Float) -> None:
    top = float(np.float32(wanted.max() / 256)) if form == E4M3 else 1.0
    found = snap(wanted, form, top).astype(np.float64)
    assert (found > 0).all()
    if form == E8M0:
        np.testing.assert_array_equal(found, np.minimum(2.0 ** np.ceil(np.log2(wanted * (1 - 2.0**-22))), 2.0**127))
    else:
        coarsest = 2.0**-25 if form == F16 else top * 2.0**-9  # of the smallest subnormal, which 0 becomes
        assert (np.abs(found - wanted) <= np.maximum(wanted * 2.0 ** -(form.man + 1) * 1.001, coarsest)).all()
