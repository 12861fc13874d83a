"""The helpers on onnx-ir: files and what is wrong with them, digests, edits, questions, the verifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgeq.errors import ModelError, OutputError
from edgeq.ir import edit, io, query, verify
from edgeq.run.session import open_session, run_session

W = np.arange(1200, dtype=np.float32).reshape(4, 300)


def linear() -> onnx.ModelProto:
    """``y = relu(x W)``, x f32[n, 4]."""
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["h"], "multiply"),
        helper.make_node("Relu", ["h"], ["y"], "cut"),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 300])],
        [numpy_helper.from_array(W, "W")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def model() -> ir.Model:
    return ir.from_proto(linear())


def save_external(folder: Path, location: str = "weights.bin") -> Path:
    path = folder / "net.onnx"
    onnx.save_model(linear(), path, save_as_external_data=True, location=location, size_threshold=0)
    return path


def run(data: bytes | Path) -> np.ndarray:
    return onnxruntime.InferenceSession(data).run(None, {"x": np.ones((2, 4), np.float32)})[0]


# --- reading ----------------------------------------------------------------------------------------------------------


def test_weights_in_another_file_are_read_from_there(tmp_path):
    found = io.read(save_external(tmp_path))
    tensor = found.graph.initializers["W"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    np.testing.assert_array_equal(tensor.numpy(), W)


def missing(folder: Path) -> Path:
    return folder / "none.onnx"


def truncated(folder: Path) -> Path:
    path = folder / "cut.onnx"
    path.write_bytes(linear().SerializeToString()[:-100])
    return path


def empty(folder: Path) -> Path:
    path = folder / "empty.onnx"
    path.write_bytes(b"")
    return path


def data_missing(folder: Path) -> Path:
    path = save_external(folder)
    (folder / "weights.bin").unlink()
    return path


def data_cut(folder: Path) -> Path:
    path = save_external(folder)
    (folder / "weights.bin").write_bytes(b"short")
    return path


def data_outside(folder: Path) -> Path:
    (folder / "inner").mkdir()
    path = save_external(folder / "inner")
    (folder / "inner" / "weights.bin").rename(folder / "secret.bin")
    proto = onnx.load_model(path, load_external_data=False)
    next(entry for entry in proto.graph.initializer[0].external_data if entry.key == "location").value = "../secret.bin"
    path.write_bytes(proto.SerializeToString())
    return path


def sparse_weight(folder: Path) -> Path:
    proto = linear()
    values, indices = numpy_helper.from_array(np.ones(1, np.float32), "thin"), numpy_helper.from_array(np.array([0]))
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [300]))
    path = folder / "sparse.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def sparse_constant(folder: Path) -> Path:
    proto = linear()
    values, indices = numpy_helper.from_array(np.ones(1, np.float32)), numpy_helper.from_array(np.array([0]))
    sparse = helper.make_sparse_tensor(values, indices, [300])
    proto.graph.node.append(helper.make_node("Constant", [], ["s"], "thin", sparse_value=sparse))
    path = folder / "sparse.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


HEAD = '<ir_version: 9, opset_import: ["" : 17]> net (float[4] x) => (float[4] y)'


def circular(folder: Path) -> Path:
    path = folder / "circle.onnx"
    onnx.save(onnx.parser.parse_model(f"{HEAD} {{ a = Add(x, b) b = Abs(a) y = Relu(b) }}"), path)
    return path


def test_nodes_in_any_order_are_put_in_one_that_runs(tmp_path):
    """Converters append what they add at the end; ONNX Runtime doesn't mind."""
    proto = onnx.parser.parse_model(f"{HEAD} {{ a = Abs(x) b = Neg(a) c = Add(a, b) y = Exp(c) }}")
    path = tmp_path / "shuffled.onnx"
    sorted_names = [node.op_type for node in proto.graph.node]
    for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
        shuffled = onnx.ModelProto.FromString(proto.SerializeToString())
        nodes = list(shuffled.graph.node)
        del shuffled.graph.node[:]
        shuffled.graph.node.extend(nodes[index] for index in order)
        onnx.save(shuffled, path)
        read = io.read(path)
        assert [node.op_type for node in read.graph] == sorted_names
        feed = {"x": np.arange(4, dtype=np.float32)}
        np.testing.assert_array_equal(
            run_session(open_session(read), feed)["y"], run_session(open_session(path), feed)["y"]
        )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (circular, ("circle.onnx", "wait for each other", "export it again")),
        (missing, ("no model file", "none.onnx", "pkg.module:callable")),
        (truncated, ("cut.onnx", "not a complete ONNX file", "copy it again")),
        (empty, ("empty.onnx", "holds no graph")),
        (data_missing, ("'weights.bin'", "'W'", "missing beside")),
        (data_cut, ("ends at byte 5", "'W' needs 4800", "copy it again")),
        (data_outside, ("'W'", "points outside its folder", "../secret.bin")),
        (sparse_weight, ("'thin'", "sparse_initializer", "dense")),
        (sparse_constant, ("not a valid ONNX model", "Sparse tensors are not supported")),
    ],
)
def test_what_is_wrong_with_a_file_is_told(make, words, tmp_path):
    with pytest.raises(ModelError) as caught:
        io.read(make(tmp_path))
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 500


