"""Small graphs taken through placement, encoding and Q/DQ insertion, for tests of each."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx
import onnx.reference
import onnx_ir as ir

from edgeq.analyse.cost import concrete_shapes
from edgeq.analyse.encode import Encodings, Ranges, encode, observed
from edgeq.analyse.observe import observe
from edgeq.analyse.place import Atom, Costs, Plan, Shapes, find_atoms, place
from edgeq.analyse.stats import Stats
from edgeq.ir import verify
from edgeq.rewrite.qdq import insert_qdq
from edgeq.run.record import Array, Feed, Samples
from edgeq.run.session import Level, open_session, run_session
from edgeq.source import read_model
from edgeq.target.load import load_target
from edgeq.target.oracle import Oracle
from edgeq.target.record import Target
from tests.graphs import Arrays, graph, random_feed

VNNI = "cpu-x64-vnni"
MINMAX = Ranges("minmax", "minmax")  # the ranges whose error is bounded: half a step and nothing clipped


@cache
def oracle_of(name: str) -> Oracle:
    """One oracle a target for the whole test run, apart from the user's own cache."""
    folder = tempfile.TemporaryDirectory(prefix="edgeq-tests-")
    _KEPT.append(folder)
    return Oracle(load_target(name), Path(folder.name))


_KEPT: list[tempfile.TemporaryDirectory[str]] = []  # removed when the interpreter ends


def samples_of(feeds: Sequence[Feed], digest: str = "d") -> Samples:
    """Feeds in memory as calibration samples."""
    return Samples("memory", len(feeds), digest, lambda index: feeds[index])


def all_integer(atoms: Sequence[Atom]) -> Costs:
    """Costs under which everything that can be integer is."""
    names = [atom.name for atom in atoms]
    tensors = [str(value.name) for atom in atoms for value in (*atom.inputs, *atom.outputs)]
    return Costs(dict.fromkeys(names, 1000.0), dict.fromkeys(names, 1.0), dict.fromkeys(tensors, 1e-3))


@dataclass(frozen=True)
class Placed:
    """A model with everything the runtime fuses made integer."""

    source: ir.Model
    target: Target
    feeds: tuple[Feed, ...]
    plan: Plan
    stats: dict[str, Stats]
    encodings: Encodings
    model: ir.Model

    @property
    def shapes(self) -> Shapes:
        return concrete_shapes(self.source, self.feeds[0])

    def exact(self, feed: Feed | None = None) -> dict[str, Array]:
        """Float outputs."""
        return run(self.source, self.feeds[0] if feed is None else feed)

    def fused(self, feed: Feed | None = None) -> dict[str, Array]:
        """Outputs of the kernels the runtime fuses."""
        return run(self.model, self.feeds[0] if feed is None else feed, config=self.target.session)

    def unfused(self, feed: Feed | None = None) -> dict[str, Array]:
        """Outputs of the same Q/DQ model, each node computed as ONNX defines it."""
        return run(self.model, self.feeds[0] if feed is None else feed, level="none")

    def by_definition(self, feed: Feed | None = None) -> dict[str, Array]:
        """Outputs by onnx's reference evaluator."""
        session = onnx.reference.ReferenceEvaluator(ir.to_proto(self.model))
        outputs = session.run(None, dict(self.feeds[0] if feed is None else feed))
        return dict(zip(session.output_names, outputs, strict=True))


def run(model: ir.Model, feed: Feed, *, level: Level = "all", config: dict[str, str] | None = None) -> dict[str, Array]:
    """Outputs by ONNX Runtime."""
    return run_session(open_session(model, level=level, config=config), feed)


def placed(
    source: str | ir.Model,
    weights: Arrays | None = None,
    *,
    target: str = VNNI,
    feeds: Sequence[Feed] | None = None,
    count: int = 4,
    ranges: Ranges = MINMAX,
    keep_float: Mapping[str, str] | None = None,
    **dims: int,
) -> Placed:
    """A graph in text form, or a model, with all that fuses made integer, verified."""
    made = graph(source, weights) if isinstance(source, str) else source
    model, _ = read_model(made, opset=21)
    feeds = tuple(random_feed(model, dims) for _ in range(count)) if feeds is None else tuple(feeds)
    goal = load_target(target)
    atoms = find_atoms(model, goal, oracle_of(target))
    plan = place(atoms, goal, all_integer(atoms), keep_float=keep_float)
    stats = dict(observe(model, observed(plan), samples_of(feeds), threads=1)) if plan.tensors else {}
    encodings = encode(plan, stats, goal, ranges=ranges)
    quantized = insert_qdq(model, plan, encodings)
    verify.verify(quantized, "inserting Q/DQ")
    return Placed(model, goal, feeds, plan, stats, encodings, quantized)
