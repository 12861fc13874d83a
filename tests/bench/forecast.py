"""What was forecast of each node of the zoo's models beside what the runtime then did with the whole model.

``python -m tests.bench.forecast TARGET [NAME …]`` prints a table, and every node that was told wrong.
"""

from __future__ import annotations

import sys

import numpy as np

from edgeq import recipe as recipes
from edgeq import steps
from edgeq.analyse.forecast import forecast, ran
from edgeq.analyse.place import free_costs, place
from edgeq.context import Context
from edgeq.given import read_with_samples
from edgeq.lower.fuse import fuse
from edgeq.report.recorder import Recorder
from edgeq.target.load import load_target
from edgeq.target.oracle import Oracle
from tests.zoo import ZOO
from tests.zoo.packages import float_model

SAMPLES = 4
TOKENS = ("input_ids", "attention_mask", "token_type_ids")
FIXED = {  # what a target of fixed shapes gets, with random data, where samples differ
    "OCR4d": ["x=1,3,192,192"],
    "OCR4r": ["x=1,3,48,160"],
    "MINI6": [f"{name}=1,32" for name in TOKENS],
}


def compare(name: str, target_name: str) -> tuple[int, int, list[str]]:
    """Nodes told rightly, all nodes, and a line for each that wasn't."""
    target = load_target(target_name)
    inputs = FIXED.get(name, []) if target.static else []
    spec = "synthetic:4:0" if inputs else ZOO[name].calibration
    source, _, samples = read_with_samples(
        float_model(name), spec, target, Recorder(), inputs=inputs, limit=SAMPLES
    )  # fmt: skip
    context = Context(target, Oracle(target), samples, Recorder())
    quantizer = steps.apply(
        recipes.parse("canonicalize; quantize(ranges=minmax)", steps.KNOWN), source, context
    ).quantizer
    assert quantizer is not None
    plan = place(quantizer.atoms, target, free_costs(quantizer.atoms))
    lowered, _ = fuse(quantizer.build(plan), target)
    done = ran(lowered, plan, target)
    heads = {str(node.name): atom.name for atom in plan.atoms for node in atom.nodes}
    told = list(forecast(quantizer.atoms, plan, target, context.oracle))
    wrong = [
        f"{row.node} ({row.op}): told {row.runs} on {row.provider}, became {done[heads[row.node]][1]} on "
        f"{done[heads[row.node]][0]}"
        for row in told
        if row.runs != "index" and row.provider and heads[row.node] in done
        and done[heads[row.node]] != (row.provider, row.runs)
    ]  # fmt: skip
    return len(told) - len(wrong), len(told), wrong


def main(target: str, names: list[str]) -> None:
    rows = {name: compare(name, target) for name in names or ZOO}
    for name, (agreed, count, wrong) in rows.items():
        print(f"{name:8} {agreed:5} of {count:5}  {agreed / count:.1%}", *wrong, sep="\n         ")  # noqa: T201
    agreed, count = np.sum([row[:2] for row in rows.values()], axis=0)
    print(f"{target}: {agreed} of {count} nodes told rightly, {agreed / count:.1%}")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
