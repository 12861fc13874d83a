"""The saturation certificate against VPMADDUBSW itself: in numpy over adversarial inputs, and on an emulated CPU."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from edgeq.analyse.saturation import certify, kernel_rows, unsaturated
from edgeq.errors import ModelError
from edgeq.ir import io
from edgeq.lower.legalize import legalize
from edgeq.num.fit import fit_weight
from edgeq.num.quant import parse_quant, quantize
from edgeq.report.record import PairSums, Saturation
from edgeq.report.rows import saturation_line
from edgeq.run.samples import load_samples
from edgeq.target.detect import VNNI_FLAGS, cpu_flags
from edgeq.target.load import load_target
from tests.bench.saturation import NO_VNNI, files
from tests.emulated import needs_qemu, outputs
from tests.graphs import graph, normal
from tests.placed import VNNI, placed
from tests.zoo import ZOO

AVX2 = load_target("cpu-x64-avx2")
RNG = np.random.default_rng(11)
Ints = NDArray[Any]


def vpmaddubsw(a: Ints, w: Ints) -> Ints:
    """u8[..., K] and i8[..., K], K even -> i16[..., K / 2], as Intel's manual defines the instruction."""
    products = a.astype(np.int32) * w.astype(np.int32)
    return np.clip(products[..., 0::2] + products[..., 1::2], -(2**15), 2**15 - 1).astype(np.int16)


def summed(a: Ints, w: Ints) -> Ints:
    """u8[M, K] x i8[N, K] -> i32[M, N] as a CPU without VNNI does it."""
    if a.shape[1] % 2:
        a, w = (np.pad(x, ((0, 0), (0, 1))) for x in (a, w))
    return vpmaddubsw(a[:, None], w[None]).sum(-1, dtype=np.int32)


def exact(a: Ints, w: Ints) -> Ints:
    return a.astype(np.int32) @ w.astype(np.int32).T


# --- the bound -------------------------------------------------------------------------------------------------------

CODES = arrays(np.int8, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.integers(-127, 127))


@given(codes=CODES, data=st.data())
def test_certified_rows_never_saturate_and_flagged_ones_can(codes: Ints, data: st.DataObject) -> None:
    model = qdq("MatMul(f, v)", codes.T.copy(), (1, codes.shape[1]))
    worst = [certify(qdq("MatMul(f, v)", row[:, None], (1, row.size))) for row in codes]
    rows = [bool(found.flagged) for found in worst]
    assert (certify(model).rows, certify(model).flagged) == (len(codes), sum(rows))
    anything = data.draw(arrays(np.uint8, (3, codes.shape[1])))
    ends = [np.where(sign * codes > 0, 255, 0).astype(np.uint8) for sign in (1, -1)]  # each row's own worst inputs
    for index, flagged in enumerate(rows):
        row = codes[index : index + 1]
        if not flagged:
            np.testing.assert_array_equal(summed(anything, row), exact(anything, row))
        worst_inputs = np.concatenate([end[index : index + 1] for end in ends])
        assert (summed(worst_inputs, row) != exact(worst_inputs, row)).any() == flagged, "the bound is exact"


@given(rows=arrays(np.float32, (5, 9), elements=st.floats(-3, 3, width=32)), inputs=arrays(np.uint8, (4, 9)))
def test_repaired_weights_never_saturate(rows: NDArray[np.float32], inputs: Ints) -> None:
    params = unsaturated(rows, fit_weight(rows, parse_quant("i8/channel"), 0), AVX2)
    codes = quantize(rows, params)
    hardest = np.where(codes > 0, 255, 0).astype(np.uint8)
    for a in (inputs, hardest, 255 - hardest):
        np.testing.assert_array_equal(summed(a, codes), exact(a, codes))


