"""Reading models: what comes out computes what went in, and what can't be read says so. The oracle is ONNX Runtime on
the model as it was written."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeq.errors import ModelError, UsageError
from edgeq.ir import io, query
from edgeq.source import read_model, specialise
from edgeq.source.import_path import load
from edgeq.source.opset import ADAPTERS

Arrays = dict[str, np.ndarray]
RNG = np.random.default_rng(7)
X4 = RNG.normal(size=(2, 4, 6, 6)).astype(np.float32)
X2 = RNG.normal(size=(3, 8)).astype(np.float32)


def net(
    nodes: list[onnx.NodeProto],
    feed: Arrays,
    outputs: tuple[str, ...] = ("y",),
    weights: Arrays | None = None,
    opset: int = 21,
    rankless: bool = False,
    **more: Any,
) -> onnx.ModelProto:
    """A model of ``nodes`` whose inputs are typed like ``feed``; outputs are declared without shape."""
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), None if rankless else array.shape
        )
        for name, array in feed.items()
    ]
    declared = [
        name if isinstance(name, onnx.ValueInfoProto) else helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in outputs
    ]
    stored = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    for index, one in enumerate(nodes):  # ONNX Runtime wants each name once
        one.name = one.name if one.name not in {other.name for other in nodes[:index]} else ""
    graph = helper.make_graph(nodes, "net", inputs, declared, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, **more)


def run(model: onnx.ModelProto | onnx_ir.Model, feed: Arrays) -> list[np.ndarray]:
    """Unoptimised, so that the oracle is the kernels' own meaning."""
    data = io.to_bytes(model) if isinstance(model, onnx_ir.Model) else model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(data, options)
    assert {item.name for item in session.get_inputs()} == set(feed)
    return session.run(None, feed)


def read(proto: onnx.ModelProto, **options: Any) -> tuple[onnx_ir.Model, Any]:
    return read_model(onnx_ir.from_proto(proto), opset=options.pop("opset", 21), **options)


def same(proto: onnx.ModelProto, feed: Arrays, **options: Any) -> onnx_ir.Model:
    """The model read from ``proto``, after checking that both compute the same."""
    model, _ = read(proto, **options)
    for expected, found in zip(run(proto, feed), run(model, feed), strict=True):
        assert expected.shape == found.shape
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    return model


