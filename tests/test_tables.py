"""Tables: every code compared with the nodes they stand for, with and without the library, and what is none is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.errors import RuntimeUnavailableError
from edgeq.ir import io
from edgeq.lower.kernels import in_own_kernels
from edgeq.lower.tables import COUNT
from edgeq.run.session import open_session, run_session
from edgeq.run.timing import TimedConfig, compare
from edgeq.source import read_model
from edgeq.target import kernels
from edgeq.target.load import load_target
from tests.emulated import needs_qemu, outputs
from tests.graphs import Arrays, graph, normal, number, ops
from tests.tabled import needs_library, ran, telling

TARGET = load_target("cpu-x64-vnni")
BETWEEN = """({type}[2,8,4,4] c) => ({type}[2,8,4,4] o) {{
    d = DequantizeLinear(c, s, z) {body} o = QuantizeLinear(h, t, y) }}"""
SILU = "g = Sigmoid(d) p = QuantizeLinear(g, u, v) q = DequantizeLinear(p, u, v) h = Mul(d, q)"
FUNCTIONS = [
    "h = HardSwish(d)", "h = Gelu(d)", 'h = Gelu<approximate="tanh">(d)', SILU, "h = Relu(d)", "h = Identity(d)",
    "a = Add(d, one) b = Clip(a, zero, six) e = Mul(d, b) h = Div(e, six)", "a = Tanh(d) b = Softplus(d) h = Sub(a, b)",
]  # fmt: skip


def between(body: str, dtype: str = "uint8", **weights: np.ndarray) -> Any:
    """``Q(body(DQ(c)))`` of codes ``c``, as many as there are."""
    zeros = {"uint8": (120, 12), "int8": (-8, 5)}[dtype]
    held: Arrays = {
        "s": number(0.05), "z": np.array(zeros[0], dtype), "t": number(0.03), "y": np.array(zeros[1], dtype),
        "u": number(1 / 255), "v": np.array(np.iinfo(dtype).min, dtype),
        "one": number(1), "zero": number(0), "six": number(6),
    }  # fmt: skip
    return graph(BETWEEN.format(type=dtype, body=body), {**held, **weights})


def every(dtype: str) -> Arrays:
    return {"c": np.arange(COUNT, dtype=np.uint8).view(dtype).reshape(2, 8, 4, 4)}


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("body", FUNCTIONS)
def test_a_table_has_the_bits_of_its_nodes(
    body: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_library()
    model = between(body, dtype)
    result, counts = in_own_kernels(model, TARGET)
    assert counts == {"Table": 1}
    io.write(result, tmp_path / "net.onnx")
    written = run_session(open_session(model, level="none"), every(dtype))["o"]
    session = open_session(tmp_path / "net.onnx", optimized_path=tmp_path / "seen.onnx")
    assert ops(io.read(tmp_path / "seen.onnx")) == ["Table"]
    np.testing.assert_array_equal(run_session(session, every(dtype))["o"], written)
    monkeypatch.setattr(kernels, "here", lambda: "no compiler")
    alone = open_session(tmp_path / "net.onnx", level="none")
    np.testing.assert_array_equal(run_session(alone, every(dtype))["o"], written)


OTHER = {"k": normal(1, 8, 1, 1), "long": np.ones((1, 1, 1, 1, 1), np.float32)}
LEFT = [
    "h = Mul(d, k)",  # another function a channel
    "h = Mul(d, long)",  # changes the shape
    "h = Softmax(d)", "h = CumSum(d, axis)",  # of neighbours
    "e = DequantizeLinear(c2, s, z) h = Add(d, e)",
    "h = Mul(d, r)",
]  # fmt: skip


@pytest.mark.parametrize("body", LEFT)
def test_what_reads_more_than_one_code_is_none(body: str) -> None:
    text = BETWEEN.format(type="uint8", body=body).replace("c) =>", "c, uint8[2,8,4,4] c2, float[1] r) =>")
    weights = {"s": number(0.05), "z": np.array(1, np.uint8), "t": number(0.03), "y": np.array(2, np.uint8), **OTHER}
    model = graph(text, {**weights, "axis": np.array(1)})
    assert in_own_kernels(model, TARGET) == (model, {})


def test_a_scale_a_channel_is_none() -> None:
    model = graph(
        "(uint8[1,2,4,4] c) => (uint8[1,2,4,4] o) { d = DequantizeLinear<axis=1>(c, s, z) h = Relu(d) "
        "o = QuantizeLinear(h, t, y) }",
        {"s": np.array([0.1, 0.2], np.float32), "z": np.zeros(2, np.uint8), "t": number(0.1),
         "y": np.array(0, np.uint8)},
    )  # fmt: skip
    assert in_own_kernels(model, TARGET) == (model, {})


def test_each_reader_that_wants_codes_gets_its_table_and_floats_stay_floats() -> None:
    """Two scales behind one function, and a float reader in front of which nothing is saved."""
    text = """(uint8[1,64] c) => (uint8[1,64] o, uint8[1,64] p, float[1,64] f) {
        d = DequantizeLinear(c, s, z) h = HardSwish(d)
        o = QuantizeLinear(h, t, z) p = QuantizeLinear(h, s, z) f = Softmax(h) }"""
    model = graph(text, {"s": number(0.05), "z": np.array(99, np.uint8), "t": number(0.02)})
    result, _ = in_own_kernels(model, TARGET)
    assert sorted(ops(result)) == ["DequantizeLinear", "HardSwish", "Softmax", "Table", "Table"]
    feed = {"c": np.arange(64, dtype=np.uint8)[None] * 4}
    for name, array in run_session(open_session(model, level="none"), feed).items():
        np.testing.assert_array_equal(run_session(open_session(result), feed)[name], array)


@pytest.mark.parametrize("function", ["e = DequantizeLinear(d, s, z) f = HardSwish(e) g = QuantizeLinear(f, s, z)",
                                      "g = Clip(d, l, z)"])  # fmt: skip
def test_tables_between_convolutions_leave_no_transposition(function: str, tmp_path: Path) -> None:
    """The runtime puts channels last for integer convolutions; it must not turn them around for a kernel of ours."""
    needs_library()
    text = f"""(float[1,8,12,12] x) => (float[1,8,12,12] r) {{
        a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z) w = DequantizeLinear(W, v, m)
        c = Conv(b, w) d = QuantizeLinear(c, s, z) {function} h = DequantizeLinear(g, s, z) i = Conv(h, w)
        j = QuantizeLinear(i, s, z) k = DequantizeLinear(j, s, z) r = Identity(k) }}"""
    weights = {
        "l": np.array(9, np.uint8),
        "W": np.int8(normal(8, 8, 1, 1) * 30),
        "v": number(0.01),
        "m": np.array(0, np.int8),
    }
    model, _ = read_model(graph(text, {**weights, "s": number(0.05), "z": np.array(128, np.uint8)}), opset=21)
    result, _ = in_own_kernels(model, TARGET)
    feed = {"x": normal(1, 8, 12, 12)}
    found = {}
    for name, one in (("plain", model), ("tabled", result)):
        session = open_session(one, optimized_path=tmp_path / f"{name}.onnx")
        found[name] = run_session(session, feed)["r"]
    seen = [ops(io.read(tmp_path / f"{name}.onnx")) for name in found]
    assert seen[1].count("Transpose") == seen[0].count("Transpose") and "Table" in seen[1]
    names = [node.name for node in result.graph]
    assert len(set(names)) == len(names)
    np.testing.assert_array_equal(found["plain"], found["tabled"])


@settings(max_examples=60)
@given(count=st.one_of(st.integers(0, 300), st.integers(2**18 - 70, 2**18 + 70)), threads=st.sampled_from([1, 2]))
def test_the_kernel_looks_up_any_number_of_codes(count: int, threads: int) -> None:
    needs_library()
    session = open_session(telling(), threads=threads)
    codes = np.random.default_rng(count).integers(0, COUNT, count, np.uint8)
    np.testing.assert_array_equal(run_session(session, {"c": codes})["o"], 255 - codes)


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["", "Haswell", "Nehalem"])  # AVX512 where this machine has it, AVX2, neither
def test_cpus_with_other_vectors_look_up_the_same(cpu: str, tmp_path: Path) -> None:
    needs_qemu()
    library = needs_library()
    io.write(telling(), tmp_path / "net.onnx")
    codes = np.tile(np.arange(COUNT, dtype=np.uint8), 3)[:-7]
    (((found,),),) = outputs(cpu, {"net": tmp_path / "net.onnx"}, {"net": [{"c": codes}]}, library).values()
    assert ran(codes, found) == "kernel"
    (((found,),),) = outputs(cpu, {"net": tmp_path / "net.onnx"}, {"net": [{"c": codes}]}).values()
    assert ran(codes, found) == "function"


def test_shapes_need_not_be_known(tmp_path: Path) -> None:
    """Behind a kernel of ours the runtime infers none, and a file may have lost what it said of them."""
    needs_library()
    model = telling("n,c,h,w")
    (node,) = (node for node in model.graph if node.op_type == "Table")
    (codes,) = model.graph.inputs
    hidden = ir.node("Reshape", [codes, ir.Value(name="to")])
    model.graph.inputs.append(hidden.inputs[1] or codes)
    hidden.inputs[1].type = ir.TensorType(ir.DataType.INT64)
    hidden.inputs[1].shape = ir.Shape(["rank"])
    model.graph.insert_before(node, hidden)
    node.replace_input_with(0, hidden.outputs[0])
    turned = ir.node("Transpose", [node.outputs[0]], {"perm": [0, 3, 1, 2]})
    model.graph.append(turned)
    model.graph.outputs[0] = turned.outputs[0]
    for value in (*node.outputs, *turned.outputs):
        value.shape = None
    turned.outputs[0].name, turned.outputs[0].type = "turned", ir.TensorType(ir.DataType.UINT8)
    array = np.arange(120, dtype=np.uint8).reshape(2, 3, 4, 5)
    found = run_session(open_session(model), {"c": array, "to": np.array(array.shape)})["turned"]
    np.testing.assert_array_equal(found, 255 - array.transpose(0, 3, 1, 2))


def test_a_table_of_another_size_is_refused_by_name() -> None:
    needs_library()
    model = telling()
    (name,) = (name for name in model.graph.initializers if name.endswith("_table"))
    value = model.graph.initializers[name]
    value.const_value = None
    value.shape = None
    model.graph.inputs.append(value)
    del model.graph.initializers[name]
    feed = {"c": np.zeros(3, np.uint8), name: np.zeros(255, np.uint8)}
    with pytest.raises(Exception, match="T must hold 256 codes"):
        run_session(open_session(model), feed)


def test_a_file_with_tables_is_read_as_what_they_stand_for(tmp_path: Path) -> None:
    io.write(telling(), tmp_path / "net.onnx")
    model, _ = read_model(tmp_path / "net.onnx", opset=21)
    assert "Table" not in ops(model) and "HardSwish" in ops(model)


def test_nothing_is_timed_without_the_kernels_it_was_made_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io.write(telling(), tmp_path / "net.onnx")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RuntimeUnavailableError, match=r"net\.onnx' uses edgeq's kernels, and .* needs a compiler"):
        compare([TimedConfig("net", tmp_path / "net.onnx")], [{"c": np.zeros(3, np.uint8)}], max_seconds=0.1)