# --- writing ----------------------------------------------------------------------------------------------------------


def test_small_models_are_one_file_and_large_ones_two(tmp_path, monkeypatch):
    io.write(model(), tmp_path / "small.onnx")
    monkeypatch.setattr(io, "INLINE_BYTES", 1000)
    io.write(model(), tmp_path / "large.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data", "small.onnx"]
    np.testing.assert_array_equal(run(tmp_path / "small.onnx"), run(tmp_path / "large.onnx"))
    assert io.size_bytes(tmp_path / "large.onnx") >= W.nbytes
    assert io.weight_bytes(io.read(tmp_path / "large.onnx")) == W.nbytes


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        io.write(model(), path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OutputError, match=r"can't write .*net\.onnx"):
        io.write(model(), tmp_path / "no" / "net.onnx")


# --- digest -----------------------------------------------------------------------------------------------------------


def test_the_digest_does_not_ask_where_weights_are_stored(tmp_path):
    path = tmp_path / "inline.onnx"
    onnx.save(linear(), path)
    (tmp_path / "outer").mkdir()
    digests = {io.digest(model()), io.digest(io.read(path)), io.digest(io.read(save_external(tmp_path / "outer")))}
    assert len(digests) == 1
    assert io.digest(model().clone()) in digests


@pytest.mark.parametrize("change", ["weight", "op", "edge", "attribute", "shape"])
def test_the_digest_sees_every_change(change):
    changed = linear()
    if change == "weight":
        changed.graph.initializer[0].CopyFrom(numpy_helper.from_array(W + (W == 7), "W"))
    elif change == "op":
        changed.graph.node[1].op_type = "Abs"
    elif change == "edge":
        changed.graph.node[1].input[0] = "x"
    elif change == "attribute":
        changed.graph.node[1].attribute.append(helper.make_attribute("alpha", 0.5))
    else:
        changed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    assert io.digest(ir.from_proto(changed)) != io.digest(model())


# --- edits ------------------------------------------------------------------------------------------------------------


def parsed(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}'))


def test_names_are_fresh_across_bodies():
    names = edit.Names(
        parsed(
            "g (bool c, float[2] x) => (float[2] y) { y = If (c) <"
            "then_branch = t () => (float[2] a) { a = Neg (x) }, else_branch = e () => (float[2] b) { b = Abs (x) }> }"
        )
    )
    assert [names.fresh(wanted) for wanted in ("x", "a", "y", "new", "new", "a")] == [
        "x_2", "a_2", "y_2", "new", "new_2", "a_3",
    ]  # fmt: skip


def test_dead_nodes_and_weights_go_and_outputs_stay():
    found = parsed(
        "g (float[2] x) => (float[2] y, float[2] z) <float[2] used = {1, 2}, float[2] unused = {3, 4}>"
        "{ y = Add (x, used) d = Mul (x, unused) e = Neg (d) z = Abs (y) }"
    )
    assert edit.drop_dead(found) == 2
    assert [node.op_type for node in found.graph] == ["Add", "Abs"]
    assert list(found.graph.initializers) == ["used"]


def test_taking_over_an_output_with_readers_keeps_its_name_for_both():
    found = parsed("g (float[2] x) => (float[2] y, float[2] z) { y = Relu (x) z = Neg (y) }")
    relu = found.graph.node(0)
    new = edit.make_node(
        "Clip", [relu.inputs[0], edit.add_initializer(found.graph, "low", np.float32(0))], "n", "fresh"
    )
    edit.replace_node(found.graph, relu, [new])
    assert [value.name for value in found.graph.outputs] == ["y", "z"]
    assert found.graph.outputs[0].producer() is new
    assert query.users(new.outputs[0]) == [found.graph.node(1)]
    assert query.dims(new.outputs[0]) == (2,)
    x = np.array([-1, 2], np.float32)
    y, z = onnxruntime.InferenceSession(io.to_bytes(found)).run(None, {"x": x})
    np.testing.assert_array_equal(y, [0, 2])
    np.testing.assert_array_equal(z, [0, -2])


