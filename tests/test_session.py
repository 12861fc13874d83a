"""Sessions: what they load, how they say no, and that they compute what the reference evaluator computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgeq.errors import ModelError, RuntimeUnavailableError, SampleError
from edgeq.run.session import feeds_like, input_specs, open_session, output_specs, run_session
from edgeq.target.record import Provider


def linear(batch: str | int = "n") -> onnx.ModelProto:
    """``y = relu(x W + b)`` with x f32[batch, 4], y f32[batch, 3]."""
    rng = np.random.default_rng(0)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "W"], ["xW"], name="multiply"),
            helper.make_node("Add", ["xW", "b"], ["sum"], name="shift"),
            helper.make_node("Relu", ["sum"], ["y"], name="cut"),
        ],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3])],
        [
            numpy_helper.from_array(rng.normal(size=(4, 3)).astype(np.float32), "W"),
            numpy_helper.from_array(rng.normal(size=3).astype(np.float32), "b"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("level", ["all", "extended", "basic", "none"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_session_computes_what_the_reference_evaluator_computes(level, threads):
    proto = linear()
    session = open_session(proto.SerializeToString(), level=level, threads=threads)
    feed = {"x": np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)}
    expected = ReferenceEvaluator(proto).run(None, feed)[0]
    np.testing.assert_allclose(run_session(session, feed)["y"], expected, rtol=1e-5, atol=1e-6)


def test_file_bytes_and_ir_model_are_the_same_session(tmp_path):
    onnx.save(linear(), tmp_path / "linear.onnx")
    feed = {"x": np.ones((1, 4), np.float32)}
    sources = [tmp_path / "linear.onnx", linear().SerializeToString(), onnx_ir.from_proto(linear())]
    first, *others = [run_session(open_session(source), feed)["y"] for source in sources]
    for other in others:
        np.testing.assert_array_equal(other, first)


def test_a_model_too_large_for_one_protobuf_goes_through_files(monkeypatch, tmp_path):
    from edgeq.ir import io

    monkeypatch.setattr(io, "INLINE_BYTES", 16)
    session = open_session(onnx_ir.from_proto(linear()), optimized_path=tmp_path / "optimized.onnx")
    feed = {"x": np.ones((1, 4), np.float32)}
    expected = run_session(open_session(linear().SerializeToString()), feed)["y"]
    np.testing.assert_array_equal(run_session(session, feed)["y"], expected)
    assert (tmp_path / "optimized.onnx").is_file()


def test_signatures_name_dtype_and_shape():
    session = open_session(linear().SerializeToString())
    assert [str(spec) for spec in input_specs(session)] == ["x float32[n, 4]"]
    assert input_specs(session) == input_specs(onnx_ir.from_proto(linear()))
    assert output_specs(session) == output_specs(onnx_ir.from_proto(linear()))


def test_initializers_listed_as_inputs_are_no_inputs():
    proto = linear()
    proto.graph.input.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, [4, 3]))
    assert [spec.name for spec in input_specs(onnx_ir.from_proto(proto))] == ["x"]
    assert [spec.name for spec in input_specs(open_session(proto.SerializeToString()))] == ["x"]


def test_synthetic_feeds_fit_and_repeat():
    session = open_session(linear().SerializeToString())
    feed = feeds_like(session, seed=3, dims={"n": 2})
    assert feed["x"].shape == (2, 4) and feed["x"].dtype == np.float32
    np.testing.assert_array_equal(feed["x"], feeds_like(session, seed=3, dims={"n": 2})["x"])


def test_config_entries_and_profile_reach_the_runtime(tmp_path):
    session = open_session(
        linear().SerializeToString(),
        config={"session.intra_op.allow_spinning": "0"},
        profile_prefix=tmp_path / "profile",
    )
    assert session.get_session_options().get_session_config_entry("session.intra_op.allow_spinning") == "0"
    session.run(None, {"x": np.ones((1, 4), np.float32)})
    assert Path(session.end_profiling()).parent == tmp_path


def test_what_the_runtime_cannot_load_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match=r"can't load the model in memory: .*INVALID_PROTOBUF"):
        open_session(b"not a model")
    with pytest.raises(ModelError, match=r"absent.onnx: no such file"):
        open_session(tmp_path / "absent.onnx")
    proto = linear()
    proto.graph.node[2].op_type = "Rellu"
    with pytest.raises(ModelError, match="Rellu"):
        open_session(proto.SerializeToString())


def test_an_absent_provider_is_named_with_those_here():
    with pytest.raises(RuntimeUnavailableError, match=r"'NopeProvider'.*\n.*CPUExecutionProvider"):
        open_session(linear().SerializeToString(), provider=Provider("NopeProvider"))


@pytest.mark.parametrize(
    "feed",
    [{}, {"x": np.ones((1, 5), np.float32)}, {"x": np.ones((1, 4), np.int64)}, {"y": np.ones((1, 4), np.float32)}],
    ids=["missing", "shape", "dtype", "name"],
)
def test_a_feed_that_does_not_fit_is_a_sample_error_with_the_signature(feed):
    session = open_session(linear().SerializeToString())
    with pytest.raises(SampleError, match=r"doesn't fit the model.*(\n.*)*x float32\[n, 4\]"):
        run_session(session, feed)


def test_a_node_that_fails_while_running_is_a_model_error():
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"], name="fold")],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
            helper.make_tensor_value_info("shape", TensorProto.INT64, [2]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b"])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with pytest.raises(ModelError, match=r"fails while running: .*fold"):
        run_session(
            open_session(proto.SerializeToString()),
            {"x": np.ones(5, np.float32), "shape": np.array([2, 3], np.int64)},
        )
