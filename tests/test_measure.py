"""Costs from profiles: attributed to the right atoms, and comparable where only estimated."""

from __future__ import annotations

import pytest

from edgeq.analyse.measure import _by_atom, _crossed, measure
from edgeq.analyse.place import default_costs, place
from edgeq.run.profile import profile
from tests.graphs import normal
from tests.placed import placed

POINT = "Conv<kernel_shape=[1,1]>"
LARGE = (
    f"(float[1,32,24,24] x) => (float[1,32,24,24] y) {{ t = {POINT}(x, w) r = Relu(t) e = Erf(r) s = Tanh(e)"
    f" u = {POINT}(s, w) z = Add(u, s) y = {POINT}(z, w) }}"
)
WEIGHTS = {"w": normal(32, 32, 1, 1)}


def test_every_atom_and_tensor_gets_a_price() -> None:
    made = placed(LARGE, WEIGHTS)
    costs = measure(made.source, made.model, made.plan, made.feeds, made.shapes, made.target)
    assert costs.float_ns.keys() == costs.integer_ns.keys() == {atom.name for atom in made.plan.atoms}
    assert {str(value.name) for atom in made.plan.atoms for value in atom.inputs} <= costs.boundary_ns.keys()
    for prices in (costs.float_ns, costs.integer_ns, costs.boundary_ns):
        assert all(price > 0 for price in prices.values())
    assert place(made.plan.atoms, made.target, costs).atoms == made.plan.atoms


@pytest.mark.parametrize("quantized", [False, True])
def test_times_of_the_profile_are_all_attributed(quantized: bool) -> None:
    """What a profile says of kernels ends up with an atom, or with the borders: nothing is dropped or counted twice."""
    made = placed(LARGE, WEIGHTS)
    model = made.model if quantized else made.source
    times, graph = profile(model, made.feeds, config=made.target.session)
    assert {str(node.name) for node in graph.graph} == set(times), "each node of the optimised graph was timed"
    atoms, borders = _by_atom(model, made.plan.atoms, made.feeds, made.target, 1)
    assert set(atoms) == {atom.name for atom in made.plan.atoms}
    assert borders > 0 or not quantized


def test_products_of_rank_3_are_timed_under_their_own_name() -> None:
    made = placed(
        "(float[2,5,16] x) => (float[2,5,8] y) { t = MatMul(x, w) u = Add(t, b) y = Softmax(u) }",
        {"w": normal(16, 8), "b": normal(8)},
    )
    costs = measure(made.source, made.model, made.plan, made.feeds, made.shapes, made.target)
    default = default_costs(made.plan.atoms, made.shapes)
    ratio = {name: costs.float_ns[name] / default.float_ns[name] for name in default.float_ns}
    assert ratio["MatMul_node"] != ratio["Softmax_node"], "both were measured, neither is scaled from the other"


def test_borders_are_shared_among_the_tensors_that_cross() -> None:
    """A Q at the input, a DQ ahead of Erf, a Q behind Tanh, a DQ for the caller: the price of each is what Q, DQ and
    layout changes cost together, by size."""
    made = placed(LARGE, WEIGHTS)
    assert sorted(_crossed(made.plan)) == ["r", "s", "x", "y"]
    _, borders = _by_atom(made.model, made.plan.atoms, made.feeds, made.target, 1)
    costs = measure(made.source, made.model, made.plan, made.feeds, made.shapes, made.target)
    total = sum(costs.boundary_ns[name] for name in ("r", "s", "x", "y"))
    assert total == pytest.approx(borders, rel=1.5), "two profiles of the same kernels"


def test_what_writes_float_itself_crosses_nothing() -> None:
    made = placed("(float[5,16] x) => (float[5,8] y) { t = MatMul(x, w) y = Tanh(t) }", {"w": normal(16, 8)})
    assert made.plan.bare
    assert _crossed(made.plan) == ["x"]


def test_one_lap_makes_a_profile() -> None:
    made = placed(LARGE, WEIGHTS)
    times, _ = profile(made.source, made.feeds[:1], warmup=3, repeats=0)  # nothing is left behind the warm-up laps
    assert times
    assert all(time >= 0 for time in times.values())