def test_only_rows_that_need_it_are_repaired() -> None:
    rows = np.array([[127, 1, -127, 128, 0], [127, 2, 0, 0, 0], [64, 64, 127, 0, 0], [100, 100, 1, 1, 1]], np.float32)
    plain = fit_weight(rows, parse_quant("i8/channel"), 0)
    raised = unsaturated(rows, plain, AVX2)
    factors = raised.scale / plain.scale
    np.testing.assert_allclose(factors, [1, 129 / 128, 1, 200 / 128 / (100 / 127)], rtol=1e-6)
    assert unsaturated(rows, plain, load_target(VNNI)) is plain
    unsigned = fit_weight(rows, parse_quant("u8/channel"), 0)
    assert unsaturated(rows, unsigned, AVX2) is unsigned, "u8 weights are widened before they are multiplied"


# --- of models -------------------------------------------------------------------------------------------------------

IMAGE = "(float[1,8,6,6] x) => (float[1,8,6,6] y)"
MODELS = {
    "Conv": (f"{IMAGE} {{ y = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w) }}", normal(8, 8, 3, 3), 8),
    "Conv grouped": (
        f"{IMAGE} {{ y = Conv<kernel_shape=[3,3], pads=[1,1,1,1], group=2>(x, w) }}", normal(8, 4, 3, 3), 8
    ),
    "Conv depthwise": (
        f"{IMAGE} {{ y = Conv<kernel_shape=[3,3], pads=[1,1,1,1], group=8>(x, w) }}", normal(8, 1, 3, 3), 0
    ),
    "Gemm": ("(float[5,16] x) => (float[5,8] y) { y = Gemm<transB=1>(x, w) }", normal(8, 16), 8),
    "MatMul": ("(float[5,16] x) => (float[5,8] y) { y = MatMul(x, w) }", normal(16, 8), 8),
    "MatMul of rank 3": ("(float[2,5,16] x) => (float[2,5,8] y) { y = MatMul(x, w) }", normal(16, 8), 8),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_for_avx2_are_certified_and_those_for_vnni_counted(name: str) -> None:
    text, weight, rows = MODELS[name]
    plain, repaired = (placed(text, {"w": weight}, target=target) for target in (VNNI, AVX2.name))
    assert plain.plan.integer and repaired.plan.integer
    found, proof = certify(plain.model), certify(repaired.model)
    assert (found.rows, proof.rows, proof.flagged) == (rows, rows, 0)
    assert legalize(repaired.model, AVX2) is repaired.model
    if rows:
        assert found.flagged > 0 and found.worst > 32767 >= proof.worst > 32000, "not a step more than needed"
        with pytest.raises(ModelError, match=f"add to {found.worst}, target 'cpu-x64-avx2' adds up to 32767") as error:
            legalize(plain.model, AVX2)
        assert error.value.hint == "raise the scales of its weights, or round them to nearest"


def test_a_model_without_integer_products_is_certified_at_once() -> None:
    assert certify(graph(*MODELS["Gemm"][:1], {"w": MODELS["Gemm"][1]})) == Saturation(0, 0, 0)


def test_the_certificate_is_a_sentence() -> None:
    found = Saturation(9, 2, 64770, (PairSums("c", "Conv", 9, 2, 64770),))
    assert saturation_line(found) == "2 of 9 rows can saturate on x86 CPUs without VNNI: this file is for VNNI only"
    assert "same integers on every x86-64 CPU" in saturation_line(replace(found, flagged=0))


# --- on a CPU without VNNI -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """``body`` computes from ``f`` (the input) and ``v`` (the weight) of these shapes. A plain MatMul writes float."""

    body: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    pad: int = 0
    stride: int = 1
    dilation: int = 1
    group: int = 1


def conv(
    x: tuple[int, ...], w: tuple[int, ...], pad: int = 0, stride: int = 1, dilation: int = 1, group: int = 1
) -> Product:
    rank = len(w) - 2
    attributes = {
        "kernel_shape": [*w[2:]], "pads": [pad] * 2 * rank, "strides": [stride] * rank, "dilations": [dilation] * rank,
        "group": group,
    }  # fmt: skip
    text = ", ".join(f"{key}={value}" for key, value in attributes.items())
    return Product(f"Conv<{text}>(f, v)", x, w, pad, stride, dilation, group)


PRODUCTS = {
    "matmul": Product("MatMul(f, v)", (4, 64), (64, 16)),
    "matmul one row": Product("MatMul(f, v)", (1, 63), (63, 17)),
    "matmul long": Product("MatMul(f, v)", (70, 600), (600, 40)),
    "matmul short": Product("MatMul(f, v)", (5, 7), (7, 3)),
    "matmul rank 3": Product("MatMul(f, v)", (2, 5, 33), (33, 6)),
    "gemm": Product("Gemm(f, v)", (5, 64), (64, 16)),
    "gemm transB": Product("Gemm<transB=1>(f, v)", (5, 64), (16, 64)),
    "conv 1x1": conv((1, 16, 9, 9), (16, 16, 1, 1)),
    "conv 1x1 strided": conv((1, 6, 9, 9), (5, 6, 1, 1), stride=2),
    "conv 3x3 of a picture": conv((1, 3, 9, 9), (16, 3, 3, 3), pad=1, stride=2),
    "conv 3x3": conv((2, 16, 9, 9), (32, 16, 3, 3), pad=1),
    "conv 3x3 odd": conv((1, 6, 9, 9), (7, 6, 3, 3), pad=1),
    "conv dilated": conv((1, 8, 9, 9), (16, 8, 3, 3), pad=2, dilation=2),
    "conv grouped": conv((1, 16, 9, 9), (16, 8, 3, 3), pad=1, group=2),
    "conv grouped odd": conv((1, 6, 9, 9), (8, 3, 3, 3), pad=1, group=2),
    "conv 1 to 2": conv((1, 8, 9, 9), (16, 1, 3, 3), pad=1, group=8),
    "conv 2 to 1": conv((1, 16, 9, 9), (8, 2, 3, 3), pad=1, group=8),
    "conv of one channel": conv((1, 1, 9, 9), (4, 1, 3, 3), pad=1),
    "conv 1d": conv((1, 8, 20), (8, 8, 5), pad=2),
    "conv 3d": conv((1, 4, 5, 5, 5), (8, 4, 3, 3, 3), pad=1),
    "depthwise": conv((1, 32, 9, 9), (32, 1, 5, 5), pad=2, group=32),
    "depthwise odd": conv((1, 17, 9, 9), (17, 1, 2, 2), group=17),
    "depthwise 1d": conv((1, 8, 20), (8, 1, 5), pad=2, group=8),
}  # fmt: skip


def qdq(body: str, weight: Ints, shape: Sequence[int], step: float | None = None) -> ir.Model:
    """u8 ``shape`` times i8 ``weight``, zero point 3 and scale 1; output in codes of ``step`` around 128, or float."""
    axis = 0 if "Conv" in body or "transB" in body else 1
    scales = (weight.shape[axis],)
    dims = ",".join("ABCDE"[: len(shape)])
    tail, kind = ("y = QuantizeLinear(c, step, middle)", "uint8") if step else ("y = Identity(c)", "float")
    text = f"(uint8[{','.join(map(str, shape))}] x) => ({kind}[{dims}] y) {{ f = DequantizeLinear(x, one, three)"
    return graph(
        f"{text} v = DequantizeLinear<axis={axis}>(w, ones, zeros) c = {body} {tail} }}",
        {
            "one": np.float32(1), "three": np.uint8(3), "w": weight, "ones": np.ones(scales, np.float32),
            "zeros": np.zeros(scales, np.int8), "step": np.float32(step or 1), "middle": np.uint8(128),
        },
    )  # fmt: skip


def columns(product: Product, x: Ints) -> Ints:
    """Input of a convolution -> what each output position sees, [N, *out, kernel elements, channels]."""
    rank = x.ndim - 2
    padded = np.pad(x, [(0, 0)] * 2 + [(product.pad, product.pad)] * rank, constant_values=3)
    spans = [(size - 1) * product.dilation + 1 for size in product.w[2:]]
    view = sliding_window_view(padded, spans, axis=tuple(range(2, x.ndim)))
    steps = (slice(None, None, product.stride),) * rank + (slice(None, None, product.dilation),) * rank
    seen = np.moveaxis(view[(slice(None), slice(None), *steps)], 1, -1)
    return seen.reshape(*seen.shape[: 1 + rank], math.prod(product.w[2:]), x.shape[1])


def expected(product: Product, x: Ints, w: Ints) -> tuple[Ints, Ints]:
    """Sums without the zero point, as x86 without VNNI adds them in the order of ``kernel_rows``, and exact ones."""
    node = next(node for node in qdq(product.body, w, product.x).graph if node.op_type in ("MatMul", "Gemm", "Conv"))
    rows = kernel_rows(node, w)
    if node.op_type == "Conv":
        seen, depth = columns(product, x), product.w[1]
        parts = []
        for group in range(product.group):
            a = seen[..., group * depth : (group + 1) * depth]
            own = slice(group * len(w) // product.group, (group + 1) * len(w) // product.group)
            plain = np.moveaxis(w[own], 1, -1).reshape(own.stop - own.start, -1)
            flat = a.reshape(-1, plain.shape[1])
            both = (exact if rows is None else summed)(flat, plain if rows is None else rows[own]), exact(flat, plain)
            parts.append(
                [np.moveaxis((s - 3 * plain.sum(1, dtype=np.int32)).reshape(*a.shape[:-2], -1), -1, 1) for s in both]
            )
        return np.concatenate([p[0] for p in parts], 1), np.concatenate([p[1] for p in parts], 1)
    assert rows is not None
    flat, out = x.reshape(-1, rows.shape[1]), (*x.shape[:-1], len(rows))
    found, right = ((add(flat, rows) - 3 * rows.sum(1, dtype=np.int32)).reshape(out) for add in (summed, exact))
    return found, right


@pytest.mark.slow
def test_products_pair_as_the_certificate_says(tmp_path: Path) -> None:
    """Bit for bit on an emulated CPU, for every shape of kernel: what meets in 16 bits, and what is widened first."""
    needs_qemu()
    models, feeds, wanted, right = {}, {}, {}, {}
    for name, product in PRODUCTS.items():
        x, w = RNG.integers(0, 256, product.x, np.uint8), RNG.integers(-127, 128, product.w, np.int8)
        sums, true = expected(product, x, w)
        step = 2.0 ** math.ceil(math.log2(np.abs(true).max() / 127))
        kinds = {"codes": step, "float": None} if product.body.startswith("MatMul") else {"codes": step}
        for kind, size in kinds.items():
            key = f"{name} {kind}"
            models[key], feeds[key] = tmp_path / f"{key}.onnx", [{"x": x}]
            io.write(qdq(product.body, w, product.x, size), models[key])
            wanted[key], right[key] = ((np.rint(s / step).clip(-128, 127) + 128 if size else s) for s in (sums, true))
    found = outputs(NO_VNNI, models, feeds)
    for key in models:
        np.testing.assert_array_equal(found[key][0][0], wanted[key], key)
        assert np.array_equal(wanted[key], right[key]) == key.startswith("depthwise"), "it saturates, or never does"


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["EFL0", "OCR4r"])
def test_a_certified_model_computes_the_same_without_vnni(name: str, tmp_path: Path) -> None:
    """Within a step of its output, here and on the emulated CPU; the file for VNNI does not."""
    needs_qemu()
    made = files(name, tmp_path, count=8, ranges="minmax")
    assert certify(made["vnni"]).flagged > certify(made["vnni"]).rows / 2
    assert certify(made["rows"]).flagged == 0
    models = {key: tmp_path / f"{key}.onnx" for key in ("vnni", "rows")}
    samples = load_samples(ZOO[name].calibration, made["float"], limit=8)
    feeds = {key: [samples.read(index) for index in (0, 5)] for key in models}
    here, there = outputs("", models, feeds), outputs(NO_VNNI, models, feeds)
    steps = {
        key: max(
            float(np.abs(a[0] - b[0]).max() / (np.ptp(a[0]) / 255)) for a, b in zip(here[key], there[key], strict=True)
        )
        for key in models
    }
    assert steps["rows"] <= 1
    if cpu_flags() & VNNI_FLAGS:  # elsewhere both saturate alike
        assert steps["vnni"] > 10


def test_ci_has_an_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="make qemu"):
        needs_qemu()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception):
        needs_qemu()