def node(op: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(
        op, ["" if i == "_" else i for i in inputs.split()], outputs.split(), op.lower(), **attributes
    )


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


CHANNEL = {"s": f32(1, 2, 3, 4), "b": f32(0, 1, 0, 1), "m": f32(0.1, 0, 0, 0.2), "v": f32(1, 2, 1, 2)}

OLD: dict[str, tuple[int, onnx.NodeProto, np.ndarray, Arrays]] = {
    "upsample, scales as attribute": (7, node("Upsample", "x", scales=[1.0, 1.0, 2.0, 3.0], mode="nearest"), X4, {}),
    "upsample linear": (7, node("Upsample", "x", scales=[1.0, 1.0, 2.0, 2.0], mode="linear"), X4, {}),
    "upsample, scales as input": (9, node("Upsample", "x r"), X4, {"r": f32(1, 1, 2, 2)}),
    "resize 10 nearest up": (10, node("Resize", "x r"), X4, {"r": f32(1, 1, 2.5, 2)}),
    "resize 10 nearest down": (10, node("Resize", "x r"), X4, {"r": f32(1, 1, 0.4, 0.5)}),
    "resize 10 linear down": (10, node("Resize", "x r", mode="linear"), X4, {"r": f32(1, 1, 0.6, 1.5)}),
    "resize 11, sizes beside empty scales": (
        11,
        node("Resize", "x roi r z", coordinate_transformation_mode="align_corners", mode="linear"),
        X4,
        {"roi": f32(), "r": f32(), "z": i64(2, 4, 9, 11)},
    ),
    "slice": (9, node("Slice", "x", starts=[1, 0], ends=[9, -1], axes=[2, 3]), X4, {}),
    "slice, no axes": (7, node("Slice", "x", starts=[0, 1], ends=[2, 3]), X4, {}),
    "topk": (9, node("TopK", "x", "y i", k=3), X2, {}),
    "clip": (7, node("Clip", "x", min=-0.5, max=0.5), X4, {}),
    "clip, one bound": (10, node("Clip", "x", max=0.25), X4, {}),
    "pad": (8, node("Pad", "x", pads=[0, 0, 1, 2, 0, 0, 0, 1], value=1.5), X4, {}),
    "pad reflect": (10, node("Pad", "x", pads=[0, 0, 1, 1, 0, 0, 1, 1], mode="reflect"), X4, {}),
    "dropout": (7, node("Dropout", "x", ratio=0.9), X4, {}),
    "dropout with unread mask": (10, node("Dropout", "x", "y mask", ratio=0.9), X4, {}),
    "batch norm": (7, node("BatchNormalization", "x s b m v", spatial=1), X4, CHANNEL),
    "batch norm 9": (9, node("BatchNormalization", "x s b m v"), X4, CHANNEL),
    "softmax, default axis of four": (11, node("Softmax", "x"), X4, {}),
    "softmax, middle axis": (9, node("Softmax", "x", axis=2), X4, {}),
    "softmax, last axis": (11, node("Softmax", "x", axis=3), X4, {}),
    "softmax, last axis from the end": (12, node("Softmax", "x", axis=-1), X4, {}),
    "softmax, second last axis from the end": (12, node("Softmax", "x", axis=-2), X4, {}),
    "softmax of a matrix": (11, node("Softmax", "x"), X2, {}),
    "log softmax": (11, node("LogSoftmax", "x"), X4, {}),
    "hardmax": (11, node("Hardmax", "x", axis=1), X4, {}),
    "split in given parts": (11, node("Split", "x", "y z", axis=1, split=[3, 5]), X2, {}),
    "split in equal parts": (11, node("Split", "x", "y z", axis=1), X2, {}),
    "split 13 in equal parts": (13, node("Split", "x", "y z", axis=1), X2, {}),
    "squeeze": (11, node("Squeeze", "x", axes=[0]), X4[:1], {}),
    "squeeze all": (11, node("Squeeze", "x"), X4[:1, :1], {}),
    "unsqueeze": (11, node("Unsqueeze", "x", axes=[1, 3]), X2, {}),
    "reduce sum": (11, node("ReduceSum", "x", axes=[1], keepdims=0), X4, {}),
    "reduce mean": (13, node("ReduceMean", "x", axes=[-1, -2]), X4, {}),
    "reduce max over all": (12, node("ReduceMax", "x", keepdims=0), X4, {}),
    "reduce l2": (7, node("ReduceL2", "x", axes=[1]), X4, {}),
    "scatter": (
        9,
        node("Scatter", "x i u", axis=1),
        X2,
        {"i": i64(2, 0, 1).reshape(3, 1), "u": f32(9, 8, 7).reshape(3, 1)},
    ),
    "roi align": (
        10,
        node("RoiAlign", "x r i", output_height=2, output_width=2, sampling_ratio=2),
        X4,
        {"r": f32(0, 0, 4, 4, 1, 2, 5, 5).reshape(2, 4), "i": i64(0, 1)},
    ),
    "grid sample": (16, node("GridSample", "x g"), X4, {"g": RNG.uniform(-1, 1, (2, 3, 3, 2)).astype(np.float32)}),
    "grid sample bicubic": (
        16,
        node("GridSample", "x g", mode="bicubic"),
        X4,
        {"g": RNG.uniform(-1, 1, (2, 3, 3, 2)).astype(np.float32)},
    ),
    "dft": (17, node("DFT", "x"), RNG.normal(size=(1, 8, 2)).astype(np.float32), {}),
    "dft over another axis": (17, node("DFT", "x", axis=2), RNG.normal(size=(1, 3, 8, 1)).astype(np.float32), {}),
    "group norm": (
        18,
        node("GroupNormalization", "x s b", num_groups=2),
        X4,
        {"s": f32(1, 2), "b": f32(0.5, -1)},
    ),
}


@pytest.mark.parametrize("case", OLD)
def test_an_old_form_computes_the_same_at_opset_21(case):
    opset, one, array, weights = OLD[case]
    outputs = tuple(name for name in one.output if name not in ("i", "mask"))
    model = same(net([one], {"x": array}, outputs, weights, opset), {"x": array})
    assert model.opset_imports[""] == 21
    assert [value.name for value in model.graph.outputs] == list(outputs)


@pytest.mark.parametrize("case", ["softmax, middle axis", "softmax of a matrix", "clip", "squeeze all"])
def test_an_old_form_of_unknown_rank_computes_the_same(case):
    opset, one, array, _ = OLD[case]
    same(net([one], {"x": array}, opset=opset, rankless=True), {"x": array})


def test_softmax_of_an_old_opset_keeps_readers_and_output_name():
    nodes = [node("Softmax", "x", "p", axis=1), node("Relu", "p"), node("Softmax", "x", "q", axis=2)]
    model = same(net(nodes, {"x": X4}, ("y", "p", "q"), opset=11), {"x": X4})
    assert [value.name for value in model.graph.outputs] == ["y", "p", "q"]


def test_clip_of_half_precision_gets_bounds_of_half_precision():
    half = helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)
    proto = net([node("Clip", "x", min=-0.5, max=0.5)], {"x": X2.astype(np.float16)}, (half,), opset=10)
    model, _ = read(proto)
    assert {value.dtype for value in model.graph.initializers.values()} == {onnx_ir.DataType.FLOAT16}


