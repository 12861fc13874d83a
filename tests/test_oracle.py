"""The oracle's verdicts against the graphs the installed runtime really makes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgeq.errors import RuntimeUnavailableError
from edgeq.num.quant import parse_quant
from edgeq.target.cache import cache_folder
from edgeq.target.load import load_target
from edgeq.target.micro import micro_model
from edgeq.target.oracle import Oracle
from edgeq.target.patterns import PATTERNS, Row, build, carried, table
from edgeq.target.question import question, signature
from edgeq.target.record import Target
from edgeq.target.runtime import agrees, disagreement, optimize
from edgeq.target.verdict import Verdict

TARGET = load_target("cpu-x64-vnni")
CONV_SHAPE = (1, 8, 6, 6)

# Pattern -> kind and kernel of each of its nodes, measured on ONNX Runtime 1.32.0.
KNOWN = {
    "Conv": ["integer QLinearConv"],
    "Conv, float out": ["float Conv"],
    "Conv, float in and out": ["float Conv"],
    "Conv depthwise": ["integer QLinearConv"],
    "Conv+Relu": ["integer QLinearConv", "integer QLinearConv"],
    "Conv+Clip": ["integer QLinearConv", "integer QLinearConv"],
    "ConvTranspose": ["float ConvTranspose"],
    "MatMul": ["integer QLinearMatMul"],
    "MatMul, float out": ["integer MatMulIntegerToFloat"],
    "MatMul, float in and out": ["integer MatMulNBits"],
    "MatMul of activations": ["integer QLinearMatMul"],
    "MatMul+Add": ["integer QGemm", "integer QGemm"],
    "MatMul+Add, Q/DQ between": ["integer QLinearMatMul", "integer QLinearAdd"],
    "Gemm": ["integer QGemm"],
    "Gemm transB": ["integer QGemm"],
    "Gemm, float out": ["integer QGemm"],
    "Add": ["integer QLinearAdd"],
    "Sub": ["float Sub"],
    "Mul": ["integer QLinearMul"],
    "Div": ["float Div"],
    "Concat": ["integer QLinearConcat"],
    "Where": ["integer QLinearWhere"],
    "Sigmoid": ["integer QLinearSigmoid"],
    "x*Sigmoid(x), Q/DQ between": ["integer QLinearSigmoid", "integer QLinearMul"],
    "x*Sigmoid(x)": ["float Sigmoid", "float Mul"],
    "Softmax": ["integer QLinearSoftmax"],
    "LeakyRelu": ["integer QLinearLeakyRelu"],
    "HardSwish": ["float Mul"],  # the runtime's own HardSigmoid + Mul
    "HardSigmoid": ["float HardSigmoid"],
    "Gelu": ["float Gelu"],
    "Tanh": ["float Tanh"],
    "Erf": ["float Erf"],
    "Relu": ["float "],  # dropped, a DQ -> Q pair stays
    "AveragePool": ["integer QLinearAveragePool"],
    "GlobalAveragePool": ["integer QLinearGlobalAveragePool"],
    "ReduceMean": ["float ReduceMean"],
    "LayerNormalization": ["float LayerNormalization"],
    "InstanceNormalization": ["float InstanceNormalization"],
    "MaxPool": ["integer MaxPool"],
    "GlobalMaxPool": ["float GlobalMaxPool"],
    "ReduceMax": ["integer ReduceMax"],
    "ReduceMin": ["integer ReduceMin"],
    "ArgMax": ["integer ArgMax"],
    "Gather from a constant table": ["float Gather"],
    "Identity": ["mover "],
    "Pad": ["float Pad"],
    "Resize nearest": ["mover Resize"],
    "Resize linear": ["float Resize"],
    "SpaceToDepth": ["float SpaceToDepth"],
    **{
        op: [f"mover {op}"]
        for op in (
            *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split"),
            *("Gather", "GatherElements", "Expand", "Tile", "DepthToSpace"),
        )
    },
}


def real(name: str, *shape: int | str) -> ir.Value:
    return ir.val(name, ir.DataType.FLOAT, ir.Shape(shape))


def fixed(name: str, *shape: int) -> ir.Value:
    tensor = ir.tensor(np.ones(shape, np.float32))
    return ir.val(name, tensor.dtype, ir.Shape(shape), const_value=tensor)


def made(
    op_type: str, inputs: Sequence[ir.Value], name: str, shape: tuple[int | str, ...], **attributes: int
) -> ir.Node:
    return ir.node(op_type, inputs, attributes, outputs=[real(name, *shape)])


def conv(channels: int = 8, size: int = 6, group: int = 1) -> ir.Node:
    weight = fixed("w", channels, channels // group, 3, 3)
    inputs = [real("x", 1, channels, size, size), weight, fixed("b", channels)]
    return made("Conv", inputs, "y", (1, channels, size - 2, size - 2), group=group)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    return {row.pattern: row for row in table(TARGET, Oracle(TARGET, tmp_path_factory.mktemp("cache")))}


def said(row: Row) -> list[str]:
    return [f"{verdict.kind} {verdict.kernel}" for verdict in row.verdicts]


def test_every_pattern_is_known() -> None:
    assert sorted(KNOWN) == sorted(pattern.name for pattern in PATTERNS)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_verdict_is_what_the_optimised_graph_shows(pattern, rows: dict[str, Row]) -> None:
    row = rows[pattern.name]
    assert said(row) == KNOWN[pattern.name]
    nodes = build(pattern)
    edges = carried(pattern, nodes)
    quantized = {value for node in nodes for value in (*node.inputs, *node.outputs) if value and value.name in edges}
    graph = optimize(micro_model(question(nodes, quantized, TARGET)), TARGET)
    assert isinstance(graph, ir.Model)
    types = [node.op_type for node in graph.graph]
    real_readers = [
        node.op_type
        for node in graph.graph
        if any(value and value.producer() and value.producer().op_type == "DequantizeLinear" for value in node.inputs)
    ]
    for verdict in row.verdicts:
        assert verdict.kernel in ("", *types)
    if all(verdict.kind != "float" for verdict in row.verdicts):
        assert real_readers == [], "no kernel reads dequantized values"
    else:
        assert real_readers != [], "a float kernel reads dequantized values"
        assert any("stays" in verdict.reason for verdict in row.verdicts)


def test_target_lists_agree_with_the_runtime(rows: dict[str, Row]) -> None:
    alone = {kind: {row.ops[0] for row in rows.values() if row.verdict.kind == kind} for kind in ("integer", "mover")}
    assert set(TARGET.quantized) == alone["integer"]
    assert set(TARGET.through) == alone["mover"]


def test_arm_codes_get_the_same_verdicts(rows: dict[str, Row], tmp_path: Path) -> None:
    arm = load_target("cpu-arm64")
    found = {row.pattern: said(row) for row in table(arm, Oracle(arm, tmp_path))}
    assert found == {name: said(row) for name, row in rows.items()}


# --- an independent micro-model, written with onnx.helper ------------------------------------------------------------


def optimised_types(op_type: str, constants: dict[str, np.ndarray], folder: Path, **attributes: object) -> list[str]:
    """Op types the runtime makes of DQ -> op -> Q on u8 codes, weights i8 per channel."""
    data = {"x_s": np.float32(0.1), "x_z": np.uint8(128), "y_s": np.float32(0.1), "y_z": np.uint8(128)}
    nodes = [helper.make_node("DequantizeLinear", ["x", "x_s", "x_z"], ["xr"])]
    inputs = ["xr"]
    for name, array in constants.items():
        data[name] = array
        if array.dtype == np.int8:
            axis = 1 if op_type == "MatMul" else 0
            data[f"{name}_s"] = np.full(array.shape[axis], 0.02, np.float32)
            data[f"{name}_z"] = np.zeros(array.shape[axis], np.int8)
            nodes.append(
                helper.make_node("DequantizeLinear", [name, f"{name}_s", f"{name}_z"], [f"{name}r"], axis=axis)
            )
            inputs.append(f"{name}r")
        else:
            inputs.append(name if array.size else "")
    nodes.append(helper.make_node(op_type, inputs, ["yr"], **attributes))
    nodes.append(helper.make_node("QuantizeLinear", ["yr", "y_s", "y_z"], ["y"]))
    shape = [4, 16] if op_type == "MatMul" else CONV_SHAPE
    graph = helper.make_graph(
        nodes,
        "independent",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in data.items() if np.size(array)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


SCALES = np.array([1, 1, 2, 2], np.float32)
NO_ROI = np.zeros(0, np.float32)


@pytest.mark.parametrize(
    ("pattern", "op_type", "constants", "attributes"),
    [
        ("Conv", "Conv", {"w": np.ones((8, 8, 3, 3), np.int8)}, {}),
        ("MatMul", "MatMul", {"w": np.ones((16, 8), np.int8)}, {}),
        ("MaxPool", "MaxPool", {}, {"kernel_shape": [2, 2]}),
        ("Reshape", "Reshape", {"shape": np.array([1, -1])}, {}),
        ("Resize nearest", "Resize", {"roi": NO_ROI, "scales": SCALES}, {"mode": "nearest"}),
        ("Resize linear", "Resize", {"roi": NO_ROI, "scales": SCALES}, {"mode": "linear"}),
        ("HardSwish", "HardSwish", {}, {}),
        ("ConvTranspose", "ConvTranspose", {"w": np.ones((8, 8, 3, 3), np.int8)}, {}),
        ("Softmax", "Softmax", {}, {}),
    ],
)
def test_an_independent_graph_fuses_alike(pattern, op_type, constants, attributes, rows, tmp_path: Path) -> None:
    types = optimised_types(op_type, constants, tmp_path, **attributes)
    verdict = rows[pattern].verdict
    assert verdict.kernel in types
    assert ("DequantizeLinear" in types) == (verdict.kind == "float")
    assert ("QuantizeLinear" in types) == (verdict.kind == "float")


# --- asking ----------------------------------------------------------------------------------------------------------


def test_ask_is_the_pattern_of_one_node(tmp_path: Path) -> None:
    oracle, node = Oracle(TARGET, tmp_path), conv()
    assert oracle.ask(node) == oracle.ask_pattern([node], {"x", "w", "b", "y"})[0]
    assert oracle.sessions == 1
    assert oracle.ask(node, quantized_inputs=(0, 1)).kernel == "QLinearConv"  # the runtime quantizes the float bias
    assert oracle.ask(node, output="float") == Verdict(
        "float", "Conv", "no integer kernel: DequantizeLinear → Conv stays"
    )


def test_float_bias_after_matmul_becomes_qgemm_only_with_q_after_it(tmp_path: Path) -> None:
    oracle = Oracle(TARGET, tmp_path)
    product = made("MatMul", [real("x", 1, 4, 16), fixed("w", 16, 8)], "m", (1, 4, 8))
    biased = made("Add", [product.outputs[0], fixed("b", 8)], "y", (1, 4, 8))
    kernels = {
        edges: [verdict.kernel for verdict in oracle.ask_pattern([product, biased], set(edges))]
        for edges in ("xwby", "xwy", "xwmby", "xw")
    }
    assert kernels == {
        "xwby": ["QGemm", "QGemm"],
        "xwy": ["QGemm", "QGemm"],
        "xwmby": ["QLinearMatMul", "QLinearAdd"],
        "xw": ["Gemm", "Gemm"],
    }


def test_inner_edge_with_a_reader_outside_stops_the_fold(tmp_path: Path) -> None:
    oracle, node = Oracle(TARGET, tmp_path), conv()
    relu = made("Relu", node.outputs, "r", (1, 8, 4, 4))
    pair = [node, relu]
    assert [verdict.kind for verdict in oracle.ask_pattern(pair, {"x", "w", "b", "r"})] == ["integer", "integer"]
    made("Sigmoid", node.outputs, "outside", (1, 8, 4, 4))
    assert [verdict.kind for verdict in oracle.ask_pattern(pair, {"x", "w", "b", "r"})] == ["float", "float"]


def clipped(low: float, high: float) -> list[ir.Node]:
    node = conv()
    bounds = [
        ir.val(name, ir.DataType.FLOAT, ir.Shape([]), const_value=ir.tensor(np.float32(bound)))
        for name, bound in (("low", low), ("high", high))
    ]
    return [node, made("Clip", [node.outputs[0], *bounds], "r", (1, 8, 4, 4))]


def test_bounds_of_a_clip_are_part_of_the_question(tmp_path: Path) -> None:
    oracle, edges = Oracle(TARGET, tmp_path), {"x", "w", "b", "r"}
    assert [verdict.kind for verdict in oracle.ask_pattern(clipped(0, 6), edges)] == ["integer", "integer"]
    assert [verdict.kind for verdict in oracle.ask_pattern(clipped(1, 6), edges)] == ["float", "float"]
    assert oracle.sessions == 2


def test_weight_formats_are_part_of_the_question(tmp_path: Path) -> None:
    oracle = Oracle(TARGET, tmp_path)
    node = made("MatMul", [real("x", 1, 4, 64), fixed("w", 64, 16)], "y", (1, 4, 16))
    int4 = oracle.ask(node, quantized_inputs=(1,), output="float", weights=parse_quant("i4/block32"))
    assert (int4.kind, int4.kernel) == ("integer", "MatMulNBits")
    wide = oracle.ask(node, activations=parse_quant("u16/tensor/asym"))
    assert wide == Verdict(
        "float", "MatMulNBits", "no integer kernel: DequantizeLinear → MatMulNBits → QuantizeLinear stays"
    )
    assert oracle.ask(conv(), weights=parse_quant("i4/channel")).kind == "float"


def test_symbolic_and_given_shapes(tmp_path: Path) -> None:
    oracle = Oracle(TARGET, tmp_path)
    node = made("MatMul", [real("x", "batch", "tokens", 16), fixed("w", 16, 8)], "y", ("batch", "tokens", 8))
    assert oracle.ask(node).kernel == "QLinearMatMul"
    assert oracle.ask(node, shapes={"x": (1, 4, 16), "y": (1, 4, 8)}).kernel == "QLinearMatMul"
    assert oracle.sessions == 2


def test_large_weights_are_asked_small(tmp_path: Path) -> None:
    node = made("MatMul", [real("x", 1, 4, 4096), fixed("w", 4096, 512)], "y", (1, 4, 512))
    model = micro_model(question([node], set(node.inputs) | set(node.outputs), TARGET))
    assert max(value.const_value.size for value in model.graph.initializers.values()) == 256 * 256
    assert Oracle(TARGET, tmp_path).ask(node).kernel == "QLinearMatMul"


def test_kernel_that_fuses_and_fails_is_float(tmp_path: Path) -> None:
    node = made("MatMul", [real("x", 2, 4, 16), fixed("w", 2, 16, 8)], "y", (2, 4, 8))
    edges = set(node.inputs)
    graph = optimize(micro_model(question([node], edges, TARGET)), TARGET)
    assert isinstance(graph, ir.Model)
    assert "MatMulIntegerToFloat" in [made.op_type for made in graph.graph], "the runtime does fuse it"
    verdict = Oracle(TARGET, tmp_path).ask(node, output="float")
    assert (verdict.kind, verdict.kernel) == ("float", "MatMulIntegerToFloat")
    assert verdict.reason.startswith("MatMulIntegerToFloat fails when it runs: ")


@given(st.integers(1, 60), st.floats(1e-3, 1e3), st.integers(0, 2**31))
def test_agreement_allows_rounding_and_nothing_more(size: int, step: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    expected = random.integers(-128, 128, size) * step
    assert agrees(expected, expected + random.integers(-1, 2, size) * step, step)
    wrong = expected.copy()
    wrong[random.integers(size)] += 3 * step + 0.2 * np.abs(expected).max()
    assert not agrees(expected, wrong, step)
    assert not agrees(expected, expected[:-1], step)


def test_trial_of_a_sound_kernel_and_of_a_large_model_say_nothing() -> None:
    for node in (conv(), conv(size=1 << 10)):
        model = micro_model(question([node], {*node.inputs, *node.outputs}, TARGET))
        assert disagreement(model, TARGET) == ""


def test_what_the_runtime_refuses_is_float_with_its_words(tmp_path: Path) -> None:
    verdict = Oracle(TARGET, tmp_path).ask(made("Foo", [real("x", 1, 4)], "y", (1, 4)))
    assert (verdict.kind, verdict.kernel) == ("float", "Foo")
    assert verdict.reason.startswith("the runtime refuses it: ")
    assert "No Op registered for Foo" in verdict.reason
    assert tempfile.gettempdir() not in verdict.reason


def test_nothing_is_asked_without_need(tmp_path: Path) -> None:
    oracle = Oracle(TARGET, tmp_path)
    flag = ir.val("flag", ir.DataType.BOOL, ir.Shape([1]))
    both = ir.node("And", [flag, flag], outputs=[ir.val("z", ir.DataType.BOOL)])
    assert oracle.ask(both) == Verdict("float", "And", "nothing to quantize on its edges")
    body = ir.Graph([], [real("t", 1)], nodes=[], name="body")
    branch = ir.node("If", [flag], {"then_branch": body, "else_branch": body}, outputs=[real("y", 1)])
    assert oracle.ask(branch) == Verdict("float", "If", "control flow has no integer kernel")
    assert oracle.sessions == 0


def test_missing_provider_is_named(tmp_path: Path) -> None:
    target: Target = replace(TARGET, name="gpu-test", provider="CUDAExecutionProvider")
    with pytest.raises(RuntimeUnavailableError, match="'CUDAExecutionProvider' isn't in the installed onnxruntime"):
        Oracle(target, tmp_path).ask(conv())


# --- signature and cache ---------------------------------------------------------------------------------------------


def asked(node: ir.Node) -> str:
    return signature(question([node], set(node.inputs) | set(node.outputs), TARGET))


@settings(max_examples=25)
@given(channels=st.integers(2, 32), size=st.integers(4, 64))
def test_channels_and_sizes_are_one_question(channels: int, size: int) -> None:
    assert asked(conv(channels, size)) == asked(conv())
    assert asked(conv(channels, size, group=channels)) == asked(conv(group=8))
    assert asked(conv(channels)) != asked(conv(channels, group=channels))


def test_answers_are_kept_on_disk(tmp_path: Path) -> None:
    first = Oracle(TARGET, tmp_path)
    verdict = first.ask(conv())
    second = Oracle(TARGET, tmp_path)
    assert second.ask(conv(16)) == verdict
    assert (first.sessions, second.sessions) == (1, 0)
    assert [path.name for path in first.path.parent.iterdir()] == [first.path.name]
    assert first.path.name.startswith(ort.__version__)


def test_two_oracles_keep_each_others_answers(tmp_path: Path) -> None:
    first, second = Oracle(TARGET, tmp_path), Oracle(TARGET, tmp_path)
    first.ask(conv())
    second.ask(conv(group=8))
    third = Oracle(TARGET, tmp_path)
    third.ask(conv())
    third.ask(conv(group=8))
    assert third.sessions == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"probe": 1}',
        '{"probe": 1, "verdicts": {"a": [["maybe", "", ""]]}}',
        '{"probe": 1, "verdicts": {"a": [1]}}',
        '{"probe": 0, "verdicts": {}}',
    ],
)
def test_damaged_cache_is_asked_again_and_healed(tmp_path: Path, text: str) -> None:
    path = Oracle(TARGET, tmp_path).path
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    oracle = Oracle(TARGET, tmp_path)
    assert oracle.ask(conv()).kernel == "QLinearConv"
    assert oracle.sessions == 1
    assert len(json.loads(path.read_text(encoding="utf-8"))["verdicts"]) == 1


def test_place_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    assert Oracle(TARGET, tmp_path / "file").ask(conv()).kernel == "QLinearConv"


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("EDGEQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "edgeq"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "edgeq"
