"""Costs by hand, shapes against what a run gives."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest

from edgeq.analyse.cost import Cost, concrete_shapes, costs, inferred_shapes
from edgeq.run.session import open_session, run_session

OPSET = '<ir_version: 10, opset_import: ["" : 21]>'


def parsed(text: str, **weights: tuple[int, ...]) -> onnx_ir.Model:
    """A model from ONNX's text form with zero weights in these shapes, nodes named after their first output."""
    proto = onnx.parser.parse_model(OPSET + text)
    for name, shape in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))
    for node in proto.graph.node:
        node.name = node.output[0]
    return onnx_ir.from_proto(proto)


def feed(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


CASES = [
    # text, weight shapes, input shapes, node, macs by hand
    ("g (float[n,8,h,w] x) => (float[n,m,a,b] y) { y = Conv <strides=[2,2], pads=[1,1,1,1]> (x, k) }",
     {"k": (16, 8, 3, 3)}, {"x": (2, 8, 10, 10)}, 2 * 16 * 5 * 5 * 8 * 9),
    ("g (float[n,8,h,w] x) => (float[n,m,a,b] y) { y = Conv <group=8> (x, k) }",
     {"k": (8, 1, 3, 3)}, {"x": (1, 8, 10, 10)}, 8 * 8 * 8 * 9),
    ("g (float[n,8,h,w] x) => (float[n,m,a,b] y) { y = ConvTranspose <strides=[2,2]> (x, k) }",
     {"k": (8, 4, 2, 2)}, {"x": (1, 8, 5, 5)}, 8 * 5 * 5 * 4 * 4),
    ("g (float[n,s,c] x) => (float[n,s,o] y) { y = MatMul (x, k) }",
     {"k": (6, 7)}, {"x": (2, 5, 6)}, 2 * 5 * 6 * 7),
    ("g (float[n,s,c] x, float[n,c,t] z) => (float[n,s,t] y) { y = MatMul (x, z) }",
     {}, {"x": (2, 5, 6), "z": (2, 6, 3)}, 2 * 5 * 6 * 3),
    ("g (float[n,c] x) => (float[a,b] y) { y = Gemm <transA=1, transB=1> (x, k) }",
     {"k": (7, 5)}, {"x": (5, 9)}, 9 * 5 * 7),
    ("g (float[s,b,i] x) => (float[s,d,b,h] y) { y = LSTM <hidden_size=4> (x, w, r) }",
     {"w": (1, 16, 3), "r": (1, 16, 4)}, {"x": (6, 2, 3)}, 6 * 2 * 16 * (3 + 4)),
    ("g (float[n,c] x) => (float[n,c] y) { y = Relu (x) }", {}, {"x": (3, 4)}, 0),
]  # fmt: skip


@pytest.mark.parametrize(("text", "weights", "inputs", "macs"), CASES)
def test_multiply_accumulates_are_those_counted_by_hand(text, weights, inputs, macs):
    model = parsed(text, **weights)
    assert costs(model, concrete_shapes(model, feed(**inputs)))["y"].macs == macs


def test_bytes_are_of_constants_and_of_activations_moved():
    model = parsed("g (float[n,4] x) => (float[n,3] y) { a = MatMul (x, k) y = Relu (a) }", k=(4, 3))
    found = costs(model, concrete_shapes(model, feed(x=(5, 4))))
    assert found == {"a": Cost(5 * 4 * 3, 4 * 3 * 4, (5 * 4 + 5 * 3) * 4), "y": Cost(0, 0, 2 * 5 * 3 * 4)}
    assert costs(model, {})["a"] == Cost(0, 48, 0)  # unknown shapes cost nothing, not a guess


MIXED = """g (float[n, c, h, w] x) => (float[n, q] y, int64[r, z] where) {
    pooled = GlobalAveragePool (x)
    size = Shape <end = 2> (x)
    flat = Reshape (pooled, size)
    y = Relu (flat)
    where = NonZero (y)
    twice = Transpose (where)
}"""


def test_shapes_are_those_of_a_run_even_where_the_data_decides():
    model, x = parsed(MIXED), np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    inner = model.clone()
    values = [value for node in inner.graph for value in node.outputs]
    inner.graph.outputs.extend(value for value in values if not value.is_graph_output())
    truth = {name: array.shape for name, array in run_session(open_session(inner), {"x": x}).items()}
    assert "where" not in inferred_shapes(model, {"x": x})
    found = concrete_shapes(model, {"x": x})
    assert {name: found[name] for name in truth} == truth
    assert found["x"] == (2, 3, 4, 5)


def test_inference_alone_follows_the_feed_and_leaves_the_model_as_it_was():
    model = parsed("g (float[n,s,c] x) => (float[n,s,o] y) { y = MatMul (x, k) }", k=(6, 7))
    before = onnx_ir.to_proto(model).SerializeToString()
    assert inferred_shapes(model, feed(x=(2, 5, 6)))["y"] == (2, 5, 7)
    assert inferred_shapes(model, feed(x=(1, 9, 6)))["y"] == (1, 9, 7)
    assert onnx_ir.to_proto(model).SerializeToString() == before