def test_bodies_are_converted_too():
    def body(axis: int) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(f"b{axis}", TensorProto.FLOAT, None)
        return helper.make_graph([node("ReduceSum", "x", f"b{axis}", axes=[axis])], "body", [], [out])

    choose = node("If", "c", then_branch=body(0), else_branch=body(1))
    feed = {"x": X2, "c": np.array(True)}
    same(net([choose], feed, opset=11), feed)
    same(net([choose], feed, opset=11), {**feed, "c": np.array(False)})


def test_every_change_of_form_has_a_row():
    """From ``onnx.defs``: an op that lost an attribute or input, changed a default, needs more inputs or has fewer
    outputs, or is gone, between opset 7 and 21."""
    history: dict[str, list[onnx.defs.OpSchema]] = {}
    for schema in sorted(onnx.defs.get_all_schemas_with_history(), key=lambda schema: schema.since_version):
        if schema.domain == "":
            history.setdefault(schema.name, []).append(schema)
    changed = {
        (name, new.since_version)
        for name, schemas in history.items()
        for old, new in itertools.pairwise(schemas)
        if 7 < new.since_version <= 21 and old.since_version < 21 and _breaks(old, new)
    }
    by_hand = {
        ("Resize", 11),  # coordinates: no attribute before, another default since
        ("Resize", 13),  # scales became optional: an empty one may no longer stand beside sizes
        ("RoiAlign", 16),  # a new attribute whose default isn't the old behaviour
        ("Split", 18),  # equal parts need num_outputs
        ("GroupNormalization", 21),  # scale and bias a channel
    }
    no_row = {("OptionalHasElement", 18)}  # its input became optional
    assert changed - no_row - set(ADAPTERS) == set()
    assert set(ADAPTERS) - changed == by_hand - changed


def _breaks(old: onnx.defs.OpSchema, new: onnx.defs.OpSchema) -> bool:
    def defaults(schema: onnx.defs.OpSchema) -> dict[str, str]:
        return {name: str(item.default_value) for name, item in schema.attributes.items()}

    lost = [name for name, default in defaults(old).items() if defaults(new).get(name) != default]
    required = any(item.required and name not in old.attributes for name, item in new.attributes.items())
    return bool(lost or required or new.deprecated or new.min_input > old.min_input or new.max_output < old.max_output)


def test_a_model_newer_than_the_target_goes_down_when_its_ops_can():
    proto = net([node("Relu", "x", "r"), node("Softplus", "r")], {"x": X2}, opset=22)
    model, info = read(proto)
    assert model.opset_imports[""] == 21
    assert model.ir_version == 10
    assert info.opset == 22
    assert info.notes == ("opset 22 lowered to 21",)
    np.testing.assert_array_equal(run(model, {"x": X2})[0], run(proto, {"x": X2})[0])


