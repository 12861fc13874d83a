"""Einsum as MatMul, Mul, Transpose and ReduceSum, which targets have integer kernels for and fusions know (L6).

Each label is one of five kinds: in both operands and the result (batch), in both and summed, in one and the result
(left, right), in one and summed. What one operand alone sums is summed first; without a label that both sum it is a
product of broadcast tensors; else ``[batch, left, summed] x [batch, summed, right]``, where several labels of a kind
become one axis. Left alone: repeated labels in a term (diagonals), ellipses, more than two operands, integers, shapes
of which a Reshape would have to guess more than one size.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgeq.ir import query
from edgeq.rewrite.match import Edit, each

AXES_AS_INPUTS = 13  # the opset from which ReduceSum and Unsqueeze take them so
Sizes = dict[str, int | None]


@dataclass(frozen=True)
class Term:
    """A value, a label for each of its axes, and the nodes that make it, not yet in the graph."""

    value: ir.Value
    labels: str
    made: tuple[ir.Node, ...] = ()


@dataclass(frozen=True)
class Layout:
    """The labels of each kind; ``wide``: all of the result that two operands have, in its order."""

    batch: str
    summed: str
    left: str
    right: str
    wide: str

    @classmethod
    def of(cls, a: str, b: str, result: str) -> Layout:
        shared = [label for label in a if label in b]
        batch, summed = ("".join(one for one in shared if (one in result) == kept) for kept in (True, False))
        left, right = ("".join(one for one in term if one in result and one not in shared) for term in (a, b))
        return cls(batch, summed, left, right, result)

    @property
    def alone(self) -> bool:
        """Whether rows keep their axes: MatMul takes [left ..., k] x [k, n] as it is."""
        return not self.batch and len(self.left) > 1

    @property
    def rows(self) -> list[str]:
        """Labels that share an axis of what MatMul reads first."""
        return [*(self.left if self.alone else [*self.batch, self.left]), self.summed]

    @property
    def columns(self) -> list[str]:
        return [*self.batch, self.summed, self.right]

    @property
    def product(self) -> list[str]:
        return [*self.rows[:-1], self.right]

    def known(self, sizes: Sizes) -> bool:
        """Whether no Reshape has more than one size to guess."""
        grouped = [[_product(group, sizes) for group in _tail(groups)] for groups in (self.rows, self.columns)]
        split = [_product(label, sizes) for label in "".join(_tail(self.product))]
        return not self.summed or all(shape.count(-1) <= 1 for shape in (*grouped, split))


def _tail(groups: list[str]) -> list[str]:
    """The groups from the first on that is no label alone; axes in front of it keep their place."""
    same = next((index for index, group in enumerate(groups) if len(group) != 1), len(groups))
    return groups[same:]


def parse(equation: str) -> tuple[list[str], str] | None:
    """``ab,bc->ac`` -> (["ab", "bc"], "ac"), the result of an equation without an arrow being the labels that appear
    once, in alphabetical order. None for ellipses and for a term that repeats a label."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        result = "".join(sorted(label for label, count in Counter("".join(terms)).items() if count == 1))
    plain = all(re.fullmatch("[A-Za-z]*", term) and len(set(term)) == len(term) for term in (*terms, result))
    return (terms, result) if plain and set(result) <= set("".join(terms)) else None


def _einsum(node: ir.Node, edit: Edit) -> bool:
    parsed, values = parse(str(query.attribute(node, "equation", ""))), [value for value in node.inputs if value]
    if parsed is None or not 1 <= len(values) <= 2 or edit.opset < AXES_AS_INPUTS:
        return False
    labels, result = parsed
    shapes = [query.dims(value) for value in values]
    if any(shape is None or len(shape) != len(term) for shape, term in zip(shapes, labels, strict=True)):
        return False
    sizes = _sizes(labels, [shape or () for shape in shapes])
    if sizes is None or not all(map(query.is_float, values)):
        return False
    layout = Layout.of(labels[0], labels[-1], result)
    if len(values) == 2 and not layout.known(sizes):
        return False
    read = [result + "".join(labels[:index] + labels[index + 1 :]) for index in range(len(labels))]
    terms = [
        _summed(Term(value, term), [one for one in term if one not in others], node, edit)
        for value, term, others in zip(values, labels, read, strict=True)
    ]
    whole = _multiplied(terms[0], terms[1], layout, sizes, node, edit) if len(terms) == 2 else terms[0]
    whole = _ordered(whole, result, node, edit)
    if not whole.made:
        return edit.bypass(node, whole.value)
    made = [*dict.fromkeys(whole.made)]
    made[-1].outputs[0].shape = node.outputs[0].shape
    edit.swap(node, made)
    return True


