"""Small graphs for tests, written in ONNX's text form, and an independent answer to what they compute."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.rewrite.canonicalize import canonicalize
from edgeq.run.session import open_session, run_session

Arrays = Mapping[str, NDArray[Any]]
_drawing: dict[str, np.random.Generator] = {}
_test = ""


def start_test(name: str) -> None:
    """From here on ``normal`` draws what it always draws in the test ``name``, whatever ran before it."""
    global _test
    _test = name
    _drawing.clear()


def normal(*shape: int) -> NDArray[np.float32]:
    """Standard normal f32 numbers: a sequence a test, and one a module for what is drawn on import."""
    who = _test or sys._getframe(1).f_globals["__name__"]
    if who not in _drawing:
        _drawing[who] = np.random.default_rng(zlib.crc32(who.encode()))
    return _drawing[who].standard_normal(shape).astype(np.float32)


def number(value: float) -> NDArray[np.float32]:
    return np.array(value, np.float32)


def graph(text: str, weights: Arrays | None = None, opset: int = 21) -> ir.Model:
    """``(float[N, 3] x) => (float[N, 3] y) { y = Relu (x) }`` with initializers -> Model."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {text}')
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return ir.from_proto(proto)


def ops(model: ir.Model) -> list[str]:
    """Op types in graph order, bodies behind their node."""
    return [node.op_type for node in model.graph.all_nodes()]


def reference(model: ir.Model, feed: Arrays) -> list[NDArray[Any]]:
    """Outputs by onnx's reference evaluator; by ONNX Runtime where that one is wrong (ConvTranspose with groups)."""
    if any(node.op_type == "ConvTranspose" and "group" in node.attributes for node in model.graph):
        return list(run_session(open_session(model, level="none"), feed).values())
    outputs: list[NDArray[Any]] = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, dict(feed))
    return outputs


def random_feed(model: ir.Model, dims: Mapping[str, int] | None = None) -> dict[str, NDArray[Any]]:
    """Normal inputs; a dynamic axis is 2 unless ``dims`` says otherwise."""
    feed = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None
        shape = [dim if isinstance(dim, int) else (dims or {}).get(str(dim.value), 2) for dim in value.shape]
        feed[str(value.name)] = normal(*shape).astype(value.dtype.numpy())
    return feed


def rewritten(text: str, weights: Arrays | None = None, opset: int = 21, **dims: int) -> ir.Model:
    """The canonical form of a graph, proven by comparing ONNX Runtime on it with the reference evaluator on the graph
    as written. No feeds are given to ``canonicalize``, so nothing is rolled back in silence."""
    model = graph(text, weights, opset)
    result, changes = canonicalize(model)
    assert not any(change.rolled_back for change in changes)
    feed = random_feed(model, dims)
    found = run_session(open_session(result, level="none"), feed)
    for expected, (name, array) in zip(reference(model, feed), found.items(), strict=True):
        np.testing.assert_allclose(array, expected, rtol=2e-4, atol=2e-5, err_msg=name)
    return result