def test_a_model_newer_than_the_target_keeps_its_opset_when_an_op_is_new():
    model, info = read(net([node("Swish", "x")], {"x": X2}, opset=24))
    assert model.opset_imports[""] == 24
    assert info.notes == ("opset 24 kept, since node 'swish' can't go down to 21: Swish is new since opset 21",)


def test_an_attribute_of_a_newer_opset_goes_when_it_has_its_default():
    plain = net([node("Cast", "x", to=TensorProto.FLOAT, round_mode="up")], {"x": X2}, opset=24)
    assert read(plain)[0].opset_imports[""] == 21
    other = net([node("Cast", "x", to=TensorProto.FLOAT, round_mode="down")], {"x": X2}, opset=24)
    assert read(other)[1].notes[0].endswith("Cast has round_mode='down', unknown there")


REFUSED: dict[str, tuple[onnx.ModelProto, tuple[str, ...]]] = {
    "too old": (net([node("Relu", "x")], {"x": X2}, opset=6), ("opset 6", "7 and newer")),
    "unknown op": (net([node("Reluu", "x")], {"x": X2}), ("'reluu'", "'Reluu'", "did you mean 'Relu'?")),
    "op newer than the opset": (net([node("HardSwish", "x")], {"x": X2}, opset=13), ("HardSwish", "since opset 14")),
    "unknown domain": (
        net([helper.make_node("Fast", ["x"], ["y"], "quick", domain="acme")], {"x": X2}),
        ("'quick' (Fast)", "'acme'"),
    ),
    "too new": (net([node("SwiGLU", "x")], {"x": X2}, opset=28), ("opset 28", "up to 27", "'swiglu'")),
    "batch norm a position": (
        net([node("BatchNormalization", "x s b m v", spatial=0)], {"x": X4}, weights=CHANNEL, opset=7),
        ("'batchnormalization' (BatchNormalization)", "spatial=0"),
    ),
    "dropout mask that is read": (
        net([node("Dropout", "x", "d mask"), node("Identity", "mask")], {"x": X4}, opset=7),
        ("'dropout' (Dropout)", "training outputs are read"),
    ),
    "resize both ways": (
        net([node("Resize", "x r")], {"x": X4}, weights={"r": f32(1, 1, 0.5, 2)}, opset=10),
        ("shrinks one axis and grows another",),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_named(case):
    proto, words = REFUSED[case]
    with pytest.raises(ModelError) as caught:
        read(proto)
    for word in words:
        assert word in str(caught.value)


def test_a_newer_file_format_is_named():
    proto = net([node("Relu", "x")], {"x": X2})
    proto.ir_version = 99
    with pytest.raises(ModelError, match="IR version 99"):
        read(proto)


# --- one form ---------------------------------------------------------------------------------------------------------


def constant(name: str, array: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))


def test_weights_become_initializers_and_leave_the_inputs():
    weight = RNG.normal(size=(8, 2)).astype(np.float32)
    proto = net(
        [constant("w", weight), node("MatMul", "x w", "h"), node("Add", "h b")], {"x": X2}, weights={"b": f32(1)}
    )
    proto.graph.input.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [1]))
    model, info = read(proto)
    assert [item.name for item in model.graph.inputs] == ["x"]
    assert set(model.graph.initializers) == {"w", "b"}
    assert {one.op_type for one in model.graph} == {"MatMul", "Add"}
    assert info.notes == ("1 weight taken off the inputs",)
    np.testing.assert_allclose(run(model, {"x": X2})[0], X2 @ weight + 1, rtol=1e-5)


def test_names_become_unique_and_the_signature_stays():
    nodes = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    body = [
        helper.make_graph(
            [helper.make_node("Neg", ["y"], [out])], "b", [], [helper.make_tensor_value_info(out, 1, None)]
        )
        for out in ("t", "t")
    ]
    nodes.append(helper.make_node("If", ["c"], ["z"], then_branch=body[0], else_branch=body[1]))
    feed = {"x": X2, "c": np.array(False)}
    model = same(net(nodes, feed, ("y", "z")), feed)
    names = [one.name for one in query.nodes(model)]
    values = [value.name for one in query.nodes(model) for value in one.outputs]
    assert all(names)
    assert len(set(names)) == len(names) == 5
    assert len(set(values)) == len(values)


