"""Integer convolutions in edgeq's own kernels: ONNX Runtime's bits for every shape; what isn't one stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.ir import io
from edgeq.lower.kernels import in_own_kernels
from edgeq.run.session import open_session, run_session
from edgeq.source import read_model
from edgeq.target import kernels
from edgeq.target.load import load_target
from tests.emulated import needs_qemu, outputs
from tests.graphs import Arrays, graph, ops
from tests.tabled import needs_library

TARGET = load_target("cpu-x64-vnni")


def net(
    channels: int = 24, kernel: tuple[int, int] = (3, 3), strides: tuple[int, int] = (1, 1),
    pads: tuple[int, ...] = (1, 1, 1, 1), seed: int = 0, *, more: str = "", after: str = "", scale: float = 0.002,
    group: int | None = None, inputs: int | None = None, wide: bool = True, **changed: np.ndarray,
) -> ir.Model:  # fmt: skip
    """Codes ``c`` [n, channels, h, w] -> codes ``o`` of a convolution of random weights, both u8. ``inputs``: channels
    read where all are, ``wide``: a scale a channel; ``after``: what stands between the convolution and its Q."""
    group = group or (1 if inputs else channels)
    rng = np.random.default_rng(seed)
    weights: Arrays = {
        "x_scale": np.array(0.03, np.float32), "x_zero": np.array(rng.integers(0, 256), np.uint8),
        "W": rng.integers(-127, 128, (channels, (inputs or channels) // group, *kernel)).astype(np.int8),
        "w_scale": np.float32(scale) * rng.uniform(0.5, 1.5, channels if wide else ()).astype(np.float32),
        "w_zero": np.zeros(channels if wide else (), np.int8),
        "B": rng.integers(-(2**14), 2**14, channels).astype(np.int32), "b_zero": np.zeros(channels, np.int32),
        "y_scale": np.array(0.05, np.float32), "y_zero": np.array(rng.integers(0, 256), np.uint8),
    }  # fmt: skip
    weights = {**weights, "b_scale": weights["x_scale"] * weights["w_scale"] * np.ones(channels, np.float32), **changed}
    axis = "<axis=0>" if wide else ""
    text = f"""(uint8[n,{inputs or channels},h,w] c) => (uint8[n,{channels},i,j] o) {{
        x = DequantizeLinear(c, x_scale, x_zero) v = DequantizeLinear{axis}(W, w_scale, w_zero)
        b = DequantizeLinear<axis=0>(B, b_scale, b_zero)
        y = Conv<kernel_shape=[{kernel[0]},{kernel[1]}], strides=[{strides[0]},{strides[1]}],
            group={group}, pads=[{pads[0]},{pads[1]},{pads[2]},{pads[3]}]{more}>(x, v, b)
        {after} o = QuantizeLinear({"z" if after else "y"}, y_scale, y_zero) }}"""
    return read_model(graph(text, weights), opset=21)[0]


def codes(channels: int, size: tuple[int, int], batch: int = 1, seed: int = 0) -> Arrays:
    return {"c": np.random.default_rng(seed).integers(0, 256, (batch, channels, *size), np.uint8)}


@settings(max_examples=120)
@given(
    channels=st.sampled_from([16, 17, 24, 31, 32, 33, 48, 64, 72, 130]), kernel=st.sampled_from(
        [(3, 3), (5, 5), (1, 1), (7, 7), (1, 3), (5, 2), (2, 4)]),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)), pads=st.tuples(*[st.integers(0, 2)] * 4),
    size=st.tuples(st.integers(7, 12), st.integers(7, 12)), batch=st.integers(1, 2), seed=st.integers(0, 2**16),
    wide=st.booleans(), inputs=st.sampled_from([None, None, 1, 2, 3, 4]),
)  # fmt: skip
def test_they_have_the_bits_of_the_runtimes_own(
    channels: int, kernel: tuple[int, int], strides: tuple[int, int], pads: tuple[int, ...], size: tuple[int, int],
    batch: int, seed: int, wide: bool, inputs: int | None,
) -> None:  # fmt: skip
    needs_library()
    model = net(channels, kernel, strides, pads, seed, wide=wide, inputs=inputs)
    own, counts = in_own_kernels(model, TARGET)
    assert counts == {"StemConv" if inputs else "DepthwiseConv": 1}
    feed = codes(inputs or channels, size, batch, seed)
    np.testing.assert_array_equal(
        run_session(open_session(own), feed)["o"], run_session(open_session(model), feed)["o"]
    )


OPS = {"DepthwiseConv": None, "StemConv": 3}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op", OPS)
def test_a_large_picture_is_shared_among_threads(op: str, threads: int, tmp_path: Path) -> None:
    needs_library()
    model = net(48, inputs=OPS[op])
    io.write(in_own_kernels(model, TARGET)[0], tmp_path / "net.onnx")
    session = open_session(tmp_path / "net.onnx", threads=threads, optimized_path=tmp_path / "seen.onnx")
    assert op in ops(io.read(tmp_path / "seen.onnx"))
    plain = open_session(model, optimized_path=tmp_path / "plain.onnx")
    assert "QLinearConv" in ops(io.read(tmp_path / "plain.onnx"))
    feed = codes(OPS[op] or 48, (97, 83), 2)
    np.testing.assert_array_equal(run_session(session, feed)["o"], run_session(plain, feed)["o"])


@pytest.mark.parametrize("op", OPS)
def test_without_the_library_it_is_the_runtimes_own(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(32, (5, 5), pads=(2, 2, 2, 2), inputs=OPS[op])
    feed = codes(OPS[op] or 32, (9, 9))
    monkeypatch.setattr(kernels, "here", lambda: "no compiler")
    session = open_session(in_own_kernels(model, TARGET)[0], optimized_path=tmp_path / "seen.onnx")
    assert op not in ops(io.read(tmp_path / "seen.onnx"))
    np.testing.assert_array_equal(run_session(session, feed)["o"], run_session(open_session(model), feed)["o"])


@pytest.mark.parametrize("op", OPS)
def test_codes_far_beyond_the_range_saturate(op: str) -> None:
    """Sums times a scale that leave 32 bits."""
    needs_library()
    model = net(32, scale=2.0**20, inputs=OPS[op])
    own, _ = in_own_kernels(model, TARGET)
    feed = codes(OPS[op] or 32, (8, 8))
    found = run_session(open_session(own), feed)["o"]
    np.testing.assert_array_equal(found, run_session(open_session(model), feed)["o"])
    assert {0, 255} <= set(np.unique(found))


CLIPS = {
    "z = Relu(y)": {"y_zero": np.array(0, np.uint8)},
    "z = Clip(y, zero, six)": {"y_zero": np.array(0, np.uint8), "y_scale": np.array(6 / 255, np.float32),
                               "zero": np.array(0, np.float32), "six": np.array(6, np.float32)},
}  # fmt: skip


@pytest.mark.parametrize("after", CLIPS)
def test_a_clip_that_the_codes_make_goes(after: str) -> None:
    needs_library()
    model = net(32, after=after, **CLIPS[after])
    own, counts = in_own_kernels(model, TARGET)
    assert counts == {"DepthwiseConv": 1}
    assert not {"Relu", "Clip", "Conv"} & set(ops(own))
    feed = codes(32, (8, 8))
    np.testing.assert_array_equal(
        run_session(open_session(own), feed)["o"], run_session(open_session(model), feed)["o"]
    )


LEFT = {
    "few channels": net(15),
    "two channels a group": net(32, group=16),
    "five channels": net(32, inputs=5),
    "dilated": net(32, more=", dilations=[2,2]"),
    "padded by itself": net(32, pads=(0, 0, 0, 0), more=', auto_pad="VALID"'),
    "weights with a zero point": net(32, w_zero=np.full(32, 3, np.int8)),
    "a bias in other steps": net(32, b_scale=np.full(32, 1e-4, np.float32)),
    "a clip within the codes": net(32, after="z = Relu(y)", y_zero=np.array(100, np.uint8)),
    "a function behind it": net(32, after="z = Tanh(y)"),
    "a window of 81": net(32, (9, 9), pads=(4, 4, 4, 4)),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_the_kernel_does_not_take_stays(what: str) -> None:
    assert in_own_kernels(LEFT[what], TARGET)[0] is LEFT[what]


def test_a_convolution_that_floats_read_stays() -> None:
    model = net(32)
    (conv,) = (node for node in model.graph if node.op_type == "Conv")
    model.graph.outputs.append(conv.outputs[0])
    assert in_own_kernels(model, TARGET)[0] is model


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["Haswell", "Nehalem"])  # AVX2, neither
def test_cpus_with_other_vectors_give_the_same_bits(cpu: str, tmp_path: Path) -> None:
    needs_qemu()
    library = needs_library()
    files, feeds, expected = {}, {}, {}
    for channels, kernel, inputs in ((16, (3, 3), None), (33, (5, 5), None), (72, (3, 2), None), (40, (3, 3), 3)):
        name = f"{channels}"
        model = net(channels, kernel, (2, 1), (1, 0, 2, 1), channels, inputs=inputs)
        feeds[name] = [codes(inputs or channels, (9, 11), 2)]
        expected[name] = run_session(open_session(model), feeds[name][0])["o"]
        files[name] = tmp_path / f"{name}.onnx"
        io.write(in_own_kernels(model, TARGET)[0], files[name])
    for name, ((found,),) in outputs(cpu, files, feeds, library).items():
        np.testing.assert_array_equal(found, expected[name])
