"""Joins in front of the outputs whose parts differ too much in range to share a scale (L5).

A detector joins boxes (0 to 640) and scores (0 to 1) in one output tensor: its 8-bit step is 2.5, and every score
becomes 0. Such a join stays float, and with it the arithmetic around it that only serves the outputs (decoding of
boxes, Sigmoid), so that the products in front write float, each with a scale of its own. Instead of a scale a part
behind the join, which no kernel has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import onnx_ir as ir

from edgeq.analyse.encode import root
from edgeq.analyse.place import Atom, Plan
from edgeq.analyse.stats import Stats
from edgeq.ir import query
from edgeq.ir.ops import OPS

RATIO = 8.0  # of two ranges: above it the narrower has less than 5 of 8 bits left


def observed(plan: Plan) -> list[str]:
    """The tensors that ``crowded`` wants statistics of."""
    return [
        str(value.name)
        for atom in _shared(plan)
        for value in atom.head.inputs
        if value is not None and not query.is_constant(value)
    ]


def crowded(plan: Plan, stats: Mapping[str, Stats]) -> dict[str, str]:
    """Nodes of ``plan`` to keep float -> why: joins in front of the outputs whose parts differ in range by more than
    ``RATIO``, and what is around them."""
    found: dict[str, str] = {}
    light = _light(plan.atoms)
    for atom in _shared(plan):
        widths = {str(value.name): _width(value, plan, stats) for value in atom.head.inputs if value is not None}
        known = {name: width for name, width in widths.items() if width > 0}
        if len(known) < 2:
            continue
        narrow, wide = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
        if known[wide] > RATIO * known[narrow]:
            reason = (
                f"{atom.name} joins {narrow!r} (range {known[narrow]:.3g}) with {wide!r} (range {known[wide]:.3g}), "
                "which no scale holds both"
            )
            found.update({str(node.name): reason for node in _around(atom.head, light)})
    return found


def _shared(plan: Plan) -> list[Atom]:
    """Joins with nothing but arithmetic between them and the outputs, whose output has one scale."""
    light = _light(plan.atoms)
    return [
        atom
        for atom in plan.atoms
        if atom.head.op_type == "Concat" and atom.head in light and str(atom.outputs[0].name) in plan.tensors
    ]


def _light(atoms: Iterable[Atom]) -> set[ir.Node]:
    """Nodes that multiply by no weights and whose results no such product reads: they serve the outputs alone."""
    light: set[ir.Node] = set()
    for atom in reversed(tuple(atoms)):
        row = OPS.get(atom.head.op_type)
        weighted = row is not None and row.weight is not None
        if not weighted and all(node in light for value in atom.outputs for node in query.users(value)):
            light.update(atom.nodes)
    return light


def _around(join: ir.Node, light: set[ir.Node]) -> set[ir.Node]:
    """The light nodes that feed ``join`` or read it, and itself."""
    found = {join}
    steps: tuple[Callable[[ir.Node], list[ir.Node]], ...] = (_before, _behind)
    for step in steps:
        stack = [join]
        while stack:
            new = [node for node in step(stack.pop()) if node in light and node not in found]
            found.update(new)
            stack += new
    return found


def _before(node: ir.Node) -> list[ir.Node]:
    return [writer for value in node.inputs if value is not None and (writer := value.producer()) is not None]


def _behind(node: ir.Node) -> list[ir.Node]:
    return [reader for value in node.outputs for reader in query.users(value)]


def _width(value: ir.Value, plan: Plan, stats: Mapping[str, Stats]) -> float:
    """Of the range of a part, 0 included; 0 where it is unknown."""
    array = query.constant(value)
    if array is not None:
        return float(array.max(initial=0.0)) - float(array.min(initial=0.0))
    seen = stats.get(str(value.name), stats.get(root(str(value.name), plan.ties)))
    return max(seen.max, 0.0) - min(seen.min, 0.0) if seen is not None and seen.count else 0.0