def test_reading_leaves_the_given_model_alone():
    feed = {"x": X2, "sr": np.array(16000)}
    given = onnx_ir.from_proto(rates(feed))
    before = io.to_bytes(given)
    model, _ = read_model(given, opset=23, pins={"x": (3, 8)}, example={"sr": feed["sr"]})
    io.to_bytes(model)
    assert io.to_bytes(given) == before


REFERENCE = net([constant("x2", f32(2)), node("Mul", "x x2", "h"), node("Softmax", "h")], {"x": X2}, opset=11)
REFERENCE.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"


def test_model_metadata_stays_and_node_metadata_goes():
    proto = net([node("Relu", "x")], {"x": X2}, opset=12)
    helper.set_model_props(proto, {"character": "abc\ndef"})
    helper.set_metadata_props(proto.graph.node[0], {"pkg.torch.onnx.stack_trace": "long"})
    model, _ = read(proto)
    assert dict(model.metadata_props) == {"character": "abc\ndef"}
    assert not any(one.metadata_props for one in model.graph)


def test_functions_are_inlined():
    function = helper.make_function(
        "acme", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 21)]
    )
    calls = [
        helper.make_node("Twice", ["x"], ["h"], domain="acme"),
        helper.make_node("Twice", ["h"], ["y"], domain="acme"),
    ]
    proto = net(calls, {"x": X2}, functions=[function])
    proto.opset_import.append(helper.make_opsetid("acme", 1))
    model, info = read(proto)
    assert not model.functions
    assert info.notes == ("1 function inlined",)
    np.testing.assert_allclose(run(model, {"x": X2})[0], 4 * X2)


def test_a_function_of_another_opset_is_named():
    function = helper.make_function(
        "acme", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 13)]
    )
    proto = net([helper.make_node("Twice", ["x"], ["y"], domain="acme")], {"x": X2}, functions=[function])
    proto.opset_import.append(helper.make_opsetid("acme", 1))
    with pytest.raises(ModelError, match="function 'Twice' uses opset 13"):
        read(proto)


def test_wrong_declared_shapes_are_corrected():
    wrong = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 9])
    proto = net([node("Relu", "x", "h"), node("Neg", "h")], {"x": X2}, (wrong,))
    proto.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [5, 5, 5]))
    model, info = read(proto)
    assert query.dims(model.graph.outputs[0]) == (3, 8)
    assert query.dims(model.graph.node(0).outputs[0]) == (3, 8)
    assert info.notes == ("output 'y' is declared [3, 9] and has [3, 8]",)


@pytest.mark.parametrize("sizes", [[-1, 8], [0, 8], ["?", "?"], [None, None]])
def test_sizes_that_say_nothing_are_dynamic(sizes):
    proto = net([node("Relu", "x")], {"x": X2})
    proto.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes))
    shape = read(proto)[0].graph.inputs[0].shape
    assert str(shape[0]) == "x_axis0"
    assert shape[0] != shape[1]


def test_outputs_that_are_read_inputs_and_constants_survive():
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [2])
    feed = {"x": X2, "ids": i64(3, 4)}
    nodes = [node("Relu", "x", "r"), node("Neg", "r"), constant("k", f32(5))]
    model = same(net(nodes, feed, ("r", "y", ids, "k")), feed)
    assert [value.name for value in model.graph.outputs] == ["r", "y", "ids", "k"]


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_pins_make_shapes_static_to_the_end():
    model, info = read(REFERENCE, pins={"x": (4, 8)})
    assert query.dims(model.graph.inputs[0]) == (4, 8)
    assert query.dims(model.graph.outputs[0]) == (4, 8)
    assert "input 'x' pinned to [4, 8]" in info.notes


