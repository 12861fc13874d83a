"""Einsum as products. Oracle: onnx's reference evaluator on the graph as written, for equations drawn at random."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.rewrite.canonicalize import canonicalize
from edgeq.rewrite.einsum import parse
from edgeq.run.session import open_session, run_session
from tests.graphs import graph, normal, ops, reference, rewritten

SIZES = {"a": 2, "b": 3, "c": 4, "d": 1, "e": 5, "f": 2}


def einsum(equation: str, *, dynamic: str = "") -> str:
    """The graph of one Einsum; labels in ``dynamic`` are axes without a known size."""
    terms, result = parse(equation) or ([], "")
    named = [",".join(f"N{label}" if label in dynamic else str(SIZES[label]) for label in one) for one in terms]
    fed = ", ".join(f"float[{shape}] x{index}" for index, shape in enumerate(named))
    read = ", ".join(f"x{index}" for index in range(len(terms)))
    made = ",".join(f"R{label}" if label in dynamic else str(SIZES[label]) for label in result)
    return f'({fed}) => (float[{made}] y) {{ y = Einsum<equation="{equation}">({read}) }}'


def dims(dynamic: str) -> dict[str, int]:
    return {f"N{label}": SIZES[label] for label in dynamic}


@pytest.mark.parametrize(
    ("equation", "expected"),
    [
        ("ab,bc->ac", ["MatMul"]),
        ("ab,bc", ["MatMul"]),
        ("abc,abe->ace", ["Transpose", "MatMul"]),
        ("abce,abfe->abcf", ["Transpose", "MatMul"]),  # scores of attention
        ("abc,ce->abe", ["MatMul"]),  # a linear layer
        ("abce,cef->abf", ["Reshape", "Reshape", "MatMul"]),  # heads into the model's width
        ("abc,cef->abef", ["Reshape", "MatMul", "Reshape"]),  # and back
        ("ab,ab->ab", ["Mul"]),
        ("a,b->ab", ["Unsqueeze", "Mul"]),
        ("b,ab->ab", ["Mul"]),
        ("ab,b->a", ["Reshape", "MatMul", "Reshape"]),
        ("b,b->", ["Reshape", "Reshape", "MatMul", "Reshape"]),
        ("abc,ae->e", ["ReduceSum", "Reshape", "MatMul", "Reshape"]),
        ("abc->cab", ["Transpose"]),
        ("abc->ca", ["ReduceSum", "Transpose"]),
        ("abc->", ["ReduceSum"]),
    ],
)
def test_it_becomes_products_that_kernels_know(equation: str, expected: list[str]) -> None:
    assert ops(rewritten(einsum(equation))) == expected


@st.composite
def equations(draw: st.DrawFn) -> str:
    terms = [
        "".join(draw(st.lists(st.sampled_from(sorted(SIZES)), unique=True, min_size=1, max_size=4))) for _ in range(2)
    ]
    labels = sorted(set("".join(terms)))
    result = draw(st.permutations(labels).flatmap(lambda order: st.integers(0, len(order)).map(lambda n: order[:n])))
    return f"{terms[0]},{terms[1]}->{''.join(result)}"


@settings(max_examples=100)
@given(equation=equations(), data=st.data())
def test_any_equation_of_two_terms_keeps_its_sense(equation: str, data: st.DataObject) -> None:
    labels = sorted(set(equation) & SIZES.keys())
    dynamic = "".join(data.draw(st.lists(st.sampled_from(labels), unique=True))) if labels else ""
    model = graph(einsum(equation, dynamic=dynamic))
    result, changes = canonicalize(model)
    assert not any(change.rolled_back for change in changes)
    assert dynamic or "Einsum" not in ops(result)
    terms, _ = parse(equation) or ([], "")
    feed = {f"x{index}": normal(*(SIZES[label] for label in term)) for index, term in enumerate(terms)}
    (found,) = run_session(open_session(result, level="none"), feed).values()
    np.testing.assert_allclose(found, reference(model, feed)[0], rtol=1e-4, atol=1e-4)


def test_one_unknown_size_is_enough_for_a_reshape_and_two_are_left() -> None:
    assert ops(rewritten(einsum("abc,cef->abef", dynamic="a"), **dims("a"))) == ["Reshape", "MatMul", "Reshape"]
    assert ops(rewritten(einsum("abc,cef->abef", dynamic="ab"), **dims("ab"))) == ["Reshape", "MatMul", "Reshape"]
    assert ops(rewritten(einsum("fabce,fced->fabd", dynamic="ac"), **dims("ac"))) == ["Einsum"]


def test_a_constant_is_transposed_once_and_becomes_a_weight() -> None:
    text = '(float[2,3,4] x) => (float[2,3,5] y) { y = Einsum<equation="abc,ec->abe">(x, w) }'
    found = rewritten(text, {"w": normal(5, 4)})
    assert ops(found) == ["MatMul"]
    assert found.graph.node(0).inputs[1].shape == (4, 5)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text",
    [
        '(float[3,3] x) => (float[3] y) { y = Einsum<equation="ii->i">(x) }',
        '(float[2,3,4] x, float[4,5] z) => (float[2,3,5] y) { y = Einsum<equation="...c,ce->...e">(x, z) }',
        '(float[2,3] x, float[3,4] z, float[4,2] v) => (float[2,2] y) { y = Einsum<equation="ab,bc,cd->ad">(x, z, v) }',
        '(float[1,3] x, float[2,3] z) => (float[2,3] y) { y = Einsum<equation="ab,ab->ab">(x, z) }',
    ],
    ids=["diagonal", "ellipsis", "three", "broadcast"],
)
def test_what_is_no_product_of_two_stays(text: str) -> None:
    assert ops(canonicalize(graph(text))[0]) == ["Einsum"]
