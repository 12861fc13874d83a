"""Coverage: what is reported as integer, float, leftover or lost, on models where that is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from edgeq.analyse.coverage import is_integer, optimised, read_back, trace
from edgeq.analyse.encode import encode
from edgeq.analyse.place import place
from edgeq.ir import query
from edgeq.rewrite.qdq import insert_qdq
from edgeq.run.session import Level
from tests.graphs import normal
from tests.placed import MINMAX, Placed, all_integer, placed

POINT = "Conv<kernel_shape=[1,1]>"
WEIGHTS = {"w": normal(8, 8, 1, 1) * 0.3, "b": normal(8)}
THREE = f"(float[1,8,6,6] x) => (float[1,8,6,6] y) {{ t = {POINT}(x, w, b) u = Tanh(t) y = {POINT}(u, w, b) }}"


def test_shares_and_islands_of_a_mixed_model() -> None:
    made = placed(
        f"(float[1,8,6,6] x) => (float[1,8,6,6] y) {{ t = {POINT}(x, w, b) m = Reshape(t, s) u = Tanh(m)"
        f" y = ConvTranspose<kernel_shape=[1,1]>(u, w) }}",
        {**WEIGHTS, "s": np.array([1, 8, 6, 6])},
    )
    seen, lost = read_back(made.model, made.plan, made.shapes, made.target)
    assert lost == {}
    assert seen.integer_macs_share == pytest.approx(0.5), "two products of equal work, one of them float"
    assert [(island.op, island.macs > 0) for island in seen.float_islands] == [("ConvTranspose", True), ("Tanh", False)]
    assert {island.reason for island in seen.float_islands} == {"no integer kernel on this target"}
    assert (seen.integer_nodes, seen.mover_nodes, seen.boundary_qdq, seen.unexplained) == (1, 1, 2, ())
    assert seen.kernels == {"QLinearConv": 1, "Reshape": 1}


def test_kept_float_shows_the_reason_given() -> None:
    made = placed(THREE, WEIGHTS)
    plan = place(made.plan.atoms, made.target, all_integer(made.plan.atoms), keep_float={"Conv_node": "too noisy"})
    model = insert_qdq(made.source, plan, encode(plan, made.stats, made.target, ranges=MINMAX))
    seen, _ = read_back(model, plan, made.shapes, made.target)
    assert {island.node: island.reason for island in seen.float_islands}["Conv_node"] == "too noisy"
    assert seen.integer_macs_share == pytest.approx(0.5)


def _broken(made: Placed) -> Placed:
    """The first weight's scale changed behind the bias's back: int32 biases with another scale don't fuse."""
    model = made.model.clone()
    value = model.graph.initializers["b_quantized_scale"]
    scale = query.constant(value)
    assert scale is not None
    value.const_value = ir.tensor(scale * 2, name=value.name)
    return replace(made, model=model)


def test_what_did_not_fuse_is_lost_and_its_qdq_unexplained() -> None:
    made = _broken(placed(THREE, WEIGHTS))
    seen, lost = read_back(made.model, made.plan, made.shapes, made.target)
    assert lost == {"Conv_node": "the runtime did not fuse it in its place in this graph"}
    assert seen.unexplained
    assert seen.float_islands[0].reason == "planned as QLinearConv, but the runtime did not fuse it here"


def test_a_constant_decoded_on_each_run_is_unexplained() -> None:
    made = placed(
        "(float[4,8] x) => (float[4,8] y) { d = DequantizeLinear(q, s, z) y = Mul(x, d) }",
        {"q": np.arange(8, dtype=np.int8), "s": np.array(0.5, np.float32), "z": np.array(0, np.int8)},
    )
    seen, lost = read_back(made.model, made.plan, made.shapes, made.target)
    assert (lost, seen.unexplained) == ({}, ("DequantizeLinear_node",))


@pytest.mark.parametrize("level", ["extended", "all"])
@pytest.mark.parametrize("shape", ["2,5", "N,T", "1,5"])
def test_kernels_are_traced_to_their_nodes_at_any_rank(shape: str, level: Level) -> None:
    """The runtime reshapes static rank 3 to rank 2 and names the product anew; layouts rename convolutions."""
    made = placed(
        f"(float[{shape},16] x) => (float[{shape},8] y) "
        "{ t = MatMul(x, w) u = Add(t, b) v = MatMul(u, m) y = Add(v, b) }",
        {"w": normal(16, 8), "m": normal(8, 8), "b": normal(8)},
    )
    graph = optimised(made.model, made.target, level).graph
    traced = trace(made.model, graph)
    heads = {traced.origin[str(node.name)] for node in graph if is_integer(node)}
    assert {"MatMul_node", "MatMul_node_2"} <= heads
    seen, lost = read_back(made.model, made.plan, made.shapes, made.target)
    assert (lost, seen.integer_macs_share) == ({}, 1.0)


def test_convolutions_are_traced_through_layout_changes() -> None:
    made = placed(
        f"(float[1,8,6,6] x) => (float[1,8,6,6] y) {{ t = {POINT}(x, w, b) r = Relu(t) y = {POINT}(r, w, b) }}", WEIGHTS
    )
    graph = optimised(made.model, made.target, "all").graph
    origins = [trace(made.model, graph).origin[str(node.name)] for node in graph if is_integer(node)]
    assert len(origins) == 2
    assert all(origins)
    for model in (made.source, made.model):
        graph = optimised(model, made.target, "all").graph
        traced = trace(model, graph)
        nodes = {str(node.name) for node in made.source.graph}
        assert {traced.origin[str(node.name)] for node in graph if "Conv" in node.op_type} <= nodes