def test_pins_give_a_shape_to_an_input_without_one():
    model, _ = read(net([node("Relu", "x")], {"x": X2}, rankless=True), pins={"x": (2, 5)})
    assert query.dims(model.graph.outputs[0]) == (2, 5)


@pytest.mark.parametrize(
    ("pins", "words"),
    [
        ({"input": (1, 8)}, ("no input 'input'", "known: x")),
        ({"x": (1, 8, 1)}, ("'x' has 2 axes [?, 8]", "has 3")),
        ({"x": (1, 9)}, ("'x' has size 8 on axis 1", "says 9")),
        ({"x": (0, 8)}, ("size 0 on axis 0",)),
    ],
)
def test_pins_that_do_not_fit_are_named(pins, words):
    with pytest.raises(UsageError) as caught:
        read(REFERENCE, pins=pins)
    for word in words:
        assert word in str(caught.value)


# --- branches ---------------------------------------------------------------------------------------------------------


def branch(name: str, *nodes: onnx.NodeProto, out: str, weights: Arrays | None = None) -> onnx.GraphProto:
    stored = [numpy_helper.from_array(array, key) for key, array in (weights or {}).items()]
    return helper.make_graph(
        list(nodes), name, [], [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)], stored
    )


def rates(feed: Arrays) -> onnx.ModelProto:
    """Two networks by rate, the first with an inner ``If`` on the batch; both read ``h`` from outside and use the same
    inner names."""
    inner = node(
        "If",
        "one",
        "i",
        then_branch=branch("a", node("Neg", "t", "u"), out="u"),
        else_branch=branch("b", node("Abs", "t", "u"), out="u"),
    )
    fast = branch(
        "fast",
        node("Mul", "h k", "t"),
        node("Shape", "h", "s"),
        node("Gather", "s zero", "n"),
        node("Equal", "n first", "one"),
        inner,
        out="i",
        weights={"k": f32(3)},
    )
    slow = branch("slow", node("Mul", "h k", "t"), node("Exp", "t", "i"), out="i", weights={"k": f32(-1)})
    nodes = [
        node("Relu", "x", "h"),
        node("Equal", "sr high", "c"),
        node("If", "c", "y", then_branch=fast, else_branch=slow),
    ]
    return net(nodes, feed, weights={"high": np.array(16000), "zero": np.array(0), "first": np.array(1)})


@pytest.mark.parametrize("rate", [16000, 8000])
@pytest.mark.parametrize("batch", [1, 3])
def test_branches_on_a_fixed_scalar_are_inlined(rate, batch):
    feed = {"x": X2[:batch], "sr": np.array(rate)}
    proto = rates(feed)
    expected = run(proto, feed)[0]
    model, info = read(proto, example={"sr": feed["sr"]})
    assert "If" not in {one.op_type for one in query.nodes(model)}
    assert [value.name for value in model.graph.inputs] == ["x", "sr"]
    assert info.fixed == {"sr": rate}
    assert f"sr = {rate}" in info.notes[-1]
    np.testing.assert_array_equal(run(model, feed)[0], expected)


def test_branches_stay_without_a_value():
    feed = {"x": X2, "sr": np.array(8000)}
    model, info = read(rates(feed))
    assert [one.op_type for one in model.graph].count("If") == 1
    assert info.fixed == {}
    for rate in (8000, 16000):
        np.testing.assert_array_equal(
            run(model, {**feed, "sr": np.array(rate)})[0], run(rates(feed), {**feed, "sr": np.array(rate)})[0]
        )


def test_other_readers_of_a_fixed_input_still_follow_it():
    feed = {"x": X2, "sr": np.array(16000)}
    proto = rates(feed)
    proto.graph.node.extend([node("Cast", "sr", "f", to=TensorProto.FLOAT), node("Add", "y f", "z")])
    proto.graph.output[0].name = "z"
    model, _ = read(proto, example={"sr": np.array(16000)})
    high, low = (run(model, {"x": X2, "sr": np.array(rate)})[0] for rate in (16000, 1000))
    np.testing.assert_allclose(high - low, 15000)


