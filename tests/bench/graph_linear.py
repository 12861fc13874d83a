"""Whether graph work is linear: chains of 300 to 2400 nodes through every stage that edits or reads a graph.

``python -m tests.bench.graph_linear`` prints seconds a stage and size, and for each doubling how far the time exceeds
twice the time before (1.0 is linear, 1.3 the limit the project holds itself to). Statistics are made up instead of
observed and kernels are known beforehand, so that only edgeq's own graph work shows.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click
import numpy as np
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import onnx_ir as ir

SIZES = (300, 600, 1200, 2400)
CHANNELS = 4
REPEATS = 3  # the fastest counts: noise only adds

T = TypeVar("T")


def chain(nodes: int) -> ir.Model:
    """Conv, Relu, Add with the Conv's input, again and again: ``nodes`` nodes, f32[1, 4, 8, 8] throughout."""
    import onnx_ir as ir

    rng = np.random.default_rng(0)
    shape, dtype = ir.Shape((1, CHANNELS, 8, 8)), ir.TensorType(ir.DataType.FLOAT)
    value = ir.Value(name="x", shape=shape, type=dtype)
    inputs, made, weights = [value], list[ir.Node](), list[ir.Value]()
    for index in range(nodes // 3):
        # 0.05 keeps the sums near 1 however long the chain is.
        array = rng.normal(0, 0.05, (CHANNELS, CHANNELS, 1, 1)).astype(np.float32)
        weight = ir.Value(name=f"w{index}", const_value=ir.tensor(array, name=f"w{index}"))
        conv = ir.Node("", "Conv", [value, weight], name=f"conv{index}")
        relu = ir.Node("", "Relu", [conv.outputs[0]], name=f"relu{index}")
        add = ir.Node("", "Add", [relu.outputs[0], value], name=f"add{index}")
        for node in (conv, relu, add):
            node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = f"{node.name}_out", shape, dtype
        value = add.outputs[0]
        made += [conv, relu, add]
        weights.append(weight)
    graph = ir.Graph(inputs, [value], nodes=made, initializers=weights, opset_imports={"": 21}, name="chain")
    return ir.Model(graph, ir_version=10)


@dataclass
class Bench:
    """Times stages of one size, keeping each one's fastest lap."""

    seconds: dict[str, float]

    def stage(self, name: str, work: Callable[[], T]) -> T:
        laps = []
        for _ in range(REPEATS):
            gc.collect()
            start = time.perf_counter()
            result = work()
            laps.append(time.perf_counter() - start)
        self.seconds[name] = min(laps)
        return result


def stages(nodes: int) -> dict[str, float]:
    """Seconds of every stage on a chain of ``nodes`` nodes."""
    from edgeq.analyse import encode, place
    from edgeq.analyse.cost import concrete_shapes
    from edgeq.ir import io, verify
    from edgeq.lower.legalize import legalize
    from edgeq.rewrite.canonicalize import canonicalize
    from edgeq.rewrite.qdq import insert_qdq
    from edgeq.source import read_model
    from edgeq.target.load import load_target
    from edgeq.target.oracle import Oracle

    target = load_target("local")
    oracle = Oracle(target)
    place.find_atoms(chain(30), target, oracle)  # asks the runtime once
    feed = {"x": np.random.default_rng(1).standard_normal((1, CHANNELS, 8, 8)).astype(np.float32)}
    bench, built = Bench({}), chain(nodes)
    model, _ = bench.stage("read", partial(read_model, built, opset=target.opset))
    model = bench.stage("canonicalize", lambda: canonicalize(model, feeds=[feed])[0])
    shapes = bench.stage("shapes", lambda: concrete_shapes(model, feed))
    atoms = bench.stage("atoms", lambda: place.find_atoms(model, target, oracle))
    plan = bench.stage("place", lambda: place.place(atoms, target, place.default_costs(atoms, shapes), keep_float={}))
    stats = _made_up(encode.observed(plan))
    encodings = bench.stage("encode", lambda: encode.encode(plan, stats, target))
    quantized = bench.stage("insert Q/DQ", lambda: insert_qdq(model, plan, encodings))
    bench.stage("legalize", lambda: legalize(quantized, target))
    bench.stage("verify", lambda: verify.verify(quantized, "the chain"))
    bench.stage("serialize", lambda: io.to_bytes(quantized))
    return bench.seconds


def _made_up(taps: list[str]) -> dict[str, Any]:
    """Statistics of the same normal values for every tensor."""
    from edgeq.analyse.stats import Stats

    stats = Stats()
    stats.add(np.random.default_rng(2).standard_normal(4096).astype(np.float32), 0)
    return dict.fromkeys(taps, stats)


@click.command()
@click.argument("sizes", nargs=-1, type=int)
def main(sizes: tuple[int, ...]) -> None:
    """Time graph work on chains of SIZES nodes."""
    sizes = sizes or SIZES
    runs = [stages(size) for size in sizes]
    for run in runs:
        run["all"] = sum(run.values())
    table = Table("stage", *(f"{size} nodes, s" for size in sizes), *(f"{size} / linear" for size in sizes[1:]))
    for name in runs[0]:
        seconds = [run[name] for run in runs]
        growth = [
            after / before * small / large
            for before, after, small, large in zip(seconds, seconds[1:], sizes, sizes[1:], strict=False)
        ]
        table.add_row(name, *(f"{value:.3f}" for value in seconds), *(f"{value:.2f}" for value in growth))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
