"""Placement: the cut against brute force over labels, and the shapes of graph where Q/DQ easily end up wrong."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.analyse.coverage import read_back
from edgeq.analyse.encode import encode, observed
from edgeq.analyse.observe import observe
from edgeq.analyse.place import Atom, Costs, Plan, default_costs, find_atoms, place
from edgeq.ir import query
from edgeq.rewrite.qdq import insert_qdq
from edgeq.source import read_model
from edgeq.target.load import load_target
from edgeq.target.oracle import Oracle
from edgeq.target.verdict import Verdict
from tests.graphs import graph, normal, number
from tests.placed import MINMAX, VNNI, all_integer, oracle_of, placed, samples_of

TARGET = load_target(VNNI)
POINT = "Conv<kernel_shape=[1,1]>"
IMAGE = "(float[1,8,6,6] x) => (float[1,8,6,6] y)"
WEIGHTS = {"w": normal(8, 8, 1, 1) * 0.3, "b": normal(8)}


def atoms_of(text: str, weights: Mapping[str, np.ndarray] | None = None) -> tuple[Atom, ...]:
    model, _ = read_model(graph(text, weights), opset=21)
    return find_atoms(model, TARGET, oracle_of(VNNI))


def names(atoms: tuple[Atom, ...]) -> list[list[str]]:
    return [[node.op_type for node in atom.nodes] for atom in atoms]


# --- the cut ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Puzzle:
    """Atoms over random edges with random prices; only ``able`` ones may be integer."""

    atoms: tuple[Atom, ...]
    costs: Costs


def _puzzle(reads: list[list[int]], able: list[bool], prices: list[int], shown: list[bool], bare: list[bool]) -> Puzzle:
    """Node i reads the values listed in ``reads[i]``; value 0 is the graph's input, value i + 1 node i's output."""
    source = ir.val("v0", ir.DataType.FLOAT, [4])
    values, atoms = [source], []
    for index, sources in enumerate(reads):
        inputs = tuple(dict.fromkeys(values[place % len(values)] for place in sources))
        output = ir.val(f"v{index + 1}", ir.DataType.FLOAT, [4])
        node = ir.node("MatMul", inputs, outputs=[output], name=f"n{index}")  # an op with a weight: never useless
        kernel = Verdict("integer" if able[index] else "float", "K", "")
        atoms.append(
            Atom(node, (), inputs, (), (output,), kernel, bare=kernel if able[index] and bare[index] else None)
        )
        values.append(output)
    ends = [value for value, seen in zip(values[1:], shown, strict=True) if seen or not value.uses()]
    ir.Graph([source], ends, nodes=[atom.head for atom in atoms], name="g")
    price = iter(prices)
    costs = Costs(
        {atom.name: float(next(price)) for atom in atoms},
        {atom.name: float(next(price)) for atom in atoms},
        {str(value.name): float(next(price)) for value in values},
    )
    return Puzzle(tuple(atoms), costs)


def total(puzzle: Puzzle, integer: set[str]) -> float:
    """What ``place`` promises to minimise: kernels, a Q for each float tensor some integer atom reads, a DQ for each
    integer tensor something float reads, unless its kernel can write float and no candidate reads it."""
    costs, able = puzzle.costs, {atom.name for atom in puzzle.atoms if atom.verdict.kind != "float"}
    sum_ = 0.0
    writer = {value: atom for atom in puzzle.atoms for value in atom.outputs}
    for atom in puzzle.atoms:
        if atom.name in able:
            sum_ += (costs.integer_ns if atom.name in integer else costs.float_ns)[atom.name]
    for value in {value for atom in puzzle.atoms for value in (*atom.inputs, *atom.outputs)}:
        made = writer.get(value)
        readers = [str(node.name) for node in query.users(value)]
        if (made is None or made.name not in integer) and any(name in integer for name in readers):
            sum_ += costs.boundary_ns[str(value.name)]
        if made is not None and made.name in integer:
            outside = value.is_graph_output() or any(name not in integer for name in readers)
            free = made.bare is not None and not any(name in able for name in readers)
            sum_ += costs.boundary_ns[str(value.name)] if outside and not free else 0.0
    return sum_


@given(st.data())
@settings(max_examples=150)
def test_the_plan_is_the_cheapest_of_all_labellings(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 6))
    flags = st.lists(st.booleans(), min_size=count, max_size=count)
    reads = data.draw(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=2), min_size=count, max_size=count))
    prices = data.draw(st.lists(st.integers(1, 30), min_size=3 * count + 1, max_size=3 * count + 1))
    puzzle = _puzzle(reads, data.draw(flags), prices, data.draw(flags), data.draw(flags))
    able = [atom.name for atom in puzzle.atoms if atom.verdict.kind != "float"]
    best = min(
        total(puzzle, set(chosen)) for size in range(len(able) + 1) for chosen in itertools.combinations(able, size)
    )
    plan = place(puzzle.atoms, TARGET, puzzle.costs)
    assert total(puzzle, set(plan.integer)) == best
    _assert_consistent(plan)


def _assert_consistent(plan: Plan) -> None:
    """Every node has one label, and exactly the edges of integer atoms are quantized."""
    assert plan.integer.keys().isdisjoint(plan.left_float)
    nodes = {str(node.name) for atom in plan.atoms for node in atom.nodes}
    inner = {str(node.name) for atom in plan.atoms if atom.name in plan.integer for node in atom.nodes}
    assert nodes == inner | plan.left_float.keys()
    edges: set[str] = set()
    for atom in (atom for atom in plan.atoms if atom.name in plan.integer):
        edges |= {str(value.name) for value in atom.inputs}
        edges |= set() if atom.name in plan.bare else {str(value.name) for value in atom.outputs}
    assert plan.tensors.keys() == edges
    assert all(name in plan.tensors for name in plan.ties.values())


def test_what_must_stay_float_does_and_says_why() -> None:
    atoms = atoms_of(f"{IMAGE} {{ t = {POINT}(x, w, b) r = Relu(t) y = {POINT}(r, w, b) }}", WEIGHTS)
    relu = str(atoms[0].tail[0].name)
    plan = place(atoms, TARGET, all_integer(atoms), keep_float={relu: "too noisy"})
    assert list(plan.integer) == [atoms[1].name], "an atom stays float as a whole"
    assert plan.left_float == {atoms[0].name: "too noisy", relu: "too noisy"}


def test_a_region_without_products_is_not_worth_its_rounding() -> None:
    atoms = atoms_of(f"{IMAGE} {{ s = Sigmoid(x) y = Mul(x, s) }}")
    plan = place(atoms, TARGET, all_integer(atoms))
    assert (plan.integer, plan.tensors) == ({}, {})
    assert set(plan.left_float.values()) == {"an integer kernel exists, but Q/DQ around it cost more than it saves"}


def test_small_work_is_not_worth_a_boundary_and_large_is() -> None:
    for size, integer in ((1, 0), (256, 1)):
        text = f"(float[1,{size},16,16] x) => (float[1,{size},16,16] y) {{ t = {POINT}(x, w) y = Tanh(t) }}"
        atoms = atoms_of(text, {"w": normal(size, size, 1, 1)})
        shapes = {"x": (1, size, 16, 16), "t": (1, size, 16, 16), "y": (1, size, 16, 16)}
        assert len(place(atoms, TARGET, default_costs(atoms, shapes)).integer) == integer


# --- atoms -----------------------------------------------------------------------------------------------------------


def test_atoms_hold_what_one_kernel_computes() -> None:
    text = f"{IMAGE} {{ t = {POINT}(x, w, b) y = Clip(t, zero, six) }}"
    bounds = {"zero": number(0), "six": number(6)}
    assert names(atoms_of(text, {**WEIGHTS, **bounds})) == [["Conv", "Clip"]]
    text = "(float[2,5,16] x) => (float[2,5,8] y) { t = MatMul(x, w) u = Add(b, t) r = Relu(u) y = Softmax(r) }"
    assert names(atoms_of(text, {"w": normal(16, 8), "b": normal(8)})) == [["MatMul", "Add", "Relu"], ["Softmax"]]


def test_dynamic_rank_3_products_keep_their_add_apart() -> None:
    """The runtime makes one QGemm of MatMul + Add only where it can reshape to rank 2."""
    text = "(float[N,T,16] x) => (float[N,T,8] y) { t = MatMul(x, w) u = Add(t, b) y = Softmax(u) }"
    weights = {"w": normal(16, 8), "b": normal(8)}
    assert names(atoms_of(text, weights)) == [["MatMul"], ["Add"], ["Softmax"]]
    static = atoms_of(text.replace("N,T", "2,3"), weights)
    assert names(static) == [["MatMul", "Add"], ["Softmax"]]
    assert static[0].verdict.kernel == "QGemm"


@pytest.mark.parametrize(
    "reader",
    [
        "y = Relu(t) z = Identity(t)",  # something else needs the value before Relu
        "y = Relu(t) z = Identity(x)",
    ],
)
def test_a_result_with_other_readers_or_shown_is_not_folded(reader: str) -> None:
    shown = ", float[1,8,6,6] t" if "(x)" in reader else ""
    text = f"(float[1,8,6,6] x) => (float[1,8,6,6] y, float[1,8,6,6] z{shown}) {{ t = {POINT}(x, w, b) {reader} }}"
    assert names(atoms_of(text, WEIGHTS))[0] == ["Conv"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Tanh(x)", "no integer kernel on this target"),
        ("c = Constant<value_float=1.0>() y = Reshape(c, s)", "no float tensor flows in"),
        ("y, i = MaxPool<kernel_shape=[1,1]>(x)", "its output is not float"),
        ("y, z = Split<axis=1, num_outputs=2>(x)", "nobody reads one of its outputs"),
    ],
)
def test_reasons_against_an_integer_kernel(body: str, reason: str) -> None:
    atoms = atoms_of(f"(float[1,8,6,6] x) => (float[A,B,C,D] y) {{ {body} }}", {"s": np.array([1, 1, 1, 1])})
    assert reason in {atom.verdict.reason for atom in atoms if atom.verdict.kind == "float"}


def test_nodes_without_names_are_told_apart() -> None:
    plan = placed(f"{IMAGE} {{ t = {POINT}(x, w, b) u = {POINT}(t, w, b) y = Add(u, t) }}", WEIGHTS).plan
    assert len(plan.integer) == 3


def test_a_product_ahead_of_a_float_add_keeps_its_kernel() -> None:
    """The runtime would merge MatMul and Add into a float Gemm before it looks at Q/DQ."""
    made = placed(
        "(float[5,16] x, float[5,8] z) => (float[5,8] y) { t = MatMul(x, w) e = Erf(z) y = Add(t, e) }",
        {"w": normal(16, 8)},
    )
    keep = place(made.plan.atoms, TARGET, all_integer(made.plan.atoms), keep_float={"Add_node": "asked"})
    assert list(keep.integer) == ["MatMul_node"]
    assert not keep.bare


# --- whole graphs ----------------------------------------------------------------------------------------------------

GRAPHS = {
    "inverted residual": (
        f"{IMAGE} {{ a = {POINT}(x, w, b) r = Clip(a, zero, six) d = Conv<kernel_shape=[3,3], pads=[1,1,1,1], group=8>"
        f"(r, k, b) s = Clip(d, zero, six) p = {POINT}(s, w, b) t = Add(p, x) y = {POINT}(t, w, b) }}"
    ),
    "squeeze and excite": (
        f"{IMAGE} {{ a = {POINT}(x, w, b) g = GlobalAveragePool(a) r = {POINT}(g, w, b) q = Relu(r) s = Sigmoid(q) "
        f"m = Mul(a, s) y = {POINT}(m, w, b) }}"
    ),
    "channel shuffle": (
        f"{IMAGE} {{ a = {POINT}(x, w, b) l, r = Split<axis=1, num_outputs=2>(a) c = Concat<axis=1>(r, l) "
        f"v = Reshape(c, five) t = Transpose<perm=[0,2,1,3,4]>(v) f = Reshape(t, four) y = {POINT}(f, w, b) }}"
    ),
    "feature pyramid": (
        f"(float[1,8,6,6] x) => (float[1,8,6,6] y, float[1,8,3,3] z) {{ a = {POINT}(x, w, b) "
        f"d = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a) z = {POINT}(d, w, b) "
        f'n = Resize<mode="nearest">(z, , scales) s = Add(n, a) y = {POINT}(s, w, b) }}'
    ),
    "swish": f"{IMAGE} {{ a = {POINT}(x, w, b) s = Sigmoid(a) m = Mul(a, s) y = {POINT}(m, w, b) }}",
}
MORE = {
    "zero": number(0), "six": number(6), "k": normal(8, 1, 3, 3), "scales": np.array([1, 1, 2, 2], np.float32),
    "five": np.array([1, 2, 4, 6, 6]), "four": np.array([1, 8, 6, 6]),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_blocks_of_real_networks_fuse_without_a_leftover(name: str) -> None:
    made = placed(GRAPHS[name], {**WEIGHTS, **MORE})
    seen, lost = read_back(made.model, made.plan, made.shapes, made.target)
    assert (lost, seen.unexplained) == ({}, ())
    assert (seen.integer_macs_share, seen.float_nodes) == (1.0, 0)
    outputs = len(made.model.graph.outputs)
    assert seen.boundary_qdq == 1 + outputs, "a Q where floats come in, a DQ for each result"
    for value in ("x", *(str(output.name) for output in made.source.graph.outputs)):
        assert value in made.plan.tensors


def test_attention_fuses() -> None:
    text = """(float[1,5,16] x) => (float[1,5,16] y) {
        a = MatMul(x, q) k0 = MatMul(x, k) v = MatMul(x, w) t = Transpose<perm=[0,2,1]>(k0) s = MatMul(a, t)
        n = Mul(s, c) p = Softmax(n) o = MatMul(p, v) y = MatMul(o, w) }"""
    made = placed(text, {"q": normal(16, 16), "k": normal(16, 16), "w": normal(16, 16), "c": number(0.25)})
    seen, lost = read_back(made.model, made.plan, made.shapes, made.target)
    assert (lost, seen.unexplained, seen.float_nodes, seen.integer_macs_share) == ({}, (), 0, 1.0)
    assert np.abs(made.fused()["y"] - made.exact()["y"]).max() < 0.05 * np.ptp(made.exact()["y"])


def test_ties_end_at_the_tensor_whose_codes_they_are() -> None:
    made = placed(GRAPHS["channel shuffle"], {**WEIGHTS, **MORE})
    assert made.plan.ties == {"l": "a", "r": "a", "v": "c", "t": "v", "f": "t"}
    scales = {name: float(params.scale) for name, params in made.encodings.activations.items()}
    assert scales["l"] == scales["r"] == scales["a"]
    assert scales["c"] == scales["v"] == scales["t"] == scales["f"]


def _chain(length: int) -> ir.Model:
    """``length`` nodes: Conv, Relu, Conv, Relu …"""
    nodes = [f"t{i} = {POINT}(t{i - 1}, w, b)" if i % 2 else f"t{i} = Relu(t{i - 1})" for i in range(1, length + 1)]
    return graph(f"(float[1,8,6,6] t0) => (float[1,8,6,6] t{length}) {{ {' '.join(nodes)} }}", WEIGHTS)


def _calls(work: Callable[[], object]) -> int:
    """How many functions a piece of work calls: what its time is made of, without the noise of a clock."""
    count = 0

    def tally(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(tally)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_work_grows_in_proportion_to_the_graph() -> None:
    counts = []
    feeds = [{"t0": normal(1, 8, 6, 6)}]
    for length in (100, 200, 400):
        model, _ = read_model(_chain(length), opset=21)
        oracle = Oracle(TARGET, oracle_of(VNNI).path.parent.parent)
        atoms = find_atoms(model, TARGET, oracle)
        assert oracle.sessions <= 8, "equal patterns are one question"
        plan = place(atoms, TARGET, all_integer(atoms))
        assert len(plan.integer) == length // 2
        _assert_consistent(plan)
        stats = observe(model, observed(plan), samples_of(feeds), threads=1)
        encodings = encode(plan, stats, TARGET, ranges=MINMAX)
        steps = (
            lambda: find_atoms(model, TARGET, oracle),  # noqa: B023 - called in this turn of the loop
            lambda: place(atoms, TARGET, all_integer(atoms)),  # noqa: B023
            lambda: encode(plan, stats, TARGET, ranges=MINMAX),  # noqa: B023
            lambda: insert_qdq(model, plan, encodings),  # noqa: B023
        )
        counts.append([_calls(step) for step in steps])
    for shorter, longer in itertools.pairwise(counts):
        for before, after in zip(shorter, longer, strict=True):
            assert after < 2.2 * before