def test_a_branch_that_hands_through_outer_values_keeps_the_output_names():
    through = helper.make_graph(
        [node("Identity", "h", "p")],
        "through",
        [],
        [helper.make_tensor_value_info("p", 1, None), helper.make_tensor_value_info("p", 1, None)],
    )
    nodes = [node("Relu", "x", "h"), node("If", "c", "y z", then_branch=through, else_branch=through)]
    feed = {"x": X2, "c": np.array(True)}
    proto = net(nodes, feed, ("y", "z", "h"))
    model, _ = read(proto, example={"c": np.array(True)})
    assert [value.name for value in model.graph.outputs] == ["y", "z", "h"]
    for found in run(model, feed):
        np.testing.assert_array_equal(found, np.maximum(X2, 0))


def test_specialise_names_an_unknown_input_and_a_value_that_is_not_one():
    model, _ = read(rates({"x": X2, "sr": np.array(8000)}))
    with pytest.raises(UsageError, match="no input 'rate' to fix"):
        specialise(model, {"rate": np.array(1)})
    with pytest.raises(UsageError, match="can't be fixed to 24 values"):
        specialise(model, {"x": X2})


# --- paths ------------------------------------------------------------------------------------------------------------


def test_a_file_is_read_with_its_name_and_digest(tmp_path):
    path = tmp_path / "net.onnx"
    onnx.save(REFERENCE, path)
    _, info = read_model(path, opset=21)
    assert (info.origin, info.kind, info.opset) == (str(path), "onnx", 11)
    assert info.digest == io.digest(io.read(path))


def test_a_folder_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="is a folder"):
        read_model(tmp_path, opset=21)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("json:laod", ("'json' has no 'laod'", "did you mean 'load'?")),
        ("jsonn:dumps", ("no module 'jsonn'", "folder")),
        ("json:", ("no import path", "pkg.module:callable")),
        ("broken_source:make", ("'broken_source' can't be imported", "pip install nowhere_to_be_found")),
    ],
)
def test_import_paths_that_lead_nowhere_are_named(path, words, tmp_path, monkeypatch):
    (tmp_path / "broken_source.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        load(path)
    for word in words:
        assert word in str(caught.value)


def test_import_paths_start_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "here_only.py").write_text("class Net:\n    width = 3\n")
    monkeypatch.chdir(tmp_path)
    assert load("here_only:Net.width") == 3


@pytest.mark.zoo
@pytest.mark.parametrize(
    "file",
    [
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
    ],
)
def test_ocr_models_compute_the_same(file):
    from tests.zoo.packages import package_file

    feed = {"x": RNG.uniform(-1, 1, (1, 3, 48, 192) if "det" not in file else (1, 3, 64, 96)).astype(np.float32)}
    proto = onnx.load(package_file(file))
    model = same(proto, feed)
    assert dict(model.metadata_props) == {item.key: item.value for item in proto.metadata_props}
    assert all(one.op_type != "Constant" for one in model.graph)


@pytest.mark.zoo
def test_magika_computes_the_same():
    from tests.zoo.packages import package_file

    feed = {"bytes": RNG.integers(0, 256, (2, 2048)).astype(np.int32)}
    same(onnx.load(package_file("magika/models/standard_v3_3/model.onnx")), feed)


@pytest.mark.zoo
@pytest.mark.parametrize("rate", [16000, 8000])
def test_silero_vad_becomes_one_flat_network(rate):
    from tests.zoo.packages import package_file

    width = 576 if rate == 16000 else 288
    proto = onnx.load(package_file("silero_vad/data/silero_vad.onnx"))
    model, info = read(proto, pins={"input": (1, width), "state": (2, 1, 128)}, example={"sr": np.array(rate)})
    assert "If" not in {one.op_type for one in query.nodes(model)}
    assert info.fixed == {"sr": rate}
    state = np.zeros((2, 1, 128), np.float32)
    for _ in range(3):
        sound = RNG.uniform(-1, 1, (1, width)).astype(np.float32)
        feed = {"input": sound, "state": state, "sr": np.array(rate)}
        expected, found = run(proto, feed), run(model, feed)
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_allclose(b, a, atol=1e-6)
        state = expected[1]


def test_reading_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys, edgeq.source; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False).returncode == 0