def _sizes(labels: list[str], shapes: list[tuple[int | None, ...]]) -> Sizes | None:
    """Label -> its size, None where that isn't known; None altogether where a 1 would be broadcast."""
    found: Sizes = {}
    for term, shape in zip(labels, shapes, strict=True):
        for label, size in zip(term, shape, strict=True):
            known = found.get(label)
            if known is not None and size is not None and known != size:
                return None
            found[label] = known if size is None else size
    return found


def _multiplied(a: Term, b: Term, layout: Layout, sizes: Sizes, node: ir.Node, edit: Edit) -> Term:
    if not layout.summed:
        parts = [_spread(term, layout.wide, node, edit) for term in (a, b)]
        return _then("Mul", parts, layout.wide, node, edit)
    first = _ordered(a, layout.batch + layout.left + layout.summed, node, edit)
    second = _ordered(b, layout.batch + layout.summed + layout.right, node, edit)
    rows = _grouped(first, layout.rows, sizes, node, edit)
    columns = _grouped(second, layout.columns, sizes, node, edit)
    return _split(_then("MatMul", [rows, columns], "", node, edit), layout.product, sizes, node, edit)


def _then(op: str, terms: list[Term], labels: str, node: ir.Node, edit: Edit, *more: ir.Value, **how: object) -> Term:
    """``op`` of terms; the result's shape is told by inference."""
    inputs: list[ir.Value | None] = [*(term.value for term in terms), *more]
    new = edit.node(node, op, inputs, dict(how))
    new.outputs[0].type = terms[0].value.type
    return Term(new.outputs[0], labels, (*(one for term in terms for one in term.made), new))


def _numbers(name: str, numbers: list[int], node: ir.Node, edit: Edit) -> ir.Value:
    assert node.graph is not None
    return edit.constant(node.graph, f"{node.name}_{name}", np.array(numbers, np.int64))


def _summed(term: Term, labels: list[str], node: ir.Node, edit: Edit) -> Term:
    """Without ``labels``, which nothing else reads."""
    if not labels:
        return term
    axes = _numbers("axes", [term.labels.index(label) for label in labels], node, edit)
    rest = "".join(label for label in term.labels if label not in labels)
    return _then("ReduceSum", [term], rest, node, edit, axes, keepdims=0)


def _ordered(term: Term, labels: str, node: ir.Node, edit: Edit) -> Term:
    order = [term.labels.index(label) for label in labels]
    if order == sorted(order):
        return term
    return _then("Transpose", [term], labels, node, edit, perm=order)


def _spread(term: Term, labels: str, node: ir.Node, edit: Edit) -> Term:
    """With an axis for each of ``labels``, of size 1 where the term has none."""
    ordered = _ordered(term, "".join(label for label in labels if label in term.labels), node, edit)
    missing = [axis for axis, label in enumerate(labels) if label not in term.labels]
    lead = next((axis for axis, label in enumerate(labels) if label in term.labels), len(labels))
    axes = [axis - lead for axis in missing if axis >= lead]  # broadcasting adds those in front by itself
    if not axes:
        return ordered
    return _then("Unsqueeze", [ordered], labels, node, edit, _numbers("axes", axes, node, edit))


def _grouped(term: Term, groups: list[str], sizes: Sizes, node: ir.Node, edit: Edit) -> Term:
    """One axis a group; of size 1 for an empty one."""
    tail = _tail(groups)
    shape = [0] * (len(groups) - len(tail)) + [_product(group, sizes) for group in tail]
    return _reshaped(term, shape, term.labels, node, edit) if tail else term


def _split(term: Term, groups: list[str], sizes: Sizes, node: ir.Node, edit: Edit) -> Term:
    """One axis a label of a term that has one a group."""
    tail, labels = _tail(groups), "".join(groups)
    shape = [0] * (len(groups) - len(tail)) + [_product(label, sizes) for label in "".join(tail)]
    return _reshaped(term, shape, labels, node, edit) if tail else replace(term, labels=labels)


def _product(labels: str, sizes: Sizes) -> int:
    """Size of some axes together, -1 where one isn't known."""
    found = [sizes[label] for label in labels]
    return -1 if None in found else math.prod(size for size in found if size is not None)


def _reshaped(term: Term, shape: list[int], labels: str, node: ir.Node, edit: Edit) -> Term:
    return _then("Reshape", [term], labels, node, edit, _numbers("shape", shape, node, edit))


einsums = each(_einsum, "Einsum")
