"""Sensitivity by segments beside the plain way, which builds and runs the whole model for every atom.

``python -m tests.bench.sensitivity [NAME…]`` measures every atom of a zoo model alone and restored in both ways, on the
same samples with the same parameters, and prints seconds, the rank correlation of the two (Spearman) and the largest
difference in dB. Nothing is stored; reading samples counts for both.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from tests.zoo import ZOO
from tests.zoo.packages import float_model

NAMES = ("MBV2", "EFL0")
SAMPLES = 32
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Row:
    """One model in one direction. ``apart_db``: 0.5 and 1 quantile of the difference between the two ways."""

    name: str
    direction: str
    atoms: int
    samples: int
    plain_seconds: float
    seconds: float
    spearman: float
    median_apart_db: float
    most_apart_db: float


def measure(name: str, count: int) -> list[Row]:
    """Both directions of a model."""
    from edgeq import recipe, steps
    from edgeq.analyse.sensitivity import Direction, Probe, decibel, only, sensitivity
    from edgeq.context import Context
    from edgeq.report.recorder import Recorder
    from edgeq.rewrite.qdq import insert_qdq
    from edgeq.run.samples import load_samples
    from edgeq.source import read_model
    from edgeq.target.load import load_target
    from edgeq.target.oracle import Oracle

    target = load_target("local")
    model, _ = read_model(float_model(name), opset=target.opset)
    context = Context(target, Oracle(target), load_samples(ZOO[name].calibration, model, limit=count), Recorder())
    quantizer = steps.apply(recipe.parse(recipe.DEFAULT, steps.KNOWN), model, context).quantizer
    assert quantizer is not None, "the default recipe quantizes"
    plan, _, _ = quantizer.fused()
    job = quantizer.job(plan)
    every = set(plan.integer)

    def plain(names_of: Callable[[str], set[str]]) -> dict[str, float]:
        probe = Probe(job.model, job.samples, target, context.threads)
        return {
            atom.name: probe.noise(insert_qdq(job.model, only(plan, names_of(atom.name)), job.encodings))
            for atom in job.atoms
        }

    ways: dict[Direction, Callable[[str], set[str]]] = {
        "alone": lambda name: {name},
        "restored": lambda name: every - {name},
    }
    rows = []
    for direction, names_of in ways.items():
        before, plain_seconds = _timed(partial(plain, names_of))
        after, seconds = _timed(partial(sensitivity, job, direction))
        pairs = np.array([(decibel(before[name]), decibel(after[name].power)) for name in before])
        apart = np.abs(pairs[:, 0] - pairs[:, 1])
        rows.append(
            Row(name, direction, len(before), len(job.samples), plain_seconds, seconds, _spearman(*pairs.T),
                float(np.median(apart)), float(apart.max()))
        )  # fmt: skip
    return rows


def _timed(work: Callable[[], Answer]) -> tuple[Answer, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Rank correlation of values in dB; what differs by less than 0.01 shares its mean rank."""
    ranks = []
    for values in (a, b):
        _, place, counts = np.unique(values.round(2), return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum() - (counts - 1) / 2)[place])
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


@click.command()
@click.argument("names", nargs=-1)
@click.option("--samples", type=int, default=SAMPLES, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(names: tuple[str, ...], samples: int, out: Path | None) -> None:
    """Time both ways and compare their answers."""
    rows = [row for name in names or NAMES for row in measure(name, samples)]
    if out:
        out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    table = Table("model", "direction", "atoms", "plain s", "s", "times", "Spearman", "median dB apart", "most")
    for row in rows:
        table.add_row(
            row.name, row.direction, str(row.atoms), f"{row.plain_seconds:.1f}", f"{row.seconds:.1f}",
            f"{row.plain_seconds / row.seconds:.1f}", f"{row.spearman:.4f}", f"{row.median_apart_db:.3f}",
            f"{row.most_apart_db:.2f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