# --- questions --------------------------------------------------------------------------------------------------------


def test_a_graph_input_with_a_default_is_no_constant():
    proto = linear()
    proto.graph.input.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, [4, 300]))
    assert query.constant(ir.from_proto(proto).graph.initializers["W"]) is None
    np.testing.assert_array_equal(query.constant(model().graph.initializers["W"]), W)
    assert query.constant(None) is None


def test_dims_have_none_where_sizes_are_dynamic():
    assert query.dims(model().graph.inputs[0]) == (None, 4)
    assert query.dims(ir.Value(name="unknown")) is None


def one_op(op: str, shape: tuple[int, ...], weight: tuple[int, ...], **attributes: Any) -> ir.Model:
    node = helper.make_node(op, ["x", "w"], ["y"], **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones(weight, np.float32), "w")],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def counted(one: ir.Model, shape: tuple[int, ...]) -> tuple[int, int]:
    """(macs as computed, macs as done): of ones only, each product adds 1 to the sum of all outputs."""
    y = onnxruntime.InferenceSession(io.to_bytes(one)).run(None, {"x": np.ones(shape, np.float32)})[0]
    return query.macs(one.graph.node(0), y.shape), int(y.sum())


sizes = st.integers(1, 4)


@settings(max_examples=25)
@given(sizes, sizes, sizes, st.integers(1, 3), st.integers(1, 2), st.integers(1, 3))
def test_macs_of_convolutions(batch, inner, outer, kernel, groups, stride):
    shape = (batch, inner * groups, 5, 6)
    conv = one_op("Conv", shape, (outer * groups, inner, kernel, kernel), group=groups, strides=[stride, stride])
    computed, done = counted(conv, shape)
    assert computed == done


@settings(max_examples=25)
@given(sizes, sizes, sizes, st.integers(1, 3), st.integers(1, 2))
def test_macs_of_transposed_convolutions(batch, inner, outer, stride, groups):
    """With kernel = stride, where output positions don't overlap, the formula is exact."""
    shape = (batch, inner * groups, 3, 4)
    weight = (inner * groups, outer, stride, stride)
    computed, done = counted(one_op("ConvTranspose", shape, weight, group=groups, strides=[stride, stride]), shape)
    assert computed == done


@settings(max_examples=25)
@given(sizes, sizes, sizes, st.booleans(), st.booleans())
def test_macs_of_matrix_products(rows, depth, columns, trans_a, trans_b):
    shape = (depth, rows) if trans_a else (rows, depth)
    weight = (columns, depth) if trans_b else (depth, columns)
    computed, done = counted(one_op("Gemm", shape, weight, transA=int(trans_a), transB=int(trans_b)), shape)
    assert computed == done
    computed, done = counted(one_op("MatMul", (2, rows, depth), (depth, columns)), (2, rows, depth))
    assert computed == done


def test_ops_that_do_not_multiply_have_no_macs():
    assert query.macs(model().graph.node(1), (2, 300)) == 0
    assert query.macs(model().graph.node(0), None) == 0


def test_out_axis_follows_the_transposition_of_a_gemm():
    for transposed, axis in ((0, 1), (1, 0)):
        node = one_op("Gemm", (2, 3), (3, 3), transB=transposed).graph.node(0)
        assert query.out_axis(node) == axis
    assert query.out_axis(one_op("MatMul", (2, 3), (3, 4)).graph.node(0)) == 1


# --- the verifier -----------------------------------------------------------------------------------------------------


def test_shapes_are_inferred_and_wrong_ones_forgotten():
    proto = linear()
    proto.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [9, 9, 9]))
    given_model = ir.from_proto(proto)
    found = verify.infer_shapes(given_model)
    assert query.dims(found.graph.node(0).outputs[0]) == (None, 300)
    assert query.dims(given_model.graph.node(0).outputs[0]) == (9, 9, 9)


def test_the_verifier_names_the_step():
    verify.verify(model(), "reading")
    twice = model()
    twice.graph.node(0).outputs[0].name = "y"
    with pytest.raises(ModelError, match="after folding: two nodes write 'y'"):
        verify.verify(twice, "folding")
    unknown = model()
    unknown.graph.node(1).op_type = "Reluu"
    with pytest.raises(ModelError, match=r"after folding: the model is not valid ONNX: .*Reluu"):
        verify.verify(unknown, "folding")


def test_the_verifier_takes_inputs_and_outputs_of_unknown_rank():
    found = model()
    found.graph.inputs[0].shape = None
    found.graph.outputs[0].shape = None
    verify.verify(found, "reading")
    assert found.graph.inputs[0].shape is None
