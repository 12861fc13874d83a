"""The driver: nothing changes but the form, wrong rewrites are found and named, cost is linear."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.errors import ModelError
from edgeq.ir import io
from edgeq.ir.text import to_text
from edgeq.rewrite import canonicalize as driver
from edgeq.rewrite.canonicalize import REWRITES, canonicalize
from edgeq.rewrite.match import Edit, each
from edgeq.rewrite.preserve import excess, preserves
from edgeq.run.session import open_session, run_session
from tests.graphs import graph, normal, number, ops, random_feed, reference, rewritten

BLOCK = (
    "(float[N,4,8,8] x) => (float[N,10] y) {"
    " c = Conv(x, w) n = BatchNormalization(c, gamma, beta, mean, var)"
    " a = Add(n, three) h = Clip(a, zero, six) m = Mul(n, h) s = Div(m, six)"
    " p = ReduceMean<keepdims=0>(s, hw) d = Dropout(p) y = Gemm<transB=1>(d, v, b) }"
)
WEIGHTS = {
    "w": normal(8, 4, 1, 1),
    **{name: normal(8) for name in ("gamma", "beta", "mean")},
    "var": np.abs(normal(8)) + np.float32(0.1),
    **{"three": number(3), "zero": number(0), "six": number(6), "hw": np.array([2, 3])},
    "v": normal(10, 8),
    "b": normal(10),
}


def test_a_block_comes_out_in_the_form_later_stages_expect() -> None:
    assert to_text(rewritten(BLOCK, WEIGHTS)).splitlines() == [
        "in  x f32[N,4,8,8]",
        "w   w f32[8,4,1,1]",
        "w   v f32[8,10]",
        "w   b f32[10]",
        "w   Conv_node_bias f32[8]",
        "n = Conv(x, w, Conv_node_bias)",
        "s = HardSwish(n)",
        "ReduceMean_node/GlobalAveragePool_output = GlobalAveragePool(s)",
        "p = Flatten(ReduceMean_node/GlobalAveragePool_output) {axis=1}",
        "y = Gemm(p, v, b)",
        "out y f32[N,10]",
    ]


def test_the_given_model_is_not_touched() -> None:
    model = graph(BLOCK, WEIGHTS)
    before, text = io.digest(model), to_text(model)
    _, changes = canonicalize(model, feeds=[random_feed(model)])
    assert changes and (io.digest(model), to_text(model)) == (before, text)
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert all(tensor is not None and tensor.name == name for name, tensor in tensors.items())


def test_the_result_is_a_fixed_point() -> None:
    once, _ = canonicalize(graph(BLOCK, WEIGHTS))
    twice, changes = canonicalize(once)
    assert changes == () and to_text(twice) == to_text(once)


def test_nodes_to_keep_are_kept() -> None:
    model = graph(BLOCK, WEIGHTS)
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}{index}"
    result, _ = canonicalize(model, keep=frozenset(["BatchNormalization1"]))
    assert "BatchNormalization" in ops(result) and "HardSwish" in ops(result)


def _spoil(node: ir.Node, edit: Edit) -> bool:
    """A rewrite that is right but at two nodes."""
    op = "Abs" if node.name in ("neg3", "neg5") else "Neg"
    edit.swap(node, [edit.node(node, op, list(node.inputs), like=node.outputs[0])])
    return True


def _duplicate(node: ir.Node, _: Edit) -> bool:
    """A rewrite that makes the graph invalid: two values of one name."""
    node.outputs[0].name = "x"
    return True


def test_wrong_rewrites_are_rolled_back_where_they_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "REWRITES", (("spoil", each(_spoil, "Neg")), *REWRITES))
    body = " ".join(f"v{index + 1} = Neg(v{index})" for index in range(8))
    model = graph(f"(float[N,4] v0) => (float[N,4] y) {{ {body} i = Identity(v8) y = Exp(i) }}")
    for index in range(8):
        model.graph[index].name = f"neg{index}"
    result, changes = canonicalize(model, feeds=[random_feed(model)])
    assert ops(result) == ["Neg"] * 8 + ["Exp"]
    undone = [change for change in changes if change.rolled_back]
    assert [(change.rewrite, change.nodes) for change in undone] == [("spoil", 1), ("spoil", 1)]
    assert "at node 'neg3': output 'y' moves by" in undone[0].rolled_back and "'neg5'" in undone[1].rolled_back
    assert ("drop-noops", 1) in [(change.rewrite, change.nodes) for change in changes]


def test_a_rewrite_that_breaks_the_graph_is_found_without_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "REWRITES", (*REWRITES, ("duplicate", each(_duplicate, "Neg"))))
    text = "(float[N,4] x) => (float[N,4] y) { a = Neg(x) b = Identity(a) y = Exp(b) }"
    result, changes = canonicalize(graph(text))
    assert ops(result) == ["Neg", "Exp"]
    assert [change.rewrite for change in changes if change.rolled_back] == ["duplicate"]


def test_an_invalid_model_is_refused() -> None:
    model = graph("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    model.graph[0].op_type = "Relluh"
    with pytest.raises(ModelError, match="Relluh"):
        canonicalize(model)


def test_a_check_that_refuses_everything_leaves_the_model_alone() -> None:
    result, changes = canonicalize(graph(BLOCK, WEIGHTS), check=lambda _: "never content")
    assert len(ops(result)) == len(ops(graph(BLOCK, WEIGHTS)))
    assert changes[0].rewrite == "all" and "never content" in changes[0].rolled_back


@pytest.mark.parametrize(
    ("before", "after", "equal"),
    [
        ([np.nan, 1.0], [np.nan, 1.0], True),
        ([np.nan, 1.0], [1.0, 1.0], False),
        ([np.inf, -np.inf], [np.inf, -np.inf], True),
        ([np.inf, 1.0], [-np.inf, 1.0], False),
        ([np.inf, 1.0], [3e38, 1.0], False),
        ([0.0, 0.0], [1e-8, 0.0], True),
        ([100.0, 0.0], [100.001, 0.001], True),
        ([100.0, 1.0], [100.0, 1.1], False),
    ],
)
def test_equality_of_outputs(before: list[float], after: list[float], equal: bool) -> None:
    arrays = [np.array(values, np.float32) for values in (before, after)]
    assert (excess(*arrays) <= 1) is equal


def test_whole_numbers_must_be_equal_and_random_outputs_need_not() -> None:
    assert excess(np.array([1, 2]), np.array([1, 3])) == np.inf
    text = "(float[2,3] x) => (float[2,3] y) { n = RandomNormalLike(x) i = Identity(n) y = Add(x, i) }"
    model = graph(text)
    _, changes = canonicalize(model, feeds=[random_feed(model)])
    assert [(change.rewrite, change.rolled_back) for change in changes] == [("drop-noops", "")]


def test_an_output_that_amplifies_rounding_is_judged_by_the_runtime_s_own_noise() -> None:
    """exp of a sum of 4096 products of size 40: rounding moves it by more than 1e-4 of itself."""
    text = "(float[N,4096] x) => (float[N,1] y) { m = MatMul(x, w) s = Mul(m, k) y = Exp(s) }"
    model = graph(text, {"w": normal(4096, 1), "k": number(1.3)})
    _, changes = canonicalize(model, feeds=[random_feed(model) for _ in range(2)])
    assert not any(change.rolled_back for change in changes)


def test_a_vanished_or_reshaped_output_is_named() -> None:
    model = graph("(float[2,3] x) => (float[2,3] y) { y = Relu(x) }")
    check = preserves(model, [random_feed(model)])
    other = graph("(float[2,3] x) => (float[3,2] y) { y = Transpose<perm=[1,0]>(x) }")
    assert check(model) == "" and check(other) == "output 'y' is float32[3, 2], was float32[2, 3]"


UNARY = ["Relu", "Sigmoid", "Identity", "Neg", "Exp", "Tanh"]
STEP = st.one_of(
    st.tuples(st.sampled_from(UNARY), st.none()),
    st.tuples(st.sampled_from(["Add", "Sub", "Mul", "Div"]), st.sampled_from(["k0", "k1", "k2", "half"])),
    st.tuples(st.sampled_from(["Add", "Mul", "Sub", "Max"]), st.integers(0, 9)),
    st.tuples(st.sampled_from(["MatMul"]), st.sampled_from(["m0", "m1"])),
    st.tuples(st.sampled_from(["Transpose"]), st.sampled_from(["0,2,1", "0,1,2"])),
    st.tuples(st.sampled_from(["Clip", "ReverseAdd"]), st.sampled_from(["half", "k0"])),
)


def random_graph(steps: list[tuple[str, str | int | None]], outputs: set[int]) -> str:
    """Every value f32[N,4,4], so that any node can read any earlier one."""
    lines = []
    for index, (op, argument) in enumerate(steps):
        value, source = f"v{index + 1}", f"v{index}"
        if op == "Transpose":
            lines.append(f"{value} = Transpose<perm=[{argument}]>({source})")
        elif op == "ReverseAdd":
            lines.append(f"{value} = Add({argument}, {source})")
        elif op == "Clip":
            lines.append(f"{value} = Clip({source}, , half)")
        elif argument is None:
            lines.append(f"{value} = {op}({source})")
        else:
            other = argument if isinstance(argument, str) else f"v{min(argument, index)}"
            lines.append(f"{value} = {op}({source}, {other})")
    wanted = sorted({len(steps), *(min(index + 1, len(steps)) for index in outputs)})
    signature = ", ".join(f"float[N,4,4] v{index}" for index in wanted)
    return f"(float[N,4,4] v0) => ({signature}) {{ {' '.join(lines)} }}"


CONSTANTS = {
    "k0": np.array([[1, 2, 4, 0.5]], np.float32),
    "k1": np.array([[0.3], [-0.7], [1.1], [1]], np.float32),
    "k2": number(1),
    "half": number(0.5),
    "m0": (normal(4, 4) / 4).astype(np.float32),
    "m1": (normal(4, 4) / 4).astype(np.float32),
}


@given(st.lists(STEP, min_size=1, max_size=10), st.sets(st.integers(0, 9), max_size=2))
@settings(max_examples=60)
def test_random_graphs_keep_their_outputs(steps: list[tuple[str, str | int | None]], outputs: set[int]) -> None:
    model = graph(random_graph(steps, outputs), CONSTANTS)
    result, changes = canonicalize(model)
    assert not any(change.rolled_back for change in changes)
    feed = random_feed(model)
    found = run_session(open_session(result, level="none"), feed)
    with np.errstate(all="ignore"):
        expected = reference(model, feed)
    assert list(found) == [value.name for value in model.graph.outputs]
    for before, (name, after) in zip(expected, found.items(), strict=True):
        assert excess(before, after, 1e-5) <= 10, name
