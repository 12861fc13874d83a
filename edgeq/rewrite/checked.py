"""Run a table of rewrites until none matches, and prove that the model computes what it did (L6).

The rewrites run in order, in rounds. Instead of comparing numbers after each one, which would cost a session each, the
result is compared once; only when it is wrong is the first guilty rewrite found by bisection over replays, then the
guilty node, and that one is left out. Replays are exact: rewrites are deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from edgeq.errors import ModelError
from edgeq.ir import edit, verify
from edgeq.rewrite.match import Rewrite
from edgeq.rewrite.preserve import Check, preserves
from edgeq.run.record import Feed
from edgeq.source import tidy

Table = Sequence[tuple[str, Rewrite]]
"""Rewrites by name, in the order they run in."""

ROUNDS = 8
"""Rounds after which the rest is left as it is; the zoo needs at most 4."""

NODES_TO_BLAME = 4
"""Guilty nodes after which a rewrite is left out as a whole."""


@dataclass(frozen=True)
class Change:
    """A rewrite that matched ``nodes`` times. ``rolled_back`` says where and why matches were taken back."""

    rewrite: str
    nodes: int
    rolled_back: str = ""


@dataclass(frozen=True)
class _Step:
    """One rewrite in one round that matched at ``nodes``."""

    rewrite: str
    nodes: tuple[str, ...]


@dataclass
class _Refused:
    """What replays leave out: nodes of a rewrite, or all of it, with the reasons in the order they were found."""

    everywhere: frozenset[str]
    nodes: dict[str, set[str]] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    reasons: list[Change] = field(default_factory=list)

    def of(self, rewrite: str) -> frozenset[str]:
        return self.everywhere | self.nodes.get(rewrite, set())

    def add(self, step: _Step, node: str, why: str) -> None:
        known = self.nodes.setdefault(step.rewrite, set())
        if node in known or len(known) == NODES_TO_BLAME:
            self.whole.add(step.rewrite)
            self.reasons.append(Change(step.rewrite, len(step.nodes), f"at every node: {why}"))
        else:
            known.add(node)
            self.reasons.append(Change(step.rewrite, 1, f"at node {node!r}: {why}"))


def rewritten(
    model: ir.Model,
    table: Table,
    *,
    feeds: Sequence[Feed] = (),
    check: Check | None = None,
    keep: frozenset[str] = frozenset(),
) -> tuple[ir.Model, tuple[Change, ...]]:
    """A copy with the rewrites of ``table`` applied and shapes inferred, and what was done.

    The copy is compared with ``model`` on ``feeds`` (two are enough: a rewrite is wrong everywhere or nowhere), or by
    ``check``; without either it is only verified. No rewrite starts at a node named in ``keep``. Raises ModelError
    when ``model`` itself isn't valid ONNX.
    """
    if check is None and feeds:
        check = preserves(model, feeds)
    refused = _Refused(keep)
    result, steps = _replay(model, table, refused)
    while why := _fault(result, check):
        unchanged, _ = _replay(model, table, refused, 0)
        verify.verify(unchanged, "reading")
        if not steps or (check is not None and check(unchanged)):
            return unchanged, (Change("all", 0, f"the model doesn't agree with itself: {why}"),)
        _blame(model, table, steps, check, refused)
        result, steps = _replay(model, table, refused)
    return result, (*_summed(steps), *refused.reasons)


def _summed(steps: Sequence[_Step]) -> list[Change]:
    counts: dict[str, int] = {}
    for step in steps:
        counts[step.rewrite] = counts.get(step.rewrite, 0) + len(step.nodes)
    return [Change(rewrite, count) for rewrite, count in counts.items()]


def _replay(model: ir.Model, table: Table, refused: _Refused, limit: int | None = None) -> tuple[ir.Model, list[_Step]]:
    """A copy after the first ``limit`` steps that match (all of them without a limit)."""
    current, steps = model.clone(), list[_Step]()
    tidy.name_all(current)
    edit.drop_dead(current)
    for _ in range(ROUNDS):
        current = _shaped(current)
        before = len(steps)
        for name, rewrite in table:
            if limit is not None and len(steps) >= limit:
                return current, steps
            if name not in refused.whole and (nodes := rewrite(current, refused.of(name))):
                edit.drop_dead(current)
                steps.append(_Step(name, tuple(nodes)))
        if len(steps) == before:
            return current, steps
    return _shaped(current), steps


def _shaped(model: ir.Model) -> ir.Model:
    """A copy with shapes inferred; without, where a rewrite broke the graph, which the verifier tells later."""
    try:
        return verify.infer_shapes(model)
    except ir.serde.SerdeError:
        return model.clone()


def _fault(model: ir.Model, check: Check | None) -> str:
    try:
        verify.verify(model, "rewriting")
    except ModelError as error:
        return error.message
    return "" if check is None else check(model)


def _blame(model: ir.Model, table: Table, steps: Sequence[_Step], check: Check | None, refused: _Refused) -> None:
    """Find the first step after which the model is wrong, and in it the node; refuse it from now on."""
    count = _first_bad(len(steps), lambda limit: _replay(model, table, refused, limit)[0], check)
    step, before = steps[count - 1], _shaped(_replay(model, table, refused, count - 1)[0])
    rewrite: Rewrite = dict(table)[step.rewrite]
    others = frozenset(
        str(name) for graph in before.graphs() for name in (*(node.name for node in graph), *graph.initializers)
    ) - set(step.nodes)

    def only(matches: int) -> ir.Model:
        trial = before.clone()
        rewrite(trial, others | set(step.nodes[matches:]) | refused.everywhere)
        edit.drop_dead(trial)
        return trial

    guilty = _first_bad(len(step.nodes), only, check)
    refused.add(step, step.nodes[guilty - 1], _fault(only(guilty), check) or "the model is wrong with the others")


def _first_bad(count: int, build: Callable[[int], ir.Model], check: Check | None) -> int:
    """The smallest number of changes that makes the model wrong, given that none doesn't and all do."""
    good, bad = 0, count
    while bad - good > 1:
        middle = (good + bad) // 2
        if _fault(build(middle), check):
            bad = middle
        else:
            good = middle
    return bad
