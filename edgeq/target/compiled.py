"""Verdicts of providers that compile subgraphs: from who took a node and from the provider's own account (L3)."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.ir.ops import OPS
from edgeq.target.micro import micro_model
from edgeq.target.placement import Placement
from edgeq.target.question import Question
from edgeq.target.record import Target
from edgeq.target.runtime import place
from edgeq.target.verdict import COMPARING, Verdict


def compiled_verdicts(asked: Question, target: Target) -> tuple[Verdict, ...]:
    """A verdict a node. Numbers are proved by a run, against each node computed on the CPU as ONNX defines it."""
    placed, wrong = place(micro_model(asked), target)
    if isinstance(placed, str):
        return tuple(Verdict("float", node.op_type, f"the runtime refuses it: {placed}") for node in asked.nodes)
    verdicts = tuple(verdict(node, f"n{index}", placed, target) for index, node in enumerate(asked.nodes))
    if not wrong or all(owner.provider != target.provider for owner in placed.assigned.values()):
        return verdicts
    return tuple(Verdict("float", verdict.kernel, f"{verdict.kernel} {wrong}") for verdict in verdicts)


def owned(asked: Question, target: Target) -> Verdict:
    """Who runs one node as it is, in whatever arithmetic; kernel "" where not the provider, or wrongly."""
    node, (placed, wrong) = asked.nodes[0], place(micro_model(asked), target)
    if isinstance(placed, str):
        return Verdict("float", "", f"the runtime refuses it: {placed}")
    owner = placed.provider_of("n0")
    if owner not in ("", target.provider):
        return Verdict("float", "", f"{target.provider} doesn't take it: it runs on the CPU", owner)
    return Verdict("float", "" if wrong else node.op_type, wrong, target.provider)


def verdict(node: ir.Node, name: str, placed: Placement, target: Target) -> Verdict:
    """What ``node``, called ``name`` in the model that was placed, became."""
    owner = placed.provider_of(name)
    if not owner:
        return Verdict("mover", "", f"{node.op_type} is dropped before {target.provider} sees the graph")
    if owner != target.provider:
        why = f"{target.provider} doesn't take {node.op_type}: it runs on the CPU"
        return Verdict("float", node.op_type, why, owner)
    kernels = placed.kernels_of(name)
    if placed.kernels is None:
        return _taken(node, node.op_type, f"{target.provider} takes it with its Q/DQ")
    if not kernels:
        return _taken(node, "", f"{node.op_type} is part of its neighbour's kernel")
    kernel = kernels[0].op
    if any(one.real for one in kernels):
        return Verdict("float", kernel, f"{target.provider} computes {kernel} in float")
    return _taken(node, kernel, f"{kernel} computes on codes")


def _taken(node: ir.Node, kernel: str, reason: str) -> Verdict:
    row = OPS.get(node.op_type)
    if row is None or not row.keeps_scale or node.op_type in COMPARING:
        return Verdict("integer", kernel, reason)
    return Verdict("mover", kernel, f"{kernel} moves codes" if kernel else reason)
